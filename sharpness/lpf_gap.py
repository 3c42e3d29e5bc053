"""LPF gap: how far the loss rises under Gaussian noise in the weights, in nats.

lpf_gap = E_u[L(w + D u)] - L(w) with u ~ N(0, sigma^2 I): `lpf` (Bisla, Wang and Choromanska 2022, section 3) less
the loss at the centre, which they do not subtract; about sigma^2 tr(D H D) / 2 at a small sigma. The draws are those
of `lpf`. Where it is much smaller than the loss it needs more of them, because the tolerance is relative to the gap.
It may be negative away from a minimum, and near zero it does not converge.
"""

from __future__ import annotations

from flatmin.sharpness.arguments import MaxSamples, MetricChoice, Sigma, Tolerance
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Estimate
from flatmin.sharpness.smoothed import above_the_centre


def lpf_gap(
    engine: Engine,
    *,
    sigma: Sigma = 0.01,
    metric: MetricChoice = "filter",
    tolerance: Tolerance = 0.02,
    max_samples: MaxSamples = 1024,
) -> Estimate:
    """Mean rise of the training loss under Gaussian noise in the weights, in nats.

    Args:
        engine: The models.
        sigma: Standard deviation of u.
        metric: What scales the noise.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_samples: The most losses of all examples per model.
    """
    return above_the_centre(engine, sigma, metric, tolerance=tolerance, max_samples=max_samples)[0]
