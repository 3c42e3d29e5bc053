"""What a measure returns, and the sampling that stops when each model's value is known well enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FEWEST = 16
"""Samples that every mean takes first; with strata see `fewest`."""

FEWEST_PAIRS = 32
"""Pairs before a mean of them may stop: a slope fitted to fewer, of long tails, makes their spread look small."""

_ROUND = 8


@dataclass(frozen=True)
class Curve:
    """Points of a curve or a surface of K models, for the table `spectra/`.

    Attributes:
        kind: `hessian_density`, `surface`, `fourier`, ...
        x: Where the points are, float64 `[K, P]`; NaN where a model has no such point.
        value: What is there, `[K, P]`.
        y: Where they are along a surface's second axis, `[K, P]`.
        settings: What tells the curve from others of its kind, beside the measure's label and arguments.
    """

    kind: str
    x: Tensor
    value: Tensor
    y: Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """One measure of K models.

    Attributes:
        value: The measure, float64 `[K]`; NaN where it is undefined.
        stderr: Its uncertainty in the same unit, float64 `[K]`: a standard error where the value is a mean of
            random draws, an error bound where it comes from an iteration, 0 where it is exact.
        samples: Draws, steps or evaluations that the value rests on, int64 `[K]`.
        passes: Passes over the set of examples that the value rests on, float64 `[K]`, in the units of
            `flatmin.sharpness.engine`. Work shared with another measure counts in full for both, so
            that a value's cost does not depend on what else was measured.
        converged: Whether the tolerance was met, bool `[K]`; never where the value is undefined.
        curves: What the measure found beside its value.
        without: Of a subset, the value without each of its parts (`flatmin.sharpness.jackknife`), `[P, K]`; None
            where a measure does not tell.
        draws_in_parts: How many times what random draws add to the error is in the spread of `without` as well: not at
            all where all parts share their draws, once where each has its own, twice where each draw is of two.
    """

    value: Tensor
    stderr: Tensor
    samples: Tensor
    passes: Tensor
    converged: Tensor
    curves: Sequence[Curve] = ()
    without: Tensor | None = None
    draws_in_parts: int = 0


def exact(value: Tensor, *, passes: float, samples: int = 1, without: Tensor | None = None) -> Estimate:
    """Return an estimate without an error, converged where it is finite.

    Args:
        value: `[K]`; what is not finite counts as undefined.
        passes: What it cost.
        samples: The evaluations that it rests on.
        without: Of a subset, the value without each part, `[P, K]`.
    """
    value = torch.where(value.isfinite(), value.double(), torch.nan)
    return Estimate(
        value,
        torch.where(value.isfinite(), 0.0, torch.nan).double(),
        torch.full(value.shape, samples, dtype=torch.int64),
        torch.full(value.shape, passes, dtype=torch.float64),
        value.isfinite(),
        without=without,
    )


def exact_by_part(values: Tensor, *, passes: float, samples: int = 1) -> Estimate:
    """Return an exact estimate from a value and, of a subset, those without each part, `[1 + P, K]`."""
    values = values.cpu()
    return exact(values[0], passes=passes, samples=samples, without=values[1:] if len(values) > 1 else None)


Draw = Callable[[int, int, Tensor], Tensor]
"""`draw(first, count, active)` returns samples `first .. first + count - 1` of the models, float64 `[count, K]`, or of
every stratum `[count, P, K]`; those of models that are not active, bool `[K]`, may be anything."""


Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""`function(mean, stderr)` returns a function of a mean and its standard error (delta method), each `[K]`."""


@dataclass(frozen=True)
class Antithetic:
    """How samples become means of antithetic pairs, compared with a control variate.

    Attributes:
        partner: The sample at the opposite displacement.
        control: A number of mean zero that varies with the mean of both.
        price: How many further samples that must save to be worth its cost.
    """

    partner: Draw
    control: Draw
    price: float


@dataclass(frozen=True)
class Mean:
    """The result of `sample_mean`, each `[K]`; the meanings are those of `Estimate`.

    Attributes:
        value: offset + mean, or the function of it that was asked for.
        stderr: Its standard error.
        samples: Samples taken, two to a pair.
        converged: Whether the tolerance was met.
        paired: Which models went on with pairs.
        controls: The control of every sample, `[n, P, K]`; 0 where there is none.
        of_strata: The means of the strata without the offset, `[P, K]`.
    """

    value: Tensor
    stderr: Tensor
    samples: Tensor
    converged: Tensor
    paired: Tensor
    controls: Tensor
    of_strata: Tensor


