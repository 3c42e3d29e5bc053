r"""Kendall's rank correlation, tau-b, and its bootstrap over configurations.

.. math:: \tau_b = \frac{\sum_{i<j} \mathrm{sign}(x_i - x_j)\,\mathrm{sign}(y_i - y_j)}{\sqrt{n_x n_y}}

where :math:`n_x` is the number of pairs that are not tied in x. Kendall 1945, "The treatment of ties in
ranking problems", Biometrika 33(3).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]

_BLOCK = 512
_WORK = 2.5e10  # resamples x configurations^2: a few seconds per measure on two cores
_FEWEST = 200  # resamples below which the ends of a 95 % interval are mostly noise


def tau_b(x: Floats, y: Floats) -> float:
    """Return Kendall's tau-b of two samples.

    Args:
        x: Finite values, shape `(n,)`.
        y: Finite values, shape `(n,)`.

    Returns:
        A number in [-1, 1]; NaN where it is undefined (fewer than two values, or one side constant).

    >>> round(tau_b(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])), 6)
    0.333333
    """
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(stats.kendalltau(x, y).statistic)


def affordable(configurations: int, resamples: int) -> int:
    """Return how many resamples `bootstrap_tau` can do in seconds: all, up to 5,000 configurations.

    Args:
        configurations: Number of points.
        resamples: Number wanted.

    Returns:
        A number from 200 to `resamples`, or `resamples` where that is smaller.
    """
    return min(resamples, max(_FEWEST, int(_WORK / max(1, configurations) ** 2)))


def bootstrap_tau(x: Floats, y: Floats, *, resamples: int, rng: np.random.Generator) -> Floats:
    """Return tau-b of resampled points, drawn with replacement.

    A resample is a vector w of how often each point was drawn. With the matrix A of pair signs,
    tau-b needs only w'Aw and the counts of each distinct value, so that all resamples share one matrix
    product.

    Args:
        x: One finite value per configuration, shape `(m,)`.
        y: One finite value per configuration, shape `(m,)`.
        resamples: How many times m points are drawn.
        rng: The source of chance.

    Returns:
        Shape `(resamples,)`; NaN where a resample has no untied pair.
    """
    m = len(x)
    # ranks instead of values, because the difference of two huge values overflows
    ranks = [stats.rankdata(values, method="dense") for values in (x, y)]
    weights = rng.multinomial(m, np.full(m, 1 / m), size=resamples).astype(np.float64)
    concordance = np.zeros(resamples)
    for start in range(0, m, _BLOCK):
        part = slice(start, start + _BLOCK)
        signs = np.ones((len(ranks[0][part]), m))
        for rank in ranks:
            signs *= np.sign(rank[part, None] - rank[None, :])
        concordance += np.einsum("bi,bi->b", weights[:, part], weights @ signs.T)
    untied = _untied(weights, ranks[0]) * _untied(weights, ranks[1])
    tau = np.full(resamples, np.nan)
    np.divide(concordance, np.sqrt(untied), out=tau, where=untied > 0)
    return tau


def _untied(weights: Floats, rank: npt.NDArray[np.int64]) -> Floats:
    """Ordered pairs with different values, in every resample."""
    order = np.argsort(rank, kind="stable")
    starts = np.flatnonzero(np.diff(rank[order], prepend=0))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    return np.asarray(weights.sum(axis=1) ** 2 - (counts**2).sum(axis=1))
