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
        absent: Where an axis is null, shape `(configurations, axes)`; None: nowhere.
    """

    axes: tuple[str, ...]
    levels: Ints
    rows: Ints
    absent: Bools | None = None

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
        return Configurations(self.axes, self.levels[kept], rows, None if self.absent is None else self.absent[kept])

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
            Arrays of shape `(groups, size)` of configurations that have the axis; a group of size 1 has nothing to be
            compared with.
        """
        members = np.flatnonzero(self.having(axis))
        others = codes(np.delete(self.levels[members], axis, axis=1))
        order = members[np.argsort(others, kind="stable")]
        sizes = np.bincount(others)
        starts = np.cumsum(sizes) - sizes
        return [order[starts[sizes == size][:, None] + np.arange(size)] for size in np.unique(sizes)]

    def having(self, axis: int) -> Bools:
        """Tell which configurations have an axis: those where it is null because of another axis have not.

        Args:
            axis: The place of the axis in `axes`.

        Returns:
            Shape `(configurations,)`.
        """
        if self.absent is None or not any(axis in self.own(other) for other in range(len(self.axes))):
            return np.ones(len(self), dtype=np.bool_)
        return ~self.absent[:, axis]

    def own(self, axis: int) -> list[int]:
        """Return the axes that only some levels of an axis have, as `rho` is of some optimizers only.

        Args:
            axis: The place of the axis in `axes`.

        Returns:
            The places of those that are null at all configurations of some levels and at none of the others, where
            the remaining axes do not say the same.
        """
        if self.absent is None:
            return []
        level = self.levels[:, axis]
        return [
            other
            for other in np.flatnonzero(self.absent.any(axis=0) & ~self.absent.all(axis=0)).tolist()
            if other != axis
            and _decides(level, self.absent[:, other])
            and not _decides(codes(np.delete(self.levels, [axis, other], axis=1)), self.absent[:, other])
        ]

    def pairs(self, axis: int) -> list[tuple[Ints, Ints]]:
        """Return the pairs of configurations that differ in one axis and in nothing else that both have.

        Args:
            axis: The place of the axis in `axes`.

        Returns:
            Both members of the pairs, once per group that is equal in all axes but this one and its own.
        """
        own = self.own(axis)
        absent = np.zeros(self.levels.shape, dtype=np.bool_) if self.absent is None else self.absent
        others = codes(np.delete(self.levels, [axis, *own], axis=1))
        found = []
        for members in np.split(np.argsort(others, kind="stable"), np.cumsum(np.bincount(others))[:-1]):
            i, j = (members[side] for side in np.triu_indices(len(members), 1))
            apart = self.levels[i, axis] != self.levels[j, axis]
            for setting in own:
                one_lacks_it = absent[i, setting] | absent[j, setting]
                apart &= one_lacks_it | (self.levels[i, setting] == self.levels[j, setting])
            if apart.any():
                found.append((i[apart], j[apart]))
        return found


def of(table: pd.DataFrame, axes: Sequence[str], *, repeated: bool) -> Configurations:
    """Find the configurations of a table, numbered as they appear.

    Args:
        table: A row per model.
        axes: The settings that make a configuration; null is a level of its own. One that another axis keeps some
            models from having does not tell those from the others: see `Configurations.pairs`.
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
    absent = table[list(axes)].isna().to_numpy(dtype=np.bool_)[first]
    return Configurations(tuple(axes), levels[first], rows, absent if absent.any() else None)


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


def _decides(level: Ints, absent: Bools) -> bool:
    """Tell whether an axis is null at all configurations of a level or at none."""
    missing = np.bincount(level, absent)
    return bool(((missing == 0) | (missing == np.bincount(level))).all())


def rounded(values: Floats) -> Floats:
    """Round to 12 significant digits.

    Args:
        values: Finite values.

    >>> bool(np.unique(rounded(np.array([0.1 + 0.2, 0.3]))).size == 1)
    True
    """
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.round(mantissa, _DIGITS), exponent))
