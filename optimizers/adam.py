"""Adam with L2 weight decay, as in torch.optim.Adam.

g <- g + weight_decay w;  m <- beta1 m + (1 - beta1) g;  s <- beta2 s + (1 - beta2) g^2;
w <- w - lr (m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + adam_eps).
Source: Kingma and Ba 2015, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from torch import Tensor

from flatmin.optimizers.arguments import Beta1, Beta2, LearningRate, WeightDecay
from flatmin.optimizers.interface import Base, Evaluation, State, Step
from flatmin.optimizers.terms import matters, root, scalar
from flatmin.settings import Setting


def adam(
    *,
    lr: LearningRate = 1e-3,
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.999,
    adam_eps: Annotated[float, Setting(about="Added to Adam's denominator.", gt=0, per_model=True)] = 1e-8,
    weight_decay: WeightDecay = 0.0,
) -> Base:
    """Adam with L2 weight decay."""
    return Adam(lr, beta1, beta2, adam_eps, weight_decay)


@dataclass(frozen=True)
class Adam:
    """Adam over stacked weights; `decoupled` takes the weight decay out of the gradient (AdamW)."""

    lr: float
    beta1: float
    beta2: float
    adam_eps: float
    weight_decay: float
    decoupled: bool = False

    def init(self, params: Tensor) -> State:
        """Return zero moments and no steps done."""
        return {"mean": torch.zeros_like(params), "square": torch.zeros_like(params), "steps": no_steps(params)}

    def update(self, params: Tensor, found: Evaluation, state: State, step: Step) -> tuple[Tensor, State]:
        """Return the weights and moments after one step."""
        lr = self.lr * step.lr_factor
        if self.decoupled:
            params = params - lr * self.weight_decay * params
            g = found.grad
        else:
            g = (self.weight_decay * params).add_(found.grad) if self._decays else found.grad
        t = state["steps"] + 1
        m = torch.lerp(state["mean"], g, scalar(1 - self.beta1, g))
        s = torch.lerp(state["square"], g.square(), scalar(1 - self.beta2, g))
        denominator = root(s).div_((1 - self.beta2**t).sqrt().to(g.dtype)).add_(self.adam_eps)
        scaled = m * (lr / (1 - self.beta1**t)).to(g.dtype)
        return torch.addcdiv(params, scaled, denominator, value=-1), {"mean": m, "square": s, "steps": t}

    @cached_property
    def _decays(self) -> bool:
        return matters(self.weight_decay)


def no_steps(params: Tensor) -> Tensor:
    """Return a count of steps for bias corrections, float64 `[K, 1]`: a parameter without a gradient takes none."""
    return torch.zeros(len(params), 1, dtype=torch.float64, device=params.device)
