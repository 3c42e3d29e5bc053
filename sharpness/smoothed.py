"""The mean loss under Gaussian noise in the weights: the draws that `lpf` and its kin share.

Where plain draws would take long, they are taken in antithetic pairs +-u, whose mean has nothing odd in the noise, and
compared with the curvature u^T D H D u / 2 within a Krylov space, whose mean is known: a control variate. On a narrow
ResNet-18 at sigma = 0.01 the two together save 9 draws of 10, and neither one alone more than 2 of 3 (128 pairs).

Where many examples go with few weights (`Models.strata`), each sixteenth to thirty-second part of them (a stratum p, of
share f_p) has draws of its own:

    E L(w + D u) = E sum f_p L_p(w + D u_p),

so that one pass averages as many draws as there are strata, P, and its variance, sum f_p^2 Var L_p, is up to P times
less than that of one draw for all: 11 times at P = 16 on that network, 13 of pairs, as its strata rise and fall alike.
What is no mean over examples, as `local_entropy`, has the same draws for all. After `low_pass2` of Bisla et al. 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flatmin.sharpness.engine import LOSS_PASSES, PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import (
    FEWEST,
    FEWEST_PAIRS,
    Antithetic,
    Draw,
    Estimate,
    Function,
    Mean,
    controlled_mean,
    sample_mean,
)
from flatmin.sharpness.jackknife import replicates
from flatmin.sharpness.lanczos import krylov, krylov_capacity
from flatmin.sharpness.metric import Metric

OfLoss = Callable[[Tensor, Tensor], Tensor]
"""`of_loss(losses, centre)` changes losses `[S, 1 + P, K]`, given those at w, `[1 + P, K]`: 0 if not asked for."""

_LENGTH, _LENGTH_OF_STRATA = 16, 8
"""Vectors of the control variate's space. With strata 16 leave no less of the spread than 8 do (n = 1), and 8 are what
the trace takes there."""

_WORTHWHILE, _WORTHWHILE_OF_STRATA = 2 * FEWEST_PAIRS - FEWEST, 16
"""Further draws from which on a model takes pairs: as many as the fewest pairs are, and with strata half of what the
products of the control variate cost. They count no more because `lambda_max` and `hessian_trace` need them too."""


def smoothed_mean(
    engine: Engine,
    sigma: float,
    metric: Metric,
    *,
    tolerance: float,
    max_samples: int,
    of_loss: OfLoss | None = None,
    function: Function | None = None,
    above_centre: bool = False,
    paired: bool = True,
) -> Estimate:
    """Average the loss, or a function of it, over L(w + D u) with u ~ N(0, sigma^2 I).

    Args:
        engine: The models.
        sigma: Standard deviation of u.
        metric: What D is.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_samples: The most losses of all examples per model.
        of_loss: What is averaged; by default the losses themselves.
        function: What the value is of the mean; that itself by default.
        above_centre: Whether the loss at w is taken off, which costs it; with `of_loss` that is its matter.
        paired: Whether draws may go on in pairs.
    """
    zero = torch.zeros(1 + engine.parts, len(engine), dtype=torch.float64, device=engine.device)
    centre = losses_at_centre(engine) if above_centre else zero
    known = (-centre if of_loss is None else zero).cpu()
    if engine.strata and of_loss is None and function is None:
        return _mean_over_strata(engine, sigma, metric, known, tolerance, max_samples, above_centre=above_centre)
    taken: dict[float, list[Tensor]] = {1.0: [], -1.0: []}

    def draws(way: float) -> Draw:
        noisy = noisy_losses(engine, sigma, metric, way)

        def draw(first: int, count: int, active: Tensor) -> Tensor:
            losses = noisy(first, count, active)
            made = losses if of_loss is None else of_loss(losses, centre)
            taken[way].append(made.cpu())
            return made[:, 0]

        return draw

    length = min(_LENGTH_OF_STRATA if engine.strata else _LENGTH, krylov_capacity(engine))
    mean = sample_mean(
        draws(1.0),
        len(engine),
        tolerance=tolerance,
        max_samples=max_samples,
        offset=known[0],
        antithetic=Antithetic(draws(-1.0), _curved(engine, metric, length), _WORTHWHILE) if paired else None,
        function=function,
    )
    without = _without(mean, taken, known, function) if engine.parts else None
    passes = _passes(mean, length, above_centre=above_centre)
    return Estimate(mean.value, mean.stderr, mean.samples, passes, mean.converged, without=without)


def _mean_over_strata(
    engine: Engine,
    sigma: float,
    metric: Metric,
    known: Tensor,
    tolerance: float,
    max_samples: int,
    *,
    above_centre: bool,
) -> Estimate:
    """Return what `smoothed_mean` does of the losses themselves, by draws of each stratum's own."""
    length, shares = min(_LENGTH_OF_STRATA, krylov_capacity(engine)), engine.stratum_shares.cpu()
    partner = noisy_losses_of_strata(engine, sigma, metric, -1.0)
    mean = sample_mean(
        noisy_losses_of_strata(engine, sigma, metric, 1.0),
        len(engine),
        tolerance=tolerance,
        max_samples=max_samples,
        offset=known[0],
        antithetic=Antithetic(partner, curved_of_strata(engine, metric, length), _WORTHWHILE_OF_STRATA),
        shares=shares,
    )
    without = known[1:] + of_replicates(engine, mean.of_strata)[1:] if engine.parts else None
    passes = _passes(mean, length, above_centre=above_centre)
    samples = engine.strata * mean.samples
    return Estimate(mean.value, mean.stderr, samples, passes, mean.converged, without=without, draws_in_parts=1)


