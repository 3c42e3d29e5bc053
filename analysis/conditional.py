r"""Conditional mutual information of measure and target, given axes: is a measure more than a proxy of a setting?

.. math:: K = \min_{|S| \le 2} \frac{I(V_x; V_y \mid U_S)}{H(V_y \mid U_S)}, \qquad V_x = \mathrm{sign}(x_1 - x_2)

over all ordered pairs of configurations. U_S is the values of the axes S in both members of the pair, so that the axes
S explain nothing of what is left. In [0, 1]; 0 where the order of the measure tells nothing about the order of the
target. A tie is a third value of the sign. Jiang et al. 2020, "Fantastic generalization measures and where to find
them", section 2.2.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import special, stats

from flatmin.analysis.configurations import Floats, Ints, codes

MOST_AXES = 2
"""The paper's largest conditioning set."""

_BLOCK = 512
_WIDE = 1024  # groups of all conditioning sets that one matrix product counts
_NONE = 1e-12  # nats per pair: an entropy that is rounding error

_Groups = Mapping[tuple[int, ...], Ints]


@dataclass(frozen=True)
class Conditioning:
    """What is left of the mutual information given some axes.

    Attributes:
        axes: The conditioning set S; empty for none.
        value: The normalised conditional mutual information; None where the axes leave nothing of the target's order.
    """

    axes: tuple[str, ...]
    value: float | None


def conditional(axes: Sequence[str], levels: Ints, measures: Sequence[Floats], y: Floats) -> list[list[Conditioning]]:
    """Return the normalised conditional mutual information of measures and target for every conditioning set.

    Args:
        axes: Names of the axes.
        levels: The level of every configuration on every axis, shape `(configurations, axes)`.
        measures: The value of every configuration, once per measure.
        y: The target of every configuration.

    Returns:
        Per measure one entry per set of at most two axes, the empty set first.
    """
    sets = [part for size in range(MOST_AXES + 1) for part in combinations(range(len(axes)), size)]
    groups = {part: codes(levels[:, part]) for part in sets}
    # where no two configurations share a group, U_S says which pair it is, and nothing is left to be explained
    defined = {part: group for part, group in groups.items() if len(np.unique(group)) < len(group)}
    y_rank = stats.rankdata(y, method="dense")
    given_y = {part: _above(y_rank, group) for part, group in defined.items()}
    found = []
    for x in measures:
        x_rank = stats.rankdata(x, method="dense")
        both = _dominated(x_rank, y_rank, defined)
        # without ties, whoever is above in x is above or below in y
        across = _dominated(x_rank, -y_rank, defined) if len(np.unique(y_rank)) < len(y_rank) else None
        values: dict[tuple[int, ...], float | None] = {}
        for part, group in defined.items():
            above = _above(x_rank, group)
            counted = above - both[part] if across is None else across[part]
            values[part] = _normalised(both[part], counted, above, given_y[part], np.bincount(group))
        found.append([Conditioning(tuple(axes[axis] for axis in part), values.get(part)) for part in sets])
    return found


def smallest(found: Sequence[Conditioning]) -> float | None:
    """Return the paper's criterion: the smallest value over all conditioning sets.

    Args:
        found: The entries of one measure.

    >>> smallest([Conditioning((), 0.4), Conditioning(("lr",), 0.1), Conditioning(("width",), None)])
    0.1
    """
    values = [one.value for one in found if one.value is not None]
    return min(values) if values else None


def _above(rank: Ints, group: Ints) -> Floats:
    """Count, for groups a and b, the pairs of a member of a above one of b."""
    order = np.argsort(rank, kind="stable")
    first = np.searchsorted(rank[order], rank[order])  # how many are below
    size = int(group.max(initial=0)) + 1
    counts = np.zeros((size, size))
    for b in range(size):
        below = np.concatenate([[0], np.cumsum(group[order] == b)])[first]
        counts[:, b] = np.bincount(group[order], below, minlength=size)
    return counts


def _dominated(x: Ints, y: Ints, groups: _Groups) -> dict[tuple[int, ...], Floats]:
    """Count, for groups a and b of each set, the pairs of a member of a above one of b in x and in y."""
    counts: dict[tuple[int, ...], Floats] = {}
    for batch in _batches(groups):
        members = {part: np.eye(int(groups[part].max()) + 1, dtype=np.float32)[groups[part]] for part in batch}
        counts |= {part: np.zeros((one.shape[1], one.shape[1])) for part, one in members.items()}
        columns = np.concatenate(list(members.values()), axis=1)
        ends = np.cumsum([one.shape[1] for one in members.values()])[:-1]
        for start in range(0, len(x), _BLOCK):
            rows = slice(start, start + _BLOCK)
            # 32 bits hold these counts exactly: they are below 2^24
            above = ((x[rows, None] > x) & (y[rows, None] > y)).astype(np.float32) @ columns
            for (part, one), below in zip(members.items(), np.split(above, ends, axis=1), strict=True):
                counts[part] += one[rows].T @ below
    return counts


def _batches(groups: _Groups) -> list[list[tuple[int, ...]]]:
    """Split the sets so that one matrix product counts at most `_WIDE` groups, or one set's."""
    batches: list[list[tuple[int, ...]]] = []
    width = _WIDE
    for part, group in groups.items():
        size = int(group.max()) + 1
        if width + size > _WIDE:
            batches.append([])
            width = 0
        batches[-1].append(part)
        width += size
    return batches


def _normalised(both: Floats, across: Floats, above_x: Floats, above_y: Floats, sizes: Ints) -> float | None:
    """Return I / H from the ordered pairs of groups a and b in which (x, y) are (+, +), (+, -), (+, any), (any, +).

    The other counts follow, for a pair seen from its other end has both signs turned. With f the sum of n log n over
    counts n, and N pairs in all: N I = f(x, y, u) + f(u) - f(x, u) - f(y, u) and N H = f(u) - f(y, u).
    """
    pairs = np.multiply.outer(sizes, sizes) - np.diag(sizes).astype(np.float64)
    x_only, y_only = above_x - both - across, above_y - both - across.T
    tied_x, tied_y = pairs - above_x - above_x.T, pairs - above_y - above_y.T
    tied = tied_x - y_only - y_only.T
    joint = 2 * (_f(both) + _f(across) + _f(x_only) + _f(y_only)) + _f(tied)
    given_y = 2 * _f(above_y) + _f(tied_y)
    given_x = 2 * _f(above_x) + _f(tied_x)
    whole = _f(pairs)
    entropy = whole - given_y
    if entropy <= _NONE * pairs.sum():
        return None
    return float(np.clip((joint + whole - given_x - given_y) / entropy, 0.0, 1.0))


def _f(counts: Floats) -> float:
    return float(special.xlogy(counts, counts).sum())
