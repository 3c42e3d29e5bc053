"""The norm of the loss's gradient, |D grad L(w)|, in nats per unit of the metric.

Deterministic. The first-order sharpness of SAM is rho times this (Foret et al. 2021), and Zhao, Zhang and Hu 2022
penalise it. It is zero at every minimum, flat or sharp, so that it says how far training has come rather than how flat
the place is.
"""

from __future__ import annotations

from flatmin.sharpness.arguments import MetricChoice
from flatmin.sharpness.engine import GRADIENT_PASSES, Engine
from flatmin.sharpness.estimate import Estimate, exact

REFUSES = {
    "subset": "near a minimum the gradient of a few examples is mostly sampling noise",
}
"""At a trained tanh network the interval of a subset of a fifth held the whole set's value in 26 of 60 draws."""


def gradient_norm(engine: Engine, *, metric: MetricChoice = "identity") -> Estimate:
    """Norm of the gradient of the training loss.

    Args:
        engine: The models.
        metric: What scales the gradient.
    """
    return exact((engine.scale(metric) * engine.gradient()).norm(dim=1).cpu(), passes=GRADIENT_PASSES)
