"""Is there a double descent? Finds the inner peak of a test-error curve and says it in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
    best: Peak | None = None
    for place in range(1, len(rows) - 1):
        left, right = int(np.argmin(mean[:place])), place + 1 + int(np.argmin(mean[place + 1 :]))
        valley = left if mean[left] > mean[right] else right
        height = float(mean[place] - mean[valley])
        if height <= 0 or (best is not None and height <= best.height):
            continue
        best = Peak(
            x=float(rows["x"][place]),
            value=float(mean[place]),
            before=(float(rows["x"][left]), float(mean[left])),
            after=(float(rows["x"][right]), float(mean[right])),
            height=height,
            clear=_clear(rows, place, valley),
        )
    return best


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
