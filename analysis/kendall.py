r"""Kendall's rank correlation, tau-b and tau-a, and the bootstrap of tau-b over configurations.

.. math:: \tau_a = \frac{2}{n (n - 1)} \sum_{i<j} \mathrm{sign}(x_i - x_j)\,\mathrm{sign}(y_i - y_j), \quad
   \tau_b = \frac{\sum_{i<j} \mathrm{sign}(x_i - x_j)\,\mathrm{sign}(y_i - y_j)}{\sqrt{n_x n_y}}

where :math:`n_x` is the number of pairs that are not tied in x. Kendall 1945, "The treatment of ties in
ranking problems", Biometrika 33(3).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from flatmin.analysis.configurations import Floats, Ints

_BLOCK = 512


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
    # not np.ptp: the difference of two huge values overflows
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return float("nan")
    return float(stats.kendalltau(x, y).statistic)


def tau_a(x: Floats, y: Floats) -> float:
    """Return Kendall's tau-a of two samples: a tied pair counts as neither agreeing nor disagreeing.

    Args:
        x: Finite values, shape `(n,)`.
        y: Finite values, shape `(n,)`.

    Returns:
        A number in [-1, 1]; NaN for fewer than two values.

    >>> tau_a(np.array([1.0, 2.0, 2.0]), np.array([1.0, 2.0, 3.0])) == 2 / 3
    True
    """
    n = len(x)
    if n < 2:
        return float("nan")
    tau = tau_b(x, y)
    untied = [n * (n - 1) // 2 - _tied(values) for values in (x, y)]
    return round(tau * math.sqrt(untied[0] * untied[1])) / (n * (n - 1) / 2) if math.isfinite(tau) else 0.0


def tied_pairs(x: Floats, y: Floats) -> int:
    """Count the pairs that are tied in x, in y, or in both.

    Args:
        x: Finite values, shape `(n,)`.
        y: Finite values, shape `(n,)`.

    >>> tied_pairs(np.array([1.0, 1.0, 2.0]), np.array([3.0, 3.0, 3.0]))
    3
    """
    return _tied(x) + _tied(y) - _tied(np.column_stack([x, y]))


def _tied(values: Floats) -> int:
    counts = np.unique(values, return_counts=True, axis=0)[1]
    return int((counts * (counts - 1) // 2).sum())


def bootstrap_tau(x: Floats, y: Floats, counts: npt.NDArray[np.float32]) -> Floats:
    """Return tau-b of resampled points.

    A resample is a vector w of how often each point was drawn. With the matrix A of pair signs, tau-b needs only w'Aw
    and the counts of each distinct value, so that all resamples share one matrix product. Its terms are whole numbers
    below 2^24, which 32 bits hold exactly.

    Args:
        x: One finite value per configuration, shape `(m,)`.
        y: One finite value per configuration, shape `(m,)`.
        counts: How often each point was drawn, shape `(resamples, m)`, each row with sum m.

    Returns:
        Shape `(resamples,)`; NaN where a resample has no untied pair.
    """
    m = len(x)
    # ranks instead of values, because the difference of two huge values overflows
    ranks: list[Ints] = [stats.rankdata(values, method="dense") for values in (x, y)]
    concordance = np.zeros(len(counts))
    for start in range(0, m, _BLOCK):
        stop = min(start + _BLOCK, m)
        signs = np.ones((stop - start, m - start), dtype=np.float32)
        for rank in ranks:
            signs *= np.sign(rank[start:stop, None] - rank[None, start:])
        # A is symmetric: what is right of the diagonal block counts twice
        drawn = counts[:, start:stop]
        right = counts[:, stop:] @ signs[:, stop - start :].T
        within = counts[:, start:stop] @ signs[:, : stop - start].T
        concordance += np.einsum("bi,bi->b", drawn, 2 * right + within, dtype=np.float64)
    untied = _untied(counts, ranks[0]) * _untied(counts, ranks[1])
    tau = np.full(len(counts), np.nan)
    np.divide(concordance, np.sqrt(untied), out=tau, where=untied > 0)
    return tau


def _untied(counts: npt.NDArray[np.float32], rank: Ints) -> Floats:
    """Ordered pairs with different values, in every resample."""
    everything = counts.sum(axis=1, dtype=np.float64) ** 2
    if int(rank.max(initial=0)) == len(rank):
        return np.asarray(everything - np.einsum("bm,bm->b", counts, counts, dtype=np.float64))
    order = np.argsort(rank, kind="stable")
    starts = np.flatnonzero(np.diff(rank[order], prepend=0))
    tied = np.add.reduceat(counts[:, order], starts, axis=1, dtype=np.float64)
    return np.asarray(everything - (tied**2).sum(axis=1))
