"""SmoothOut: the gradient at weights displaced by uniform noise.

e ~ U(-a, a) independent per element, times the norm that `smoothout_noise` names (a = `smoothout_radius`); returns
grad L(w + e). The paper scales by norms; the published runs of Bisla et al. 2022 meant to and did not, which is the
default here. Source: Wen et al. 2018, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from flatmin.optimizers.interface import Gradient, Rule, State, Step, at
from flatmin.optimizers.noise import scaled_like
from flatmin.settings import Setting


def smoothout(
    *,
    smoothout_radius: Annotated[
        float,
        Setting(about="Half the width of SmoothOut's noise.", unit="what smoothout_noise names", ge=0, per_model=True),
    ] = 0.009,
    smoothout_noise: Annotated[
        Literal["filter", "tensor", "absolute"],
        Setting(about="What SmoothOut's noise is in proportion to: the norm of the filter, of the tensor, or nothing."),
    ] = "absolute",
) -> Rule:
    """Gradients at weights with uniform noise."""
    return _SmoothOut(smoothout_radius, smoothout_noise)


@dataclass(frozen=True)
class _SmoothOut(Rule):
    smoothout_radius: float
    smoothout_noise: Literal["filter", "tensor", "absolute"]

    def gradient(self, params: Tensor, state: State, step: Step) -> Gradient:
        found = yield at(self._noise(params, step).add_(params), hessian=step.hessian)
        return found, state

    def _noise(self, params: Tensor, step: Step) -> Tensor:
        u = step.uniform("smoothout").mul_(2).sub_(1)
        return scaled_like(u, params, step.shapes, self.smoothout_noise).mul_(self.smoothout_radius)
