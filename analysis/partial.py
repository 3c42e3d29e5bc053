r"""Partial rank correlation given the axes: what a measure says about the target beyond what the settings say.

Measure and target are ranked over configurations, each rank is regressed on the levels of all axes (one dummy variable
per level, effects of axes added, least squares), and the residuals are correlated:

.. math:: r = \mathrm{corr}(R_x - Z \hat\beta_x,\ R_y - Z \hat\beta_y)

This is Spearman's partial correlation with categorical controls (Conover 1999, section 5.4; Kendall 1942 for the idea).
Undefined where fewer than three degrees of freedom are left, as with one axis and one value per level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import sparse, stats

from flatmin.analysis.configurations import Floats, Ints

_LEAST_FREEDOM = 3
_LEAST_LEFT = 1e-9  # share of the variance of ranks that is more than rounding error
_MOST_LEVELS = 2000
_MOST_LEVELS_RESAMPLED = 300  # more levels than this make the bootstrap slow
_RIDGE = 1e-10  # per configuration: levels that a resample lacks, and the redundant one of each axis, get no effect
_BLOCK = 64


def partial_rank(x: Floats, y: Floats, levels: Ints) -> float:
    """Return the partial rank correlation of two values per configuration given the axes.

    Args:
        x: Finite values, shape `(m,)`.
        y: Finite values, shape `(m,)`.
        levels: The level of every configuration on every axis, shape `(m, axes)`.

    Returns:
        A number in [-1, 1]; NaN where it is undefined: too few configurations, nothing left beside the axes, or more
        than 2,000 levels in all.

    >>> partial_rank(np.array([1.0, 2, 3, 4, 5]), np.array([5.0, 4, 3, 2, 1]), np.zeros((5, 1), dtype=np.int64))
    -1.0
    """
    design = _design(levels)
    if design.shape[1] > _MOST_LEVELS:
        return float("nan")
    values, vectors = np.linalg.eigh((design.T @ design).toarray())
    known = values > _LEAST_LEFT * values[-1]
    if len(x) - known.sum() < _LEAST_FREEDOM:
        return float("nan")
    basis = vectors[:, known] / np.sqrt(values[known])
    left = []
    for column in (x, y):
        rank = stats.rankdata(column) - (len(column) + 1) / 2
        residual = rank - design @ (basis @ (basis.T @ (design.T @ rank)))
        if residual @ residual <= _LEAST_LEFT * (rank @ rank):
            return float("nan")
        left.append(residual / np.sqrt(residual @ residual))
    return float(np.clip(left[0] @ left[1], -1, 1))


def bootstrap_partial(
    measures: Sequence[Floats], y: Floats, levels: Ints, counts: npt.NDArray[np.float32]
) -> list[Floats]:
    """Return the partial rank correlation of resampled configurations, ranked and regressed anew in each resample.

    Args:
        measures: Finite values, shape `(m,)` each.
        y: Finite values, shape `(m,)`.
        levels: The level of every configuration on every axis, shape `(m, axes)`.
        counts: How often each configuration was drawn, shape `(resamples, m)`, each row with sum m.

    Returns:
        Per measure an array of shape `(resamples,)`; NaN where a resample leaves nothing beside the axes, and all NaN
        for more than 300 levels.
    """
    design = _design(levels)
    width = design.shape[1]
    out = [np.full(len(counts), np.nan) for _ in measures]
    if not measures or width > _MOST_LEVELS_RESAMPLED:
        return out
    # a configuration's part of Z'Z is the pairs of its levels
    pairs = design.indices.reshape(len(y), -1)
    places = (pairs[:, :, None] * width + pairs[:, None, :]).reshape(len(y), -1)
    ends = np.arange(0, places.size + 1, places.shape[1])
    squares = sparse.csr_array((np.ones(places.size), places.ravel(), ends), shape=(len(y), width**2)).T.tocsr()
    ridge = _RIDGE * len(y) * np.eye(width)
    for start in range(0, len(counts), _BLOCK):
        drawn = counts[start : start + _BLOCK].T.astype(np.float64)
        normal = (squares @ drawn).T.reshape(drawn.shape[1], width, width) + ridge
        y_rank = _ranks(y, drawn)
        products, squared, sides = [], [], []
        for values in (y, *measures):
            rank = y_rank if values is y else _ranks(values, drawn)
            weighted = drawn * rank
            products.append(np.einsum("mb,mb->b", weighted, y_rank))
            squared.append(np.einsum("mb,mb->b", weighted, rank))
            sides.append((design.T @ weighted).T)
        side = np.stack(sides, axis=2)
        effect = np.linalg.solve(normal, side)
        whole = np.stack(squared)
        left = whole - np.einsum("bpk,bpk->kb", side, effect)
        left = np.where(left > _LEAST_LEFT * whole, left, np.nan)
        both = np.stack(products) - np.einsum("bpk,bp->kb", side, effect[:, :, 0])
        for place, found in enumerate(out, start=1):
            found[start : start + _BLOCK] = both[place] / np.sqrt(left[place] * left[0])
    return out


def _ranks(values: Floats, drawn: Floats) -> Floats:
    """Ranks of the drawn points, ties at their mean rank, less the mean of all; shape `(m, resamples)` as `drawn`."""
    dense = stats.rankdata(values, method="dense") - 1
    order = np.argsort(dense, kind="stable")
    tied = drawn[order]
    if dense.max() + 1 < len(dense):
        tied = np.add.reduceat(tied, np.flatnonzero(np.diff(dense[order], prepend=-1)), axis=0)
    rank = np.cumsum(tied, axis=0)
    rank -= tied / 2
    rank -= len(values) / 2
    return np.asarray(rank[dense])


def _design(levels: Ints) -> sparse.csr_array:
    """A one for every level of every configuration, and a column of ones in front; shape `(m, 1 + levels)`."""
    sizes = [1, *(int(level.max(initial=0)) + 1 for level in levels.T)]
    columns = np.column_stack([np.zeros(len(levels), dtype=np.int64), levels]) + np.cumsum([0, *sizes[:-1]])
    ends = np.arange(0, columns.size + 1, columns.shape[1])
    return sparse.csr_array((np.ones(columns.size), columns.ravel(), ends), shape=(len(levels), sum(sizes)))
