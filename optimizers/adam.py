"""Adam with L2 weight decay, as in torch.optim.Adam.

g <- g + weight_decay w;  m <- beta1 m + (1 - beta1) g;  s <- beta2 s + (1 - beta2) g^2;
w <- w - lr (m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + adam_eps).
Source: Kingma and Ba 2015, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from flatmin.optimizers.interface import Base, State
from flatmin.settings import Setting


def adam(
    *,
    lr: Annotated[float, Setting(about="Learning rate.", gt=0, per_model=True)] = 1e-3,
    beta1: Annotated[float, Setting(about="Decay of the mean of gradients.", ge=0, lt=1, per_model=True)] = 0.9,
    beta2: Annotated[
        float, Setting(about="Decay of the mean of squared gradients.", ge=0, lt=1, per_model=True)
    ] = 0.999,
    adam_eps: Annotated[float, Setting(about="Added to Adam's denominator.", gt=0, per_model=True)] = 1e-8,
    weight_decay: Annotated[float, Setting(about="Weight decay coefficient.", ge=0, per_model=True)] = 0.0,
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
        steps = torch.zeros(len(params), 1, dtype=torch.float64, device=params.device)
        return {"mean": torch.zeros_like(params), "square": torch.zeros_like(params), "steps": steps}

    def update(self, params: Tensor, grad: Tensor, state: State, lr_factor: Tensor) -> tuple[Tensor, State]:
        """Return the weights and moments after one step."""
        lr = self.lr * lr_factor
        if self.decoupled:
            params = params - lr * self.weight_decay * params
            g = grad
        else:
            g = grad + self.weight_decay * params
        t = state["steps"] + 1
        m = self.beta1 * state["mean"] + (1 - self.beta1) * g
        s = self.beta2 * state["square"] + (1 - self.beta2) * g * g
        m_hat = m / (1 - self.beta1**t).to(g.dtype)
        root = (s / (1 - self.beta2**t).to(g.dtype)).sqrt()
        return params - lr * m_hat / (root + self.adam_eps), {"mean": m, "square": s, "steps": t}
