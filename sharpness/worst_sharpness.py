"""Worst-case adaptive sharpness: how far the loss rises at most within a ball around the weights, in nats.

worst_sharpness = E_B[max_{|u| <= rho} L_B(w + D u) - L_B(w)], the norm L-infinity or L2, B random batches of `batch`
examples; `batch=none` takes the whole set instead. With `metric=element` a weight moves by at most rho |w|. Source:
Andriushchenko, Croce, Mueller, Hein and Flammarion 2023 (S_max); their code takes 20 steps on each of 8
batches of 128, which `radius` is their rho for. With `normalise_logits` as `average_sharpness` has it.

The maximum is searched by Auto-PGD (see `flatmin.sharpness.ascent`), so that every value is a lower bound of it. The
first climb starts from the edge of the ball in the direction of the gradient, further ones from random points.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from flatmin.settings import Setting
from flatmin.sharpness.arguments import (
    ExamplesPerBatch,
    MaxSamples,
    MetricChoice,
    NormaliseLogits,
    Radius,
    Steps,
    Tolerance,
)
from flatmin.sharpness.ascent import Ball, climbs, passes_of_climbs
from flatmin.sharpness.batchwise import by_batch
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Estimate
from flatmin.sharpness.outputs import with_normalised_logits

REFUSES = {
    "subset": "it is taken on random batches already (`batch`), and the maximum over a few examples is another number",
}
"""At a trained tanh network the interval of a subset of a fifth held the whole set's value in 38 of 60 draws."""


def worst_sharpness(
    engine: Engine,
    *,
    radius: Radius = 0.002,
    norm: Annotated[Literal["linf", "l2"], Setting(about="The norm of the ball.")] = "linf",
    metric: MetricChoice = "element",
    normalise_logits: NormaliseLogits = False,
    batch: ExamplesPerBatch = 128,
    steps: Steps = 20,
    restarts: Annotated[int, Setting(about="Climbs, of which the highest counts.", ge=1)] = 1,
    tolerance: Tolerance = 0.02,
    max_samples: MaxSamples = 64,
) -> Estimate:
    """Worst-case adaptive sharpness: largest rise of the training loss in a ball around the weights (lower bound).

    `stderr` holds the standard error of the mean over batches and, as a bound that is none of the maximum, what the
    climbs still gained over the last quarter of their steps. A model that meets a loss that is not finite within the
    ball is undefined. `samples` are batches, or climbs on the whole set.

    Args:
        engine: The models.
        radius: The ball's.
        norm: The ball's.
        metric: What scales the ball.
        normalise_logits: Whether logits are normalised before the loss.
        batch: Examples in a batch; the whole set where it has no more.
        steps: Steps of a climb.
        restarts: Climbs per batch.
        tolerance: Uncertainty at which a model's sampling stops, as a fraction of its value.
        max_samples: The most batches per model.
    """
    ball = Ball(norm, radius)

    def rise(on: Engine) -> tuple[Tensor, Tensor]:
        d = on.scale(metric)
        centre, gradient = on.gradient_at(torch.zeros_like(d))
        found = climbs(on, d, ball, d * gradient, steps, restarts)
        return (found.loss - centre).clamp(min=0.0), found.gain

    return by_batch(
        with_normalised_logits(engine) if normalise_logits else engine,
        batch,
        rise,
        passes=passes_of_climbs(steps, restarts),
        evaluations=restarts,
        tolerance=tolerance,
        max_samples=max_samples,
    )
