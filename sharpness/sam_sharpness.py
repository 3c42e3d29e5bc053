"""SAM's sharpness: how far the loss rises within a distance rho of the weights, in nats.

With g = D grad L(w), in the metric D = 1 (SAM) or D = |w| (`metric=element`, ASAM):

    kind=ascent         L(w + rho D g / |g|) - L(w), at the point where SAM takes its gradient
    kind=first_order    rho |g|, its linear prediction
    kind=true           max_{|u| <= rho} L(w + D u) - L(w), searched by Auto-PGD from that point: a lower bound of the
                        maximum, and never below `ascent`

Source: Foret, Kleiner, Mobahi and Neyshabur 2021 (SAM); Kwon, Kim, Park and Choi 2021 (ASAM).

With `batch` it is the mean over random batches of so many examples, the m-sharpness that SAM lowers: near a minimum
of the whole set the gradients of batches are far from zero. The OptML study logged `sam_sharpness(kind=first_order,
metric=element, radius=2, batch=128, label_smoothing=0.1111)` over an epoch (a tenth of the target spread over the other
nine classes is a ninth over all ten), but in train mode, at weights that moved, and divided by one batch too few.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from flatmin.settings import Setting
from flatmin.sharpness.arguments import ExamplesPerBatch, MaxSamples, MetricChoice, Radius, Steps, Tolerance
from flatmin.sharpness.ascent import Ball, climbs, passes_of_climbs
from flatmin.sharpness.batchwise import by_batch
from flatmin.sharpness.engine import GRADIENT_PASSES, LOSS_PASSES, Engine
from flatmin.sharpness.estimate import Estimate

REFUSES = {
    "subset": "near a minimum the gradient of a few examples is mostly sampling noise, and its direction is followed; "
    "with batch= it is taken on random batches",
}
"""At a trained tanh network the interval of a subset of a fifth held the whole set's value in 17 of 60 draws."""


def sam_sharpness(
    engine: Engine,
    *,
    kind: Annotated[
        Literal["ascent", "first_order", "true"],
        Setting(about="The loss at SAM's ascent point, its linear prediction, or the highest in the ball."),
    ] = "ascent",
    radius: Radius = 0.05,
    metric: MetricChoice = "identity",
    batch: ExamplesPerBatch = None,
    steps: Steps = 20,
    tolerance: Tolerance = 0.02,
    max_samples: MaxSamples = 64,
) -> Estimate:
    """Rise of the training loss at a distance from the weights, as SAM and ASAM see it, in nats.

    Exact on the whole set, but for `kind=true`, whose `stderr` is what the climb still gained over the last quarter of
    its steps. With batches it holds the standard error of their mean as well. `ascent` and `true` of a model whose
    gradient is zero are undefined: there is no direction.

    Args:
        engine: The models.
        kind: Which rise.
        radius: rho.
        metric: What scales the gradient and the displacement.
        batch: Examples in a batch; the whole set by default.
        steps: Steps of the climb, for `kind=true`.
        tolerance: Uncertainty at which a model's sampling stops, as a fraction of its value.
        max_samples: The most batches per model.
    """
    ball = Ball("l2", radius)

    def rise(on: Engine) -> tuple[Tensor, Tensor]:
        d = on.scale(metric)
        centre, gradient = on.gradient_at(torch.zeros_like(d))
        length = (d * gradient).norm(dim=1)
        if kind == "first_order":
            return radius * length, torch.zeros_like(length)
        defined = torch.where(length > 0, centre, torch.nan)
        if kind == "true":
            found = climbs(on, d, ball, d * gradient, steps, 1)
            return found.loss - defined, found.gain
        there = on.losses_at((radius * d * ball.steepest(d * gradient))[None])[0]
        return there - defined, torch.zeros_like(length)

    further = {"ascent": GRADIENT_PASSES + LOSS_PASSES, "first_order": GRADIENT_PASSES}
    return by_batch(
        engine,
        batch,
        rise,
        passes=further.get(kind, passes_of_climbs(steps, 1)),
        evaluations=1,
        tolerance=tolerance,
        max_samples=max_samples,
    )
