"""Adaptive SAM: the ascent step in a ball that is as wide along each weight as the weight is large.

g = grad L(w);  T = |w| + asam_eta, element by element;  e = rho T^2 g / (|T g| + 1e-12);  returns grad L(w + e).
T is taken for every weight, biases and BatchNorm's included; asam_eta keeps weights at zero from being stuck there.
Source: Kwon et al. 2021, eq. 9 and algorithm 1, with T as in their section 4 (element-wise).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from flatmin.optimizers.arguments import Rho
from flatmin.optimizers.interface import Evaluation, Gradient, Rule, State, Step, at
from flatmin.optimizers.sam import ascent
from flatmin.settings import Setting


def asam(
    *,
    rho: Rho = 0.5,
    asam_eta: Annotated[
        float, Setting(about="Added to |w| in ASAM's metric.", unit="weight", ge=0, per_model=True)
    ] = 0.01,
) -> Rule:
    """Adaptive sharpness-aware minimisation, element-wise."""
    return _ASAM(rho, asam_eta)


@dataclass(frozen=True)
class _ASAM(Rule):
    rho: float
    asam_eta: float
    passes: ClassVar[int] = 2

    def gradient(self, params: Tensor, state: State, step: Step) -> Gradient:
        here = yield at(params)
        there = yield at(self._ascent(params, here.grad).add_(params), hessian=step.hessian)
        return Evaluation(here.losses, there.grad, there.hvp), state

    def _ascent(self, params: Tensor, grad: Tensor) -> Tensor:
        metric = params.abs().add_(self.asam_eta)
        return ascent(metric * grad, self.rho).mul_(metric)
