"""The mean loss under Gaussian noise in the weights: the draws that `lpf` and its kin share.

Where plain draws would take long, the loss is compared with its second-order expansion within a Krylov space, whose
mean is known: a control variate, which at sigma = 0.01 on networks trained to fit noisy labels saves four draws of
five. It takes out what antithetic pairs would, the part that is linear in the noise, and the curvature too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flatmin.sharpness.engine import GRADIENT_PASSES, LOSS_PASSES, PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import Control, Draw, Estimate, Function, sample_mean
from flatmin.sharpness.lanczos import krylov
from flatmin.sharpness.metric import Metric

_LENGTH = 16
_WORTHWHILE = 16
"""Further draws from which on a model takes the control variate. Its products cost about three times as much,
but `lambda_max` and `hessian_trace` need them too."""


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
    controlled: bool = True,
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
        controlled: Whether the control variate may be taken.
        further_passes: What the caller has spent.
    """
    control = Control(_expansion(engine, sigma, metric), _WORTHWHILE) if controlled else None
    losses = noisy_losses(engine, sigma, metric)

    def draw(first: int, count: int, active: Tensor) -> Tensor:
        drawn = losses(first, count, active)
        return drawn if of_loss is None else of_loss(drawn)

    mean = sample_mean(
        draw,
        len(engine),
        tolerance=tolerance,
        max_samples=max_samples,
        offset=offset,
        control=control,
        function=function,
    )
    products = torch.where(mean.controlled, GRADIENT_PASSES + _LENGTH * PRODUCT_PASSES, 0.0)
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
        controlled=not absolute,
        further_passes=LOSS_PASSES,
    )
    return estimate, centre.cpu()


def over(estimate: Estimate, divisor: Tensor) -> Estimate:
    """Return an estimate divided by an exact number `[K]`; undefined where that is not a finite one above zero."""
    divisor = torch.where(divisor.isfinite() & (divisor > 0), divisor, torch.nan)
    value, stderr = estimate.value / divisor, estimate.stderr / divisor
    return replace(estimate, value=value, stderr=stderr, converged=estimate.converged & value.isfinite())


def noisy_losses(engine: Engine, sigma: float, metric: Metric) -> Draw:
    """Return the losses under the noise as draws; measures that ask for the same ones share them."""
    spread = sigma * engine.scale(metric)

    def losses(first: int, count: int, active: Tensor) -> Tensor:
        parts = [
            engine.losses_at(spread * engine.vectors("normal", "perturbation", start, size), active)
            for start, size in engine.portions(first, count)
        ]
        return torch.cat(parts)

    def draw(first: int, count: int, active: Tensor) -> Tensor:
        # Which models are asked for together is part of the key: it may change the last bit of their losses.
        key = ("noisy losses", sigma, metric, first, count, tuple(active.tolist()))
        made: Tensor = engine.shared(key, lambda: losses(first, count, active))
        return made

    return draw


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
