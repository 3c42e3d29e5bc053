"""VaSSO: SAM whose ascent follows a running mean of gradients, which varies less from batch to batch.

d <- (1 - theta) d + theta g with g = grad L(w), d = g at first;  e = rho d / (|d| + 1e-12);  returns grad L(w + e) on
the same batch. theta = 1 is SAM. Source: Li and Giannakis 2023, eq. 7 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from flatmin.optimizers.adam import no_steps
from flatmin.optimizers.arguments import Rho
from flatmin.optimizers.interface import Evaluation, Gradient, Rule, State, Step, at
from flatmin.optimizers.sam import ascent
from flatmin.settings import Setting


def vasso(
    *,
    rho: Rho = 0.05,
    theta: Annotated[
        float, Setting(about="Weight of the newest gradient in VaSSO's running mean.", gt=0, le=1, per_model=True)
    ] = 0.9,
) -> Rule:
    """SAM along a running mean of gradients (variance-suppressed)."""
    return _VaSSO(rho, theta)


@dataclass(frozen=True)
class _VaSSO(Rule):
    rho: float
    theta: float
    passes: ClassVar[int] = 2

    def init(self, params: Tensor) -> State:
        return {"ascent": torch.zeros_like(params), "steps": no_steps(params)}

    def gradient(self, params: Tensor, state: State, step: Step) -> Gradient:
        here = yield at(params)
        mean = ((1 - self.theta) * state["ascent"]).add_(self.theta * here.grad)
        d = torch.where(state["steps"] == 0, here.grad, mean)
        del mean
        there = yield at(ascent(d, self.rho).add_(params), hessian=step.hessian)
        return Evaluation(here.losses, there.grad, there.hvp), {"ascent": d, "steps": state["steps"] + 1}
