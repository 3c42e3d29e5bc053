"""The bootstrap over configurations: draws, percentile intervals, p-values, and seeds that an interval would need.

A resample draws as many configurations as there are, with replacement; the seeds of a configuration come along, never
alone, for they are no independent evidence (Efron and Tibshirani 1993, chapter 8: resample the independent units).
Of a large table a random part is resampled instead, and the spread scaled by sqrt(part / all).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flatmin.analysis.configurations import Configurations, Floats, Ints

MOST_CONFIGURATIONS = 6000
"""Statistics over pairs of configurations take a random part of this size of a larger table."""

FEWEST_CONFIGURATIONS = 5
"""Fewer configurations than this are ranked alike by chance alone in more than 1 of 20 tables, whatever is drawn."""

_MOST_SEED_DRAWS = 5


@dataclass(frozen=True)
class Resamples:
    """How often each configuration comes in each resample.

    Attributes:
        counts: Shape `(resamples, part)`, each row with sum `part`.
        part: The configurations that are resampled, shape `(part,)`.
        shrink: sqrt(part / all): how much narrower the interval of all configurations is.
    """

    counts: npt.NDArray[np.float32]
    part: Ints
    shrink: float


def part_of(configurations: int) -> Ints:
    """Choose the configurations that stand for all where there are too many: all, or a random part.

    Args:
        configurations: How many there are.
    """
    if configurations <= MOST_CONFIGURATIONS:
        return np.arange(configurations)
    return np.sort(np.random.default_rng(0).choice(configurations, MOST_CONFIGURATIONS, replace=False))


def draw(configurations: int, resamples: int, seed: int) -> Resamples:
    """Draw resamples of configurations.

    Args:
        configurations: How many there are.
        resamples: How many resamples.
        seed: Seed of the draws.
    """
    part = part_of(configurations)
    size = len(part)
    counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / max(size, 1)), size=resamples)
    return Resamples(counts.astype(np.float32), part, math.sqrt(size / max(configurations, 1)))


def interval(value: float, drawn: Floats, centre: float, shrink: float) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % percentile interval of a statistic.

    Args:
        value: The statistic of all configurations.
        drawn: The statistic of every resample, NaN where undefined, shape `(resamples,)`.
        centre: The statistic of the part that was resampled; `value` where that is all.
        shrink: `Resamples.shrink`.

    Returns:
        Lower and upper end; None without a value or without resamples.
    """
    known = drawn[np.isfinite(drawn)]
    if not math.isfinite(centre) or not len(known):
        return None, None
    low, high = np.quantile(known, [0.025, 0.975])
    if shrink == 1:
        return float(low), float(high)
    return float(value + (low - centre) * shrink), float(value + (high - centre) * shrink)


def p_value(value: float, drawn: Floats, centre: float, shrink: float) -> float | None:
    """Return the two-sided p-value of a statistic being zero: twice the share of resamples beyond zero.

    It is below 0.05 where the 95 % interval is clear of zero. The observed value counts as one resample, so that p is
    at least 2 / (resamples + 1) (Davison and Hinkley 1997, section 4.2).

    Args:
        value: The statistic of all configurations.
        drawn: The statistic of every resample, NaN where undefined, shape `(resamples,)`.
        centre: The statistic of the part that was resampled.
        shrink: `Resamples.shrink`.

    Returns:
        From 2 / (resamples + 1) to 1; None without resamples.

    >>> p_value(0.3, np.full(999, 0.3), 0.3, 1.0)
    0.002
    """
    known = drawn[np.isfinite(drawn)]
    if not math.isfinite(centre) or not len(known):
        return None
    moved = known if shrink == 1 else value + (known - centre) * shrink
    beyond = min(int((moved <= 0).sum()), int((moved >= 0).sum()))
    return min(1.0, 2 * (beyond + 1) / (len(known) + 1))


def seeds_to_halve(
    configurations: Configurations,
    x: Floats,
    y: Floats,
    statistic: Callable[[Floats, Floats], Floats],
) -> float | None:
    """Estimate how many seeds each configuration would need for an interval half as wide.

    The variance of the statistic is taken as A + B / seeds. A, from the choice of configurations, stays; both follow
    from the bootstrap variance with all seeds and that with one seed per configuration. A quarter of the variance is
    reached at B / (variance / 4 - A) seeds; where A alone is more than that quarter, no number of seeds is enough.

    Args:
        configurations: Which row belongs to which configuration.
        x: One value per row.
        y: One value per row.
        statistic: Gives the statistic of every resample from one x and one y per configuration; the same resamples at
            each call, so that the variances are paired.

    Returns:
        The number of seeds; infinity where seeds alone cannot; None where a configuration has one row only, or fewer
        than five configurations have several.
    """
    sizes = configurations.sizes
    if len(sizes) < FEWEST_CONFIGURATIONS or sizes.min() < 2:
        return None
    now = _variance(statistic(configurations.means(x), configurations.means(y)))
    table = configurations.seeds(_MOST_SEED_DRAWS)
    every = np.arange(len(sizes))
    single = []
    for place in range(min(int(sizes.max()), _MOST_SEED_DRAWS)):
        rows = table[every, place % sizes]
        single.append(_variance(statistic(x[rows], y[rows])))
    seeds = len(sizes) / float((1 / sizes).sum())
    noise = (float(np.mean(single)) - now) / (1 - 1 / seeds)
    fixed = now - noise / seeds
    if not math.isfinite(noise) or now <= 0:
        return None
    if noise <= 0 or now / 4 <= fixed:
        return math.inf
    return noise / (now / 4 - fixed)


def _variance(drawn: Floats) -> float:
    known = drawn[np.isfinite(drawn)]
    return float(np.var(known, ddof=1)) if len(known) > 1 else math.nan
