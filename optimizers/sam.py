"""Sharpness-aware minimisation: the gradient at the ascent point w + rho g / |g|.

g = grad L(w);  e = rho g / (|g| + 1e-12) with the norm over all of a model's weights;  returns grad L(w + e),
so that momentum and weight decay of the base act at w. Source: Foret et al. 2021, eqs. 2 and 3.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from flatmin.optimizers.interface import LossAndGrad, Rule
from flatmin.settings import Setting


def sam(
    *,
    rho: Annotated[
        float,
        Setting(
            about="Radius of the SAM family's neighbourhood.",
            unit="L2 norm of the weights",
            ge=0,
            per_model=True,
        ),
    ] = 0.05,
) -> Rule:
    """Sharpness-aware minimisation."""

    def rule(params: Tensor, loss_and_grad: LossAndGrad) -> tuple[Tensor, Tensor]:
        losses, g = loss_and_grad(params)
        e = rho * g / (g.norm(dim=1, keepdim=True) + 1e-12)
        return losses, loss_and_grad(params + e)[1]

    return rule
