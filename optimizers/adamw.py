"""AdamW: Adam whose weight decay acts on the weights, not through the gradient, as in torch.optim.AdamW.

w <- w - lr weight_decay w, then Adam's step without weight decay. Source: Loshchilov and Hutter 2019.
"""

from __future__ import annotations

from typing import Annotated

from flatmin.optimizers.adam import Adam
from flatmin.optimizers.arguments import Beta1, Beta2, LearningRate, WeightDecay
from flatmin.optimizers.interface import Base
from flatmin.settings import Setting


def adamw(
    *,
    lr: LearningRate = 1e-3,
    beta1: Beta1 = 0.9,
    beta2: Beta2 = 0.999,
    adam_eps: Annotated[float, Setting(about="Added to Adam's denominator.", gt=0, per_model=True)] = 1e-8,
    weight_decay: WeightDecay = 0.01,
) -> Base:
    """Adam with decoupled weight decay."""
    return Adam(lr, beta1, beta2, adam_eps, weight_decay, decoupled=True)
