"""Relative LPF: how far the loss rises under Gaussian noise in the weights, as a fraction of the loss.

lpf_relative = (E_u[L(w + D u)] - L(w)) / L(w) with u ~ N(0, sigma^2 I): a pure number. The loss at the centre is
exact, so that the standard error is that of the rise divided by it. Undefined where that loss is not positive, and
large without meaning where it is tiny: a model trained to 1e-6 nats is not a thousand times sharper than one at 1e-3.

The code of Bisla et al. 2022 holds a variant as `low_pass2` that it never calls, the mean of |L(w + D u) - L(w)| /
L(w); `absolute=true` is that one. It counts the part that is linear in the noise, which the mean of differences does
not.
"""

from __future__ import annotations

from typing import Annotated

from flatmin.settings import Setting
from flatmin.sharpness.arguments import MaxSamples, MetricChoice, Sigma, Tolerance
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Estimate
from flatmin.sharpness.smoothed import above_the_centre, over


def lpf_relative(
    engine: Engine,
    *,
    sigma: Sigma = 0.01,
    metric: MetricChoice = "filter",
    absolute: Annotated[bool, Setting(about="Whether every draw's change counts by its magnitude.")] = False,
    tolerance: Tolerance = 0.02,
    max_samples: MaxSamples = 1024,
) -> Estimate:
    """Mean rise of the training loss under Gaussian noise in the weights, as a fraction of the loss.

    Args:
        engine: The models.
        sigma: Standard deviation of u.
        metric: What scales the noise.
        absolute: Whether every draw's change counts by its magnitude, as in `low_pass2` of the published code.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_samples: The most losses of all examples per model.
    """
    rise, centre = above_the_centre(
        engine, sigma, metric, tolerance=tolerance, max_samples=max_samples, absolute=absolute
    )
    return over(rise, centre)
