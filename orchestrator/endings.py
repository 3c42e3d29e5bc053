"""When a model will end whose training loss has been seen for a while, and that stops at some loss.

Losses of models that differ in learning rate, momentum or width fall along about one curve, each at its own pace. So a
model ends after now * (end of another) / (when that other's loss was what this one's is now), by the geometric mean
over those that have ended. Where none has, the stopping loss is reached as a power of the epochs or exponentially, at
the pace of the second half of the epochs so far, and the geometric mean of the two is expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

LIKENESS = 1.5
"""How far models that are likened to others may end from where these say."""


@dataclass(frozen=True)
class Curve:
    """The training losses of a model so far.

    Attributes:
        epochs: After how many epochs they were seen, ascending.
        losses: As many.
        ended: Whether the model ended with the last of them.
    """

    epochs: tuple[float, ...]
    losses: tuple[float, ...]
    ended: bool

    def reaches(self, loss: float) -> float | None:
        """Return when the loss was first as low as this, or None; logarithms are interpolated linearly."""
        points = list(zip(self.epochs, self.losses, strict=True))
        for (start, high), (stop, low) in pairwise(points):
            if low <= loss <= high and 0 < low < high < math.inf:
                share = math.log(high / loss) / math.log(high / low)
                return math.exp((1 - share) * math.log(start) + share * math.log(stop))
        return None


@dataclass(frozen=True)
class Ending:
    """After how many epochs a model ends: at least, as it looks, at most."""

    low: float
    expected: float
    high: float


def ending(curve: Curve, stop: float, epochs: int, others: Sequence[Curve] = ()) -> Ending:
    """Return when a model ends.

    Args:
        curve: Its losses so far.
        stop: The loss that ends it, or 0 if none does.
        epochs: The epochs after which it ends at the latest.
        others: Losses of other models.
    """
    if curve.ended or stop == 0:
        end = curve.epochs[-1] if curve.ended else float(epochs)
        return Ending(end, end, end)
    now = curve.epochs[-1] if curve.epochs else 0.0
    likened = [end for other in others for end in _likened(curve, other, stop)]
    if not likened:
        return Ending(now, extrapolated(curve, stop, epochs), float(epochs))
    mean = math.exp(sum(map(math.log, likened)) / len(likened))
    low, expected, high = (
        min(max(end, now), float(epochs)) for end in (min(likened) / LIKENESS, mean, max(likened) * LIKENESS)
    )
    return Ending(low, expected, high)


def _likened(curve: Curve, other: Curve, stop: float) -> Sequence[float]:
    """Return when a model ends if its losses go on as another's did, or nothing where that does not say."""
    if not curve.losses:
        return []
    then, end = other.reaches(curve.losses[-1]), other.reaches(stop)
    return [] if then is None or end is None or end <= then else [curve.epochs[-1] * end / then]


def extrapolated(curve: Curve, stop: float, epochs: int) -> float:
    """Return the epoch at which a loss is expected to reach `stop`, by itself, if not the last one.

    >>> round(extrapolated(Curve((10, 20), (0.1, 0.05), False), 0.025, 100))  # 40 as a power, 30 exponentially
    35
    """
    if len(curve.epochs) < 2:
        return float(epochs)
    now, loss = curve.epochs[-1], curve.losses[-1]
    points = zip(curve.epochs[:-1], curve.losses[:-1], strict=True)
    then, before = min(points, key=lambda point: abs(point[0] - now / 2))
    if not (0 < loss < before < math.inf):
        return float(epochs)
    left, gone = math.log(max(loss / stop, 1.0)), math.log(before / loss)
    as_power = math.log(now) + left * math.log(now / then) / gone
    exponentially = math.log(now + left * (now - then) / gone)
    return math.exp(min((as_power + exponentially) / 2, math.log(epochs)))
