"""LPF: the training loss seen through a Gaussian low-pass filter.

lpf = E_u[L(w + D u)] with u ~ N(0, sigma^2 I), in nats; L(w) is not subtracted. Source: Bisla, Wang and
Choromanska 2022, section 3; they average 100 draws on the balanced network, with sigma = 0.01 (section 3) or
0.002 (comparison of optimizers).

Here draws are averaged until the standard error is a small part of the value; see `flatmin.sharpness.smoothed`.
"""

from __future__ import annotations

from flatmin.sharpness.arguments import MaxSamples, MetricChoice, Sigma, Tolerance
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Estimate
from flatmin.sharpness.smoothed import smoothed_mean


def lpf(
    engine: Engine,
    *,
    sigma: Sigma = 0.01,
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
        max_samples: The most losses of all examples per model.
    """
    return smoothed_mean(engine, sigma, metric, tolerance=tolerance, max_samples=max_samples)
