"""Is there a double descent? Finds the inner peak of a test-error curve and says it in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

_CLEAR = 2.0
"""Standard errors that a peak has to stand above the valleys beside it."""


@dataclass(frozen=True)
class Peak:
    """An inner maximum of a curve, between the lowest points on either side.

    Attributes:
        x: The axis value at the peak.
        value: The mean there.
        before: Axis value and mean of the lowest point to the left.
        after: Axis value and mean of the lowest point to the right.
        height: How far the peak stands above the higher of the two.
        clear: The height exceeds two standard errors of that difference; None for single models, without a
            spread.
    """

    x: float
    value: float
    before: tuple[float, float]
    after: tuple[float, float]
    height: float
    clear: bool | None


def find_peak(curve: pd.DataFrame) -> Peak | None:
    """Return the inner point that stands highest above the lowest points on both its sides.

    Args:
        curve: Columns `x`, `mean`, `std` and `n`, one row per x.

    Returns:
        The peak; None when the curve only falls, only rises, or has one valley.

    >>> curve = pd.DataFrame({"x": [1, 2, 3, 4], "mean": [0.5, 0.2, 0.4, 0.1], "std": 0.01, "n": 4})
    >>> find_peak(curve).x
    3.0
    """
    rows = curve.sort_values("x").reset_index(drop=True)
    mean = rows["mean"].to_numpy()
    place, height = _highest(mean)
    if place is None:
        return None
    left, right = int(np.argmin(mean[:place])), place + 1 + int(np.argmin(mean[place + 1 :]))
    return Peak(
        x=float(rows["x"][place]),
        value=float(mean[place]),
        before=(float(rows["x"][left]), float(mean[left])),
        after=(float(rows["x"][right]), float(mean[right])),
        height=height,
        clear=_clear(rows, place, left if mean[left] > mean[right] else right),
    )


def _highest(mean: npt.NDArray[np.float64]) -> tuple[int, float] | tuple[None, float]:
    """The inner point that stands highest above the lowest points on both sides, and how high."""
    if len(mean) < 3:
        return None, 0.0
    before = np.minimum.accumulate(mean)[:-2]
    after = np.minimum.accumulate(mean[::-1])[::-1][2:]
    height = mean[1:-1] - np.maximum(before, after)
    place = int(np.argmax(height))
    return (place + 1, float(height[place])) if height[place] > 0 else (None, 0.0)


@dataclass(frozen=True)
class SeedPeak:
    """The inner peak of a mean curve, with 95 % intervals over seeds.

    Attributes:
        x: The axis value at the peak of the mean over all seeds; None without a peak.
        x_low: Lower end of its interval.
        x_high: Upper end.
        height: How far it stands above the higher of the lowest points beside it.
        height_low: Lower end of the interval of the height; 0 where a curve without a peak is within it.
        height_high: Upper end.
        seeds: Seeds that have every value of the axis, which are resampled.
        found: Share of the resamples that have a peak.
    """

    x: float | None
    x_low: float | None
    x_high: float | None
    height: float | None
    height_low: float | None
    height_high: float | None
    seeds: int
    found: float | None


def peak_over_seeds(curves: pd.DataFrame, *, resamples: int = 1000, seed: int = 0) -> SeedPeak:
    """Find the peak of the mean curve, and how well the seeds fix it.

    Seeds are resampled with replacement, each with its whole curve, and the peak of every resampled mean curve is
    found; the intervals are percentiles (Efron and Tibshirani 1993). They know nothing of values between those of the
    axis.

    Args:
        curves: One row per axis value, one column per seed; a seed with a null is left out.
        resamples: How many resamples.
        seed: Seed of the resampling.

    Returns:
        The peak; without intervals for fewer than two seeds.

    >>> peak_over_seeds(pd.DataFrame({0: [0.5, 0.2, 0.4, 0.1]}, index=[1, 2, 4, 8])).x
    4.0
    """
    whole = curves.sort_index().dropna(axis=1)
    x, values = whole.index.to_numpy(dtype=np.float64), whole.to_numpy(dtype=np.float64)
    seeds = values.shape[1]
    place, height = _highest(values.mean(axis=1)) if seeds else (None, 0.0)
    peak = (None, None) if place is None else (float(x[place]), height)
    if seeds < 2:
        return SeedPeak(peak[0], None, None, peak[1], None, None, seeds, None)
    counts = np.random.default_rng(seed).multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    drawn = [_highest(curve) for curve in counts @ values.T / seeds]
    where = [float(x[one]) for one, _ in drawn if one is not None]
    x_low, x_high = np.quantile(where, [0.025, 0.975], method="nearest") if where else (None, None)
    low, high = np.quantile([tall for _, tall in drawn], [0.025, 0.975])
    return SeedPeak(
        peak[0],
        None if x_low is None else float(x_low),
        None if x_high is None else float(x_high),
        peak[1],
        float(low) if peak[0] is not None else None,
        float(high) if peak[0] is not None else None,
        seeds,
        len(where) / resamples,
    )


def interval_in_words(found: SeedPeak, axis: str) -> str:
    """Say how well the seeds fix a peak.

    Args:
        found: What `peak_over_seeds` returned.
        axis: The setting that is swept.

    Returns:
        A sentence; empty without a peak or an interval.
    """
    if found.x is None or found.x_low is None or found.height_low is None:
        return ""
    return (
        f"Over {found.seeds} seeds the peak lies at {axis} {found.x:g} [{found.x_low:g}, {found.x_high:g}] and stands "
        f"{found.height:.3g} [{found.height_low:.3g}, {found.height_high:.3g}] above the higher minimum beside it."
    )


def _clear(rows: pd.DataFrame, place: int, valley: int) -> bool | None:
    spread = rows["std"] / np.sqrt(rows["n"])
    error = float(np.hypot(spread[place], spread[valley]))
    if np.isnan(error):
        return None
    return bool(rows["mean"][place] - rows["mean"][valley] > _CLEAR * error)


def sentence(curve: pd.DataFrame) -> str:
    """Say what a test-error curve does along its axis.

    Args:
        curve: The rows of one line of the figure against an axis: columns `axis`, `quantity`, `x`, `mean`,
            `std`, `n`.

    Returns:
        One or two sentences with the numbers; empty for fewer than three points.
    """
    if len(curve) < 3:
        return ""
    rows = curve.sort_values("x")
    axis, what = str(rows["axis"].iloc[0]), str(rows["quantity"].iloc[0]).replace("_", " ").capitalize()
    models = int(rows["n"].min())
    more = "" if models == rows["n"].max() else " or more"
    each = f"{models} model{'s' if models > 1 else ''}{more} at each {axis}"
    peak = find_peak(rows)
    if peak is None or peak.clear is False:
        low = rows.iloc[int(np.argmin(rows["mean"].to_numpy()))]
        first, last = rows.iloc[0], rows.iloc[-1]
        return (
            f"{what} goes from {first['mean']:.3g} at {axis} {first['x']:g} to {last['mean']:.3g} at {axis} "
            f"{last['x']:g}, lowest at {low['x']:g} (mean {low['mean']:.3g}; {each}); no peak in between "
            "stands clear of the spread."
        )
    words = (
        f"{what} peaks at {axis} {peak.x:g} (mean {peak.value:.3g}): it has a first minimum of "
        f"{peak.before[1]:.3g} at {axis} {peak.before[0]:g}, and falls again to {peak.after[1]:.3g} at "
        f"{axis} {peak.after[0]:g} ({each})."
    )
    if peak.clear is None:
        words += " There is one model per value, so the spread is unknown."
    return words