def _passes(mean: Mean, length: int, *, above_centre: bool) -> Tensor:
    products = torch.where(mean.paired, length * PRODUCT_PASSES, 0.0)
    return LOSS_PASSES * (mean.samples.double() + above_centre) + products


def _without(mean: Mean, taken: Mapping[float, Sequence[Tensor]], known: Tensor, function: Function | None) -> Tensor:
    """Return the value without each part, `[P, K]`, from what was drawn to both sides and a known part `[1 + P, K]`."""
    up = torch.cat(list(taken[1.0]))
    result = torch.full_like(up[0, 1:], torch.nan)
    for count, paired in sorted(set(zip(mean.samples.tolist(), mean.paired.tolist(), strict=True))):
        rows, n = (mean.samples == count) & (mean.paired == paired), count // 2 if paired else count
        if n:
            both = (up[:n] + torch.cat(list(taken[-1.0]))[:n]) / 2 if paired else up[:n]
            average, error = controlled_mean(both, mean.controls[:n])
            made = known + average if function is None else function(known + average, error)[0]
            result[:, rows] = made[1:, rows]
    return result


def above_the_centre(
    engine: Engine, sigma: float, metric: Metric, *, tolerance: float, max_samples: int, absolute: bool = False
) -> tuple[Estimate, Tensor]:
    """Return E L(w + D u) - L(w), its tolerance relative to that difference, and L(w) `[1 + P, K]`, which is exact.

    Args:
        engine: The models.
        sigma: Standard deviation of u.
        metric: What D is.
        tolerance: Standard error at which a model's sampling stops, as a fraction of the difference.
        max_samples: The most losses of all examples per model.
        absolute: Whether every draw's difference counts by its magnitude.
    """
    estimate = smoothed_mean(
        engine,
        sigma,
        metric,
        tolerance=tolerance,
        max_samples=max_samples,
        of_loss=(lambda losses, centre: (losses - centre).abs()) if absolute else None,
        above_centre=True,
        paired=not absolute,
    )
    return estimate, losses_at_centre(engine).cpu()


def losses_at_centre(engine: Engine) -> Tensor:
    """Return the loss at the weights of all examples and, of a subset, of all but each part, `[1 + P, K]`."""

    def losses() -> Tensor:
        if engine.strata:
            return of_replicates(engine, losses_of_strata_at_centre(engine))
        return engine.replicates_at(torch.zeros_like(engine.params)[None])[0] if engine.parts else engine.losses()[None]

    made: Tensor = engine.shared("losses at centre", losses)
    return made


def losses_of_strata_at_centre(engine: Engine) -> Tensor:
    """Return the mean loss of each stratum at the weights, `[P, K]`."""

    def losses() -> Tensor:
        zero = torch.zeros(1, 1, 1, dtype=torch.float64, device=engine.device).expand(
            engine.strata, *engine.params.shape
        )
        return engine.losses_of_strata(zero, range(engine.strata))

    made: Tensor = engine.shared("losses of strata at centre", losses)
    return made


