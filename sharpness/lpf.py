"""LPF: the training loss seen through a Gaussian low-pass filter.

lpf = E_u[L(w + D u)] with u ~ N(0, sigma^2 I), in nats; L(w) is not subtracted. Source: Bisla, Wang and
Choromanska 2022, section 3; they average 100 draws on the balanced network, with sigma = 0.01 (section 3) or
0.002 (comparison of optimizers).

Here draws are averaged until the standard error is a small part of the value. Where that would take long, the
loss is compared with its second-order expansion within a Krylov space, whose mean is known: a control
variate, which at sigma = 0.01 on networks trained to fit noisy labels saves four draws of five.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from flatmin.settings import Setting
from flatmin.sharpness.arguments import MaxSamples, MetricChoice, Tolerance
from flatmin.sharpness.engine import GRADIENT_PASSES, LOSS_PASSES, PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import Control, Draw, Estimate, sample_mean
from flatmin.sharpness.lanczos import krylov
from flatmin.sharpness.metric import Metric

_LENGTH = 16
_WORTHWHILE = 16
"""Further draws from which on a model takes the control variate. Its products cost about three times as much,
but `lambda_max` and `hessian_trace` need them too."""


def lpf(
    engine: Engine,
    *,
    sigma: Annotated[
        float, Setting(about="Standard deviation of the weight noise.", unit="units of the metric", gt=0)
    ] = 0.01,
    metric: MetricChoice = "filter",
    tolerance: Tolerance = 0.02,
    max_samples: MaxSamples = 256,
) -> Estimate:
    """Mean training loss under Gaussian noise in the weights (low-pass filter), in nats.

    Args:
        engine: The models.
        sigma: Standard deviation of u.
        metric: What scales the noise.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_samples: The most draws per model.
    """
    spread = sigma * engine.scale(metric)

    def draw(first: int, count: int, active: Tensor) -> Tensor:
        parts = [
            engine.losses_at(spread * engine.vectors("normal", "perturbation", start, size), active)
            for start, size in engine.portions(first, count)
        ]
        return torch.cat(parts)

    control = Control(_expansion(engine, sigma, metric), _WORTHWHILE)
    mean = sample_mean(draw, len(engine), tolerance=tolerance, max_samples=max_samples, control=control)
    products = torch.where(mean.controlled, GRADIENT_PASSES + _LENGTH * PRODUCT_PASSES, 0.0)
    passes = LOSS_PASSES * mean.samples + products
    return Estimate(mean.value, mean.stderr, mean.samples, passes, mean.converged)


def _expansion(engine: Engine, sigma: float, metric: Metric) -> Draw:
    """Return the loss's expansion to second order along the same draws, less its mean."""

    def draw(first: int, count: int, active: Tensor) -> Tensor:
        spaces, slope = krylov(engine, metric), sigma * engine.scale(metric) * engine.gradient()
        length = min(_LENGTH, spaces.capacity)
        spaces.grow(length, active.to(engine.device))
        parts = []
        for start, size in engine.portions(first, count):
            z = engine.vectors("normal", "perturbation", start, size)
            curved = spaces.quadratic(z, length) - spaces.trace(length)
            parts.append((slope * z).sum(dim=2) + 0.5 * sigma**2 * curved)
        return torch.cat(parts)

    return draw
