r"""Sign error: how often a measure orders two models wrongly that differ in one axis, on average and at worst.

An environment is an ordered pair of configurations that differ in one axis only (and in settings that one lacks because
of it, as an optimizer without `rho` does). Its error is the weighted mean over
all pairs of their seeds:

.. math:: \sum_{ij} w_{ij} \frac{1 - \mathrm{sign}(x_i - x_j)\,\mathrm{sign}(y_i - y_j)}{2} \Big/ \sum_{ij} w_{ij},
   \qquad w = \left(\max(0,\, 1 - 2 e^{-n (y_i - y_j)^2 / 2})^2 - \tfrac12\right)_+

The weight leaves out pairs whose target differs by chance: by Hoeffding's inequality each gap, a mean over n test
examples of values between 0 and 1, lies within half the difference of its expectation with the probability that is
squared. An environment counts where its effective sample size, :math:`(\sum w)^2 / \sum w^2`, is at least 12. A tie has
error one half. Both orders of a pair count, as in the paper; their errors are equal. Dziugaite et al. 2020, "In search
of robust measures of generalization", sections 4 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flatmin.analysis.configurations import Bools, Configurations, Floats, Ints

LEAST_EFFECTIVE = 12.0
"""The paper's smallest effective sample size of an environment, in pairs of seeds."""

_LEAST_WEIGHT = 0.5
_MOST_SEEDS = 32
"""Rows of one configuration that are used at most."""

_MOST_PAIRS = 2_000_000
"""Pairs of rows per axis; of more, a random part of the environments is taken."""


@dataclass(frozen=True)
class SignError:
    """The sign errors of one measure over the environments of one axis, or of all.

    Attributes:
        axis: The axis that differs, or `all`.
        mean: The mean over environments; None without one.
        p90: Their 90th percentile.
        max: The worst environment: the paper's robust sign error.
        environments: How many count.
    """

    axis: str
    mean: float | None
    p90: float | None
    max: float | None
    environments: int


@dataclass(frozen=True)
class Environments:
    """The pairs of configurations that differ in one axis, with all that does not depend on the measure.

    Attributes:
        axis: The axis that differs.
        first: Rows of the first configuration, -1 where it has fewer, shape `(environments, seeds)`.
        second: Rows of the second one, of the same shape.
        sign: Sign of the target's difference, shape `(environments, seeds, seeds)`.
        weight: Weight of each pair of seeds, 0 where there is none, of the same shape.
        sampled: Whether these are a random part, because there are too many.
    """

    axis: str
    first: Ints
    second: Ints
    sign: npt.NDArray[np.int8]
    weight: Floats
    sampled: bool


def hoeffding(difference: Floats, test_examples: int) -> Floats:
    """Return the weight of pairs of models whose target differs by so much.

    Args:
        difference: Differences of two gaps of accuracy, in fractions.
        test_examples: The number of test examples behind each gap.

    Returns:
        From 0, where chance is not unlikely enough, to 1/2.

    >>> hoeffding(np.array([0.001, 1.0]), 10_000).tolist()
    [0.0, 0.5]
    """
    surely = np.maximum(0.0, 1 - 2 * np.exp(-test_examples * difference**2 / 2)) ** 2
    return np.asarray(np.maximum(0.0, surely - _LEAST_WEIGHT))


def environments(
    configurations: Configurations,
    target: Floats,
    *,
    test_examples: int | None = None,
    least_effective: float = LEAST_EFFECTIVE,
) -> list[Environments]:
    """Find the environments of every axis.

    Args:
        configurations: Which row belongs to which configuration.
        target: The target of every row; a gap of accuracy in fractions where `test_examples` is given.
        test_examples: The number of test examples behind the target. None: every pair of seeds weighs the same.
        least_effective: The smallest effective sample size. Without `test_examples` it is the number of pairs of seeds,
            which says nothing about chance, and is asked for only where some environment has as many.

    Returns:
        One entry per axis, in the order of `configurations.axes`; an axis may have none.
    """
    seeds = configurations.seeds(_MOST_SEEDS)
    if test_examples is None and seeds.shape[1] ** 2 < least_effective:
        least_effective = 0.0
    return [
        _environments(configurations, place, seeds, target, test_examples, least_effective)
        for place in range(len(configurations.axes))
    ]


