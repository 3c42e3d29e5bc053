"""Sharpness-aware minimisation: the gradient at the ascent point w + rho g / |g|.

g = grad L(w);  e = rho g / (|g| + 1e-12) with the norm over all of a model's weights;  returns grad L(w + e),
so that momentum and weight decay of the base act at w. Source: Foret et al. 2021, eqs. 2 and 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flatmin.optimizers.arguments import Rho
from flatmin.optimizers.interface import Evaluation, Gradient, Rule, State, Step, at


def sam(*, rho: Rho = 0.05) -> Rule:
    """Sharpness-aware minimisation."""
    return _SAM(rho)


@dataclass(frozen=True)
class _SAM(Rule):
    rho: float
    passes: ClassVar[int] = 2

    def gradient(self, params: Tensor, state: State, step: Step) -> Gradient:
        here = yield at(params)
        there = yield at(ascent(here.grad, self.rho).add_(params), hessian=step.hessian)
        return Evaluation(here.losses, there.grad, there.hvp), state


def ascent(direction: Tensor, rho: Tensor | float) -> Tensor:
    """Return displacements `[K, d]` of length rho along directions `[K, d]`; none along a direction of zero."""
    length: Tensor = direction.norm(dim=1, keepdim=True)
    return direction * (rho / (length + 1e-12))
