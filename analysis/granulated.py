r"""Granulated Kendall coefficients: does a measure follow the target when one axis varies and all others are fixed?

.. math:: \psi_i = \frac{1}{m_i} \sum_{\text{groups}} \tau(\text{group}), \qquad \Psi = \frac{1}{n} \sum_i \psi_i

A group is the configurations that are equal in every axis but the i-th; tau is tau-a as in the paper, or tau-b, which
leaves out tied pairs. Where only some levels of the axis have a setting (`rho` of some optimizers), a group is equal in
the other settings, and those of its pairs count that differ in the axis and in nothing that both have. Jiang
et al. 2020, "Fantastic generalization measures and where to find them", section 2.2.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from flatmin.analysis import kendall
from flatmin.analysis.configurations import Configurations, Floats, Ints

_LARGE = 16
"""Groups beyond this size are cheaper by sorting than pair by pair."""


@dataclass(frozen=True)
class Psi:
    """The granulated coefficient of one axis.

    Attributes:
        value: The mean of tau over groups; None without a defined group.
        groups: Groups of at least two configurations in which tau is defined: those in the mean.
        undefined: Groups of at least two in which it is not; tau-b where measure or target is constant.
        alone: Configurations that differ from no other in this axis only.
        tied: Pairs within the groups that are tied in measure or target.
    """

    value: float | None
    groups: int
    undefined: int = 0
    alone: int = 0
    tied: int = 0


def granulated(
    configurations: Configurations, x: Floats, y: Floats, *, variant: Literal["a", "b"] = "a"
) -> dict[str, Psi]:
    """Return the granulated Kendall coefficient of every axis.

    Args:
        configurations: What differs in which axis.
        x: The measure of every configuration.
        y: The target of every configuration.
        variant: tau-a, in which a tied pair counts as neither, or tau-b.

    Returns:
        One entry per axis, in the order of `configurations.axes`.
    """
    # ranks instead of values, because the difference of two huge values overflows
    x, y = (stats.rankdata(values, method="dense") for values in (x, y))
    return {
        axis: _pairs(configurations.pairs(place), x, y, variant)
        if configurations.own(place)
        else _groups(configurations.groups(place), x, y, variant)
        for place, axis in enumerate(configurations.axes)
    }


def mean(psi: Mapping[str, Psi]) -> float | None:
    """Average over the axes that have a value, each counted once.

    Args:
        psi: What `granulated` returned.

    >>> mean({"lr": Psi(0.5, 3), "width": Psi(1.0, 1), "seed": Psi(None, 0)})
    0.75
    """
    values = [one.value for one in psi.values() if one.value is not None]
    return float(np.mean(values)) if values else None


def _groups(groups: list[Ints], x: Floats, y: Floats, variant: Literal["a", "b"]) -> Psi:
    alone, tied = 0, 0
    taus: list[Floats] = []
    for group in groups:
        size = group.shape[1]
        if size == 1:
            alone += len(group)
            continue
        if size > _LARGE:
            one = kendall.tau_a if variant == "a" else kendall.tau_b
            taus.append(np.array([one(x[members], y[members]) for members in group]))
            tied += sum(kendall.tied_pairs(x[members], y[members]) for members in group)
            continue
        i, j = np.triu_indices(size, 1)
        sx, sy = (np.sign(values[group[:, i]] - values[group[:, j]]) for values in (x, y))
        untied = (np.full(len(group), float(len(i))),) * 2
        if variant == "b":
            untied = (np.abs(sx).sum(axis=1), np.abs(sy).sum(axis=1))
        scale = np.sqrt(untied[0] * untied[1])
        taus.append(np.divide((sx * sy).sum(axis=1), scale, out=np.full(len(group), np.nan), where=scale > 0))
        tied += int((sx * sy == 0).sum())
    return _mean(np.concatenate([np.empty(0), *taus]), alone, tied)


def _pairs(groups: list[tuple[Ints, Ints]], x: Floats, y: Floats, variant: Literal["a", "b"]) -> Psi:
    taus, tied = np.full(len(groups), np.nan), 0
    for place, (i, j) in enumerate(groups):
        sx, sy = (np.sign(values[i] - values[j]) for values in (x, y))
        scale = len(i) if variant == "a" else np.sqrt(np.abs(sx).sum() * np.abs(sy).sum())
        taus[place] = (sx * sy).sum() / scale if scale else np.nan
        tied += int((sx * sy == 0).sum())
    paired = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *(part for pair in groups for part in pair)]))
    return _mean(taus, len(x) - len(paired), tied)


def _mean(taus: Floats, alone: int, tied: int) -> Psi:
    known = taus[np.isfinite(taus)]
    value = float(known.mean()) if len(known) else None
    return Psi(value, len(known), len(taus) - len(known), alone, tied)
