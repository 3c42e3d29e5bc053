"""Configurations of a table of models: which rows repeat one, and which configurations differ in one axis only.

A configuration is one value of every axis; its rows are its seeds. Seeds of one configuration are no independent
evidence about a measure, so that statistics are taken on seed means, or on pairs of seeds within a pair of
configurations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from flatmin.analysis import frames

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_DIGITS = 12
"""Digits of a mean: equal ones must tie although sums round, and although a gap is a difference of fractions."""


@dataclass(frozen=True)
class Configurations:
    """The configurations of some rows.

    Attributes:
        axes: The settings that make a configuration.
        levels: The level of every configuration on every axis, counted from 0, shape `(configurations, axes)`.
        rows: The configuration of every row, shape `(rows,)`; every configuration has a row.
    """

    axes: tuple[str, ...]
    levels: Ints
    rows: Ints

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def sizes(self) -> Ints:
        """Rows of every configuration."""
        return np.bincount(self.rows, minlength=len(self))

    def means(self, values: Floats) -> Floats:
        """Average a column over the rows of every configuration, to 12 significant digits.

        Args:
            values: Finite values, shape `(rows,)`.

        Returns:
            Shape `(configurations,)`.
        """
        mean = np.bincount(self.rows, values, minlength=len(self)) / self.sizes
        return rounded(mean)

    def take(self, known: Bools) -> Configurations:
        """Keep some rows, and the configurations that they belong to, in their order.

        Args:
            known: Which rows, shape `(rows,)`.
        """
        if known.all():
            return self
        kept, rows = np.unique(self.rows[known], return_inverse=True)
        return Configurations(self.axes, self.levels[kept], rows)

    def seeds(self, most: int) -> Ints:
        """Return the first rows of every configuration.

        Args:
            most: How many at most.

        Returns:
            Shape `(configurations, rows)`, filled up with -1.
        """
        order = np.argsort(self.rows, kind="stable")
        place = np.arange(len(order)) - np.repeat(np.cumsum(self.sizes) - self.sizes, self.sizes)
        order, place = order[place < most], place[place < most]
        table = np.full((len(self), int(self.sizes.clip(max=most).max(initial=0))), -1)
        table[self.rows[order], place] = order
        return table

    def groups(self, axis: int) -> list[Ints]:
        """Return the groups of configurations that differ in one axis only, those of equal size together.

        Args:
            axis: The place of the axis in `axes`.

        Returns:
            Arrays of shape `(groups, size)` of configurations; a group of size 1 has nothing to be compared with.
        """
        others = codes(np.delete(self.levels, axis, axis=1))
        order = np.argsort(others, kind="stable")
        sizes = np.bincount(others)
        starts = np.cumsum(sizes) - sizes
        return [order[starts[sizes == size][:, None] + np.arange(size)] for size in np.unique(sizes)]


def of(table: pd.DataFrame, axes: Sequence[str], *, repeated: bool) -> Configurations:
    """Find the configurations of a table, numbered as they appear.

    Args:
        table: A row per model.
        axes: The settings that make a configuration; null is a level of its own.
        repeated: Whether, without axes, all rows repeat one configuration; else each row is one.
    """
    levels = np.empty((len(table), len(axes)), dtype=np.int64)
    for place, axis in enumerate(axes):
        levels[:, place] = frames.levels(table[axis])
    if not axes:
        rows = np.zeros(len(table), dtype=np.int64) if repeated else np.arange(len(table))
        return Configurations((), levels[: 1 if repeated and len(table) else len(rows)], rows)
    rows = np.asarray(pd.factorize(codes(levels))[0], dtype=np.int64)
    first = np.unique(rows, return_index=True)[1]
    return Configurations(tuple(axes), levels[first], rows)


def codes(levels: Ints) -> Ints:
    """Number the distinct rows of a table of levels.

    Args:
        levels: Shape `(configurations, axes)`; without axes all are equal.

    Returns:
        Numbers from 0 on without a gap, shape `(configurations,)`.

    >>> codes(np.array([[0, 1], [2, 1], [0, 1]])).tolist()
    [0, 1, 0]
    """
    number = np.zeros(len(levels), dtype=np.int64)
    for column in levels.T:
        number = np.unique(number * (int(column.max(initial=0)) + 1) + column, return_inverse=True)[1]
    return number


def rounded(values: Floats) -> Floats:
    """Round to 12 significant digits.

    Args:
        values: Finite values.

    >>> bool(np.unique(rounded(np.array([0.1 + 0.2, 0.3]))).size == 1)
    True
    """
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.round(mantissa, _DIGITS), exponent))