def sign_errors(found: Sequence[Environments], values: Floats) -> tuple[SignError, ...]:
    """Return the sign errors of a measure: over the environments of every axis, then over all of them.

    Args:
        found: What `environments` returned.
        values: The measure of every row, finite.
    """
    errors = {one.axis: _errors(one, values) for one in found}
    everything = np.concatenate([np.empty(0), *errors.values()])
    return tuple(_summary(axis, values) for axis, values in (errors | {"all": everything}).items())


def _environments(
    configurations: Configurations,
    axis: int,
    seeds: Ints,
    target: Floats,
    test_examples: int | None,
    least_effective: float,
) -> Environments:
    most = _MOST_PAIRS // max(1, seeds.shape[1] ** 2)
    own = bool(configurations.own(axis))
    pairs, sampled = _some(configurations.pairs(axis), most) if own else _pairs(configurations.groups(axis), most)
    first, second = seeds[pairs[:, 0]], seeds[pairs[:, 1]]
    difference = target[first][:, :, None] - target[second][:, None, :]
    there = (first >= 0)[:, :, None] & (second >= 0)[:, None, :]
    weight = np.where(there, 1.0 if test_examples is None else hoeffding(difference, test_examples), 0.0)
    total = weight.sum(axis=(1, 2))
    squares = (weight**2).sum(axis=(1, 2))
    effective = np.divide(total**2, squares, out=np.zeros(len(pairs)), where=squares > 0)
    counts: Bools = (effective > 0) & ((effective > least_effective) | np.isclose(effective, least_effective))
    sign = np.sign(difference[counts]).astype(np.int8)
    return Environments(configurations.axes[axis], first[counts], second[counts], sign, weight[counts], sampled)


def _pairs(groups: list[Ints], most: int) -> tuple[Ints, bool]:
    """Pair up the members of every group; where there are too many pairs, draw so many groups' pairs at random."""
    total = sum(len(group) * (group.shape[1] * (group.shape[1] - 1) // 2) for group in groups)
    if total <= most:
        return np.concatenate([np.empty((0, 2), dtype=np.int64), *_all_pairs(groups)]), False
    rng = np.random.default_rng(0)
    parts = []
    for group in groups:
        count, size = group.shape
        share = round(most * count * (size * (size - 1) // 2) / total)
        if size == 1 or not share:
            continue
        i = rng.integers(size, size=share)
        j = (i + rng.integers(1, size, size=share)) % size
        which = group[rng.integers(count, size=share)]
        parts.append(np.stack([which[np.arange(share), i], which[np.arange(share), j]], axis=1))
    return np.concatenate(parts), True


def _some(groups: list[tuple[Ints, Ints]], most: int) -> tuple[Ints, bool]:
    """The pairs of all groups; where there are too many, a random part of them."""
    pairs = np.concatenate([np.empty((0, 2), dtype=np.int64), *(np.stack(group, axis=1) for group in groups)])
    if len(pairs) <= most:
        return pairs, False
    return pairs[np.random.default_rng(0).choice(len(pairs), most, replace=False)], True


def _all_pairs(groups: list[Ints]) -> Iterator[Ints]:
    for group in groups:
        i, j = np.triu_indices(group.shape[1], 1)
        yield np.stack([group[:, i].ravel(), group[:, j].ravel()], axis=1)


def _errors(found: Environments, values: Floats) -> Floats:
    signs = np.sign(values[found.first][:, :, None] - values[found.second][:, None, :]) * found.sign
    return np.asarray(((1 - signs) / 2 * found.weight).sum(axis=(1, 2)) / found.weight.sum(axis=(1, 2)))


def _summary(axis: str, errors: Floats) -> SignError:
    if not len(errors):
        return SignError(axis, None, None, None, 0)
    both = np.repeat(errors, 2)  # a pair in either order, as in the paper: the percentile interpolates between them
    return SignError(axis, float(errors.mean()), float(np.percentile(both, 90)), float(errors.max()), len(both))
