"""AdamW: Adam whose weight decay acts on the weights, not through the gradient, as in torch.optim.AdamW.

w <- w - lr weight_decay w, then Adam's step without weight decay. Source: Loshchilov and Hutter 2019.
"""

from __future__ import annotations

from typing import Annotated

from flatmin.optimizers.adam import Adam
from flatmin.optimizers.interface import Base
from flatmin.settings import Setting


def adamw(
    *,
    lr: Annotated[float, Setting(about="Learning rate.", gt=0, per_model=True)] = 1e-3,
    beta1: Annotated[float, Setting(about="Decay of the mean of gradients.", ge=0, lt=1, per_model=True)] = 0.9,
    beta2: Annotated[
        float, Setting(about="Decay of the mean of squared gradients.", ge=0, lt=1, per_model=True)
    ] = 0.999,
    adam_eps: Annotated[float, Setting(about="Added to Adam's denominator.", gt=0, per_model=True)] = 1e-8,
    weight_decay: Annotated[float, Setting(about="Weight decay coefficient.", ge=0, per_model=True)] = 0.01,
) -> Base:
    """Adam with decoupled weight decay."""
    return Adam(lr, beta1, beta2, adam_eps, weight_decay, decoupled=True)