def sample_mean(
    draw: Draw,
    models: int,
    *,
    tolerance: float,
    max_samples: int,
    offset: Tensor | None = None,
    antithetic: Antithetic | None = None,
    function: Function | None = None,
    shares: Tensor | None = None,
) -> Mean:
    """Average samples until each model's relative standard error is below the tolerance.

    A model stops at its own time, after 16 samples at the earliest, so that its result does not depend on its
    neighbours. One with a sample that is not finite stops at once and is undefined. After 16 samples a model
    whose plain mean would need more further ones than the price of pairs goes on with pairs, those 16 included, and
    takes 32 of them at the earliest. Where a sample is one of each stratum, as few will do as tell as much: `fewest`.

    Args:
        draw: Where the samples come from.
        models: K.
        tolerance: The standard error at which to stop, as a fraction of |value|.
        max_samples: The most samples per model.
        offset: A known part of the value, float64 `[K]`: the value is offset + mean.
        antithetic: How to reduce the variance.
        function: What the value is of offset + mean; that itself by default. The tolerance is that of the value.
        shares: The weights of the strata in the mean, `[P]`; one stratum by default.
    """
    known = torch.zeros(models, dtype=torch.float64) if offset is None else offset.cpu()
    weights = torch.ones(1, dtype=torch.float64) if shares is None else shares.cpu()
    least, least_pairs = fewest(FEWEST, len(weights)), fewest(FEWEST_PAIRS, len(weights))
    ys = torch.zeros(0, len(weights), models, dtype=torch.float64)
    xs, of_strata = ys, torch.full_like(ys.sum(dim=0), math.nan)
    value, stderr = torch.full_like(known, math.nan), torch.full_like(known, math.nan)
    samples = torch.zeros(models, dtype=torch.int64)
    converged, paired = (torch.zeros(models, dtype=torch.bool) for _ in range(2))
    active, done = known.isfinite(), 0
    while bool(active.any()):
        new = slice(done, min(done + (-(-_ROUND // len(weights)) if done >= least else least), max_samples))
        drawn = draw(new.start, new.stop - new.start, active).cpu().reshape(-1, len(weights), models)
        ys, xs, done = torch.cat([ys, drawn]), torch.cat([xs, torch.zeros_like(drawn)]), new.stop
        _pair(ys, xs, new, antithetic, paired & active)
        parts, mean, error = _summary(ys, xs, weights, known, function)
        if antithetic is not None and done == least:
            needed = done * (error / (tolerance * mean)).square()
            paired = active & (needed.clamp(max=max_samples) - done > antithetic.price)
            _pair(ys, xs, slice(0, done), antithetic, paired)
            parts, mean, error = _summary(ys, xs, weights, known, function)
        value, stderr = torch.where(active, mean, value), torch.where(active, error, stderr)
        of_strata = torch.where(active, parts, of_strata)
        samples = torch.where(active, torch.where(paired, 2 * done, done), samples)
        enough = done >= torch.where(paired, least_pairs, least)
        converged |= active & (stderr <= tolerance * value.abs()) & enough
        most = torch.where(paired, max_samples // 2, max_samples)
        active = active & ~converged & value.isfinite() & (done < most)
    undefined = ~value.isfinite()
    value, stderr = value.masked_fill(undefined, math.nan), stderr.masked_fill(undefined, math.nan)
    return Mean(value, stderr, samples, converged, paired, xs, of_strata)


def fewest(draws: int, strata: int) -> int:
    """Return how many draws of each stratum tell as much of their spread as so many of one: P (n - 1) >= draws - 1.

    >>> fewest(16, 1), fewest(16, 16), fewest(32, 16)
    (16, 2, 3)
    """
    return 1 - (1 - draws) // strata


def _summary(
    ys: Tensor, xs: Tensor, shares: Tensor, known: Tensor, function: Function | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the strata's means `[P, K]`, the value and its standard error, `[K]`, after some samples."""
    of_strata, stderr = stratified_mean(ys, xs, shares)
    mean = known + (shares[:, None] * of_strata).sum(dim=0)
    return (of_strata, mean, stderr) if function is None else (of_strata, *function(mean, stderr))


def _pair(ys: Tensor, xs: Tensor, rows: slice, antithetic: Antithetic | None, paired: Tensor) -> None:
    """Make samples of some models, bool `[K]`, the means of pairs, and note their controls."""
    if antithetic is not None and bool(paired.any()):
        first, count = rows.start, rows.stop - rows.start
        partners = antithetic.partner(first, count, paired).cpu().reshape(ys[rows].shape)
        controls = antithetic.control(first, count, paired).cpu().reshape(ys[rows].shape)
        ys[rows] = torch.where(paired, (ys[rows] + partners) / 2, ys[rows])
        xs[rows] = torch.where(paired, controls, xs[rows])


def controlled_mean(ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of y and its standard error, `[..., K]`, given samples `[n, ..., K]` and controls of mean zero.

    Each sample is corrected by a slope that is fitted to the others, so that the mean stays unbiased, at the price of a
    degree of freedom; without controls the slope is zero.
    """
    mean, stderr = stratified_mean(ys[:, None], xs[:, None], torch.ones(1).to(ys))
    return mean[0], stderr


def stratified_mean(ys: Tensor, xs: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means of y in strata, `[P, ..., K]`, and the standard error of sum f_p mean_p, `[..., K]`.

    With n independent samples of each stratum its variance is sum f_p^2 s_p^2 / n, of P (n - 1) degrees of freedom. The
    slope of the controls is one for all strata, fitted to deviations from their means; see `controlled_mean`.

    Args:
        ys: `[n, P, ..., K]`.
        xs: Controls of mean zero in the same shape, or one that broadcasts to it.
        shares: f, `[P]`.
    """
    n, strata = ys.shape[:2]
    if n < 2:
        return ys.mean(dim=0), torch.full_like(ys[0, 0], math.nan)
    f = shares.reshape(-1, *[1] * (ys.dim() - 2))
    dx, dy = f * (xs - xs.mean(dim=0)), f * (ys - ys.mean(dim=0))
    left_out = n / (n - 1)
    xx = dx.square().sum(dim=(0, 1)) - left_out * dx.square()
    xy = (dx * dy).sum(dim=(0, 1)) - left_out * dx * dy
    corrected = ys - xs * torch.where(xx > 0, xy / xx, 0.0)
    mean = corrected.mean(dim=0)
    free = strata * (n - 1)
    lost = torch.where((xs != 0).flatten(0, 1).any(dim=0), free / max(1, free - 1), 1.0)
    return mean, ((f * (corrected - mean)).square().sum(dim=(0, 1)) / (n * (n - 1)) * lost).sqrt()
