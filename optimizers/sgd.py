"""Stochastic gradient descent with momentum and L2 weight decay, as in torch.optim.SGD.

g <- g + weight_decay w;  v <- momentum v + g;  w <- w - lr v, or with Nesterov w <- w - lr (g + momentum v).
Source: Sutskever et al. 2013, in the form without dampening whose first v is g.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from torch import Tensor

from flatmin.optimizers.arguments import LearningRate, WeightDecay
from flatmin.optimizers.interface import Base, Evaluation, State, Step
from flatmin.optimizers.terms import matters, scalar
from flatmin.settings import Setting


def sgd(
    *,
    lr: LearningRate = 0.1,
    momentum: Annotated[float, Setting(about="Momentum.", ge=0, lt=1, per_model=True)] = 0.9,
    weight_decay: WeightDecay = 0.0,
    nesterov: Annotated[bool, Setting(about="Whether momentum looks ahead (Nesterov).")] = False,
) -> Base:
    """Stochastic gradient descent with momentum and L2 weight decay."""
    return _SGD(lr, momentum, weight_decay, nesterov)


@dataclass(frozen=True)
class _SGD:
    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool

    def init(self, params: Tensor) -> State:
        return {"velocity": torch.zeros_like(params)}

    def update(self, params: Tensor, found: Evaluation, state: State, step: Step) -> tuple[Tensor, State]:
        g, v = found.grad, state["velocity"]
        if self._decays:
            g = torch.addcmul(g, params, scalar(self.weight_decay, params))
        direction = g
        if self._has_momentum:
            momentum = scalar(self.momentum, v)
            v = torch.addcmul(g, v, momentum)
            direction = torch.addcmul(g, v, momentum) if self.nesterov else v
        lr = scalar(self.lr * step.lr_factor, params)
        return torch.addcmul(params, direction, lr, value=-1), {"velocity": v}

    @cached_property
    def _decays(self) -> bool:
        return matters(self.weight_decay)

    @cached_property
    def _has_momentum(self) -> bool:
        return matters(self.momentum)
