"""Average-case adaptive sharpness: how far the loss rises under noise in proportion to every weight, in nats.

average_sharpness = E[L(w + delta)] - L(w), delta ~ N(0, rho^2 diag(c^2)), with c = |w| in the default metric
`element`, and c = 1 in `identity`; `sigma` is their rho. Source: Andriushchenko, Croce, Mueller, Hein and Flammarion
2023 (S_avg). They take 20 draws on each of 8 batches of 128 examples; the mean over batches is the
value of their union, so that here the whole set is taken (`subset=1024` for theirs).

With `normalise_logits` the loss is that of logits less their mean over the classes and divided by their norm (at least
1e-10), as in that paper's code, so that a network cannot seem sharp because its logits are large.

With `element` and ReLU networks it does not change when a unit's incoming weights grow and its outgoing ones shrink.
"""

from __future__ import annotations

from flatmin.sharpness.arguments import MaxSamples, MetricChoice, NormaliseLogits, Sigma, Tolerance
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Estimate
from flatmin.sharpness.outputs import with_normalised_logits
from flatmin.sharpness.smoothed import above_the_centre


def average_sharpness(
    engine: Engine,
    *,
    sigma: Sigma = 0.1,
    metric: MetricChoice = "element",
    normalise_logits: NormaliseLogits = False,
    tolerance: Tolerance = 0.02,
    max_samples: MaxSamples = 1024,
) -> Estimate:
    """Average-case adaptive sharpness: mean rise of the training loss under noise in proportion to the weights.

    Args:
        engine: The models.
        sigma: Standard deviation of the noise, rho in the paper.
        metric: What scales the noise.
        normalise_logits: Whether logits are normalised before the loss.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_samples: The most losses of all examples per model.
    """
    chosen = with_normalised_logits(engine) if normalise_logits else engine
    return above_the_centre(chosen, sigma, metric, tolerance=tolerance, max_samples=max_samples)[0]