def of_replicates(engine: Engine, of_strata: Tensor) -> Tensor:
    """Return the mean over all examples and, of a subset, over all but each part, `[1 + P, ...]`.

    Args:
        engine: The models.
        of_strata: The means over each stratum, `[P, ...]`.
    """
    shares = engine.stratum_shares.to(of_strata.device)
    made = replicates(shares.reshape(-1, *[1] * (of_strata.dim() - 1)) * of_strata, shares)
    return made if engine.parts else made[:1]


def over(estimate: Estimate, divisor: Tensor) -> Estimate:
    """Return an estimate divided by an exact number; undefined where that is not a finite one above zero.

    Args:
        estimate: Of K models.
        divisor: `[1 + P, K]`: of all examples and, of a subset, of all but each part.
    """
    divisor = torch.where(divisor.isfinite() & (divisor > 0), divisor, torch.nan)
    value, stderr = estimate.value / divisor[0], estimate.stderr / divisor[0]
    without = None if estimate.without is None else estimate.without / divisor[1:]
    converged = estimate.converged & value.isfinite()
    return replace(estimate, value=value, stderr=stderr, converged=converged, without=without)


def noisy_losses(engine: Engine, sigma: float, metric: Metric, way: float = 1.0) -> Draw:
    """Return the losses under the noise, times `way`, as draws; measures that ask for the same ones share them.

    They are `[count, 1 + P, K]`: of all examples and, of a subset, of all but each part.
    """
    spread = way * sigma * engine.scale(metric)

    def losses(first: int, count: int, active: Tensor) -> Tensor:
        parts = [
            engine.replicates_at(spread * engine.vectors("normal", "perturbation", start, size), active)
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


def noisy_losses_of_strata(engine: Engine, sigma: float, metric: Metric, way: float) -> Draw:
    """Return the losses of every stratum under noise of its own, times `way`, as draws `[count, P, K]`."""

    def draw(first: int, count: int, active: Tensor) -> Tensor:
        key = ("noisy losses of strata", sigma, metric, way, first, count, tuple(active.tolist()))
        spread = sigma * engine.scale(metric)
        made: Tensor = engine.shared(key, lambda: displaced_by_stratum(engine, spread, first, count, active, (way,)))
        return made[0]

    return draw


def displaced_by_stratum(
    engine: Engine, spread: Tensor, first: int, count: int, active: Tensor, ways: Sequence[float]
) -> Tensor:
    """Return the loss of every stratum at w + way spread u with draws u of its own, float64 `[W, count, P, K]`.

    Args:
        engine: The models.
        spread: `[K, d]`.
        first: The first draw's number.
        count: How many.
        active: bool `[K]`, the models.
        ways: W factors of the same draws.
    """
    losses: list[list[Tensor]] = [[] for _ in ways]
    for numbers, u in _noise_of_strata(engine, first, count):
        strata = [number % engine.strata for number in numbers]
        for own, way in zip(losses, ways, strict=True):
            own.append(engine.losses_of_strata(way * spread * u, strata, active))
    return torch.stack([torch.cat(own) for own in losses]).reshape(len(ways), count, engine.strata, len(engine))


def curved_of_strata(engine: Engine, metric: Metric, length: int) -> Draw:
    """Return what `_curved` does, along the draws of every stratum, `[count, P, K]`."""

    def draw(first: int, count: int, active: Tensor) -> Tensor:
        spaces = krylov(engine, metric)
        spaces.grow(length, active.to(engine.device))
        mean = spaces.trace(length)
        own = [spaces.quadratic(u, length) - mean for _, u in _noise_of_strata(engine, first, count)]
        return torch.cat(own).reshape(count, engine.strata, len(engine))

    return draw


def _noise_of_strata(engine: Engine, first: int, count: int) -> Iterator[tuple[range, Tensor]]:
    """Yield numbers and vectors `[S, K, d]` of the noise: draw j of stratum p of P is number j P + p."""
    for start, size in engine.portions(first * engine.strata, count * engine.strata):
        yield range(start, start + size), engine.vectors("normal", "perturbation of strata", start, size)
