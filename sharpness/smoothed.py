"""The mean loss under Gaussian noise in the weights: the draws that `lpf` and its kin share.

Where plain draws would take long, they are taken in antithetic pairs +-u, whose mean has nothing odd in the noise, and
compared with the curvature u^T D H D u / 2 within a Krylov space, whose mean is known: a control variate. On a narrow
ResNet-18 at sigma = 0.01 the two together save 9 draws of 10, and neither one alone more than 2 of 3 (128 pairs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flatmin.sharpness.engine import LOSS_PASSES, PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import FEWEST, FEWEST_PAIRS, Antithetic, Draw, Estimate, Function, sample_mean
from flatmin.sharpness.lanczos import krylov, krylov_capacity
from flatmin.sharpness.metric import Metric

_LENGTH = 16
_WORTHWHILE = 2 * FEWEST_PAIRS - FEWEST
"""Further draws from which on a model takes pairs, as many as the fewest pairs are. The products of the control variate
are not counted, for `lambda_max` and `hessian_trace` need them too."""


def smoothed_mean(
    engine: Engine,
    sigma: float,
    metric: Metric,
    *,
    tolerance: float,
    max_samples: int,
    of_loss: Callable[[Tensor], Tensor] | None = None,
    offset: Tensor | None = None,
    function: Function | None = None,
    paired: bool = True,
    further_passes: float = 0.0,
) -> Estimate:
    """Average a function of L(w + D u) over u ~ N(0, sigma^2 I).

    Args:
        engine: The models.
        sigma: Standard deviation of u.
        metric: What D is.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_samples: The most draws per model.
        of_loss: What is averaged, from losses `[S, K]` to numbers `[S, K]`; the losses themselves by default.
        offset: Added to the mean, float64 `[K]`.
        function: What the value is of offset + mean; that itself by default.
        paired: Whether draws may go on in pairs.
        further_passes: What the caller has spent.
    """
    length = min(_LENGTH, krylov_capacity(engine))

    def losses(way: float) -> Draw:
        drawn = noisy_losses(engine, sigma, metric, way)
        return drawn if of_loss is None else lambda *which: of_loss(drawn(*which))

    mean = sample_mean(
        losses(1.0),
        len(engine),
        tolerance=tolerance,
        max_samples=max_samples,
        offset=offset,
        antithetic=Antithetic(losses(-1.0), _curved(engine, metric, length), _WORTHWHILE) if paired else None,
        function=function,
    )
    products = torch.where(mean.paired, length * PRODUCT_PASSES, 0.0)
    passes = LOSS_PASSES * mean.samples.double() + products + further_passes
    return Estimate(mean.value, mean.stderr, mean.samples, passes, mean.converged)


def above_the_centre(
    engine: Engine, sigma: float, metric: Metric, *, tolerance: float, max_samples: int, absolute: bool = False
) -> tuple[Estimate, Tensor]:
    """Return E L(w + D u) - L(w), its tolerance relative to that difference, and L(w) `[K]`, which is exact.

    Args:
        engine: The models.
        sigma: Standard deviation of u.
        metric: What D is.
        tolerance: Standard error at which a model's sampling stops, as a fraction of the difference.
        max_samples: The most draws per model.
        absolute: Whether every draw's difference counts by its magnitude.
    """
    centre = engine.losses()
    estimate = smoothed_mean(
        engine,
        sigma,
        metric,
        tolerance=tolerance,
        max_samples=max_samples,
        of_loss=(lambda losses: (losses - centre).abs()) if absolute else None,
        offset=None if absolute else -centre,
        paired=not absolute,
        further_passes=LOSS_PASSES,
    )
    return estimate, centre.cpu()


def over(estimate: Estimate, divisor: Tensor) -> Estimate:
    """Return an estimate divided by an exact number `[K]`; undefined where that is not a finite one above zero."""
    divisor = torch.where(divisor.isfinite() & (divisor > 0), divisor, torch.nan)
    value, stderr = estimate.value / divisor, estimate.stderr / divisor
    return replace(estimate, value=value, stderr=stderr, converged=estimate.converged & value.isfinite())


def noisy_losses(engine: Engine, sigma: float, metric: Metric, way: float = 1.0) -> Draw:
    """Return the losses under the noise, times `way`, as draws; measures that ask for the same ones share them."""
    spread = way * sigma * engine.scale(metric)

    def losses(first: int, count: int, active: Tensor) -> Tensor:
        parts = [
            engine.losses_at(spread * engine.vectors("normal", "perturbation", start, size), active)
            for start, size in engine.portions(first, count)
        ]
        return torch.cat(parts)

    def draw(first: int, count: int, active: Tensor) -> Tensor:
        # Which models are asked for together is part of the key: it may change the last bit of their losses.
        key = ("noisy losses", sigma, metric, way, first, count, tuple(active.tolist()))
        made: Tensor = engine.shared(key, lambda: losses(first, count, active))
        return made

    return draw


def _curved(engine: Engine, metric: Metric, length: int) -> Draw:
    """Return z^T A z along the same draws within the Krylov space of A = D H D, less its mean."""

    def draw(first: int, count: int, active: Tensor) -> Tensor:
        spaces = krylov(engine, metric)
        spaces.grow(length, active.to(engine.device))
        parts = [
            spaces.quadratic(engine.vectors("normal", "perturbation", start, size), length) - spaces.trace(length)
            for start, size in engine.portions(first, count)
        ]
        return torch.cat(parts)

    return draw
