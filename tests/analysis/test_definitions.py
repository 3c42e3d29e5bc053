"""Every statistic against its definition, as loops, on small random tables with ties, seeds and holes in the grid."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flatmin.analysis import bootstrap, conditional, configurations, partial, sign_error
from flatmin.analysis.configurations import Configurations
from flatmin.analysis.crossfit import crossfit
from flatmin.analysis.granulated import granulated

AXES = ("lr", "width", "optimizer")


@dataclass(frozen=True)
class Table:
    """Rows of a grid with holes, its settings as text, a measure and a target with ties."""

    rows: list[tuple[str, ...]]
    x: np.ndarray
    y: np.ndarray

    @property
    def found(self) -> Configurations:
        return configurations.of(pd.DataFrame(self.rows, columns=list(AXES)), AXES, repeated=True)

    def means(self) -> dict[tuple[str, ...], tuple[float, float]]:
        """Configurations in the order in which they appear, and their seed means."""
        seeds: dict[tuple[str, ...], list[int]] = {}
        for place, row in enumerate(self.rows):
            seeds.setdefault(row, []).append(place)
        return {row: (float(np.mean(self.x[of])), float(np.mean(self.y[of]))) for row, of in seeds.items()}


@st.composite
def tables(draw: st.DrawFn) -> Table:
    grid: list[tuple[str, ...]] = list(itertools.product("abc", "de", "fgh"))
    rows = draw(st.lists(st.sampled_from(grid), min_size=2, max_size=24))
    # whole numbers, so that means of seeds tie exactly where they tie
    number = st.integers(-3, 3).map(float)
    x, y = (np.array(draw(st.lists(number, min_size=len(rows), max_size=len(rows)))) for _ in range(2))
    return Table(rows, x, y)


def sign(a: float, b: float) -> int:
    return 0 if math.isclose(a, b, abs_tol=1e-9) else (1 if a > b else -1)


def close(found: float | None, expected: float | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return found == pytest.approx(expected, abs=1e-9)


checked = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@checked
@given(tables())
def test_psi_is_the_mean_of_tau_over_groups(table: Table) -> None:
    means = table.means()
    x, y = (np.array([pair[side] for pair in means.values()]) for side in (0, 1))
    for variant in ("a", "b"):
        found = granulated(table.found, x, y, variant=variant)
        for axis, name in enumerate(AXES):
            groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
            for row, pair in means.items():
                groups.setdefault(row[:axis] + row[axis + 1 :], []).append(pair)
            taus, undefined, tied = [], 0, 0
            for group in (group for group in groups.values() if len(group) > 1):
                pairs = [(sign(a[0], b[0]), sign(a[1], b[1])) for a, b in itertools.combinations(group, 2)]
                tied += sum(sx * sy == 0 for sx, sy in pairs)
                scale = math.sqrt(sum(sx * sx for sx, _ in pairs) * sum(sy * sy for _, sy in pairs))
                scale = scale if variant == "b" else float(len(pairs))
                if scale:
                    taus.append(sum(sx * sy for sx, sy in pairs) / scale)
                else:
                    undefined += 1
            one = found[name]
            assert close(one.value, float(np.mean(taus)) if taus else None)
            assert (one.groups, one.undefined, one.tied) == (len(taus), undefined, tied)
            assert one.alone == sum(len(group) == 1 for group in groups.values())


@checked
@given(tables())
def test_conditional_information_is_its_definition_over_ordered_pairs(table: Table) -> None:
    means = table.means()
    x, y = (np.array([pair[side] for pair in means.values()]) for side in (0, 1))
    for one in conditional.conditional(AXES, table.found.levels, [x], y)[0]:
        given = [AXES.index(axis) for axis in one.axes]
        assert close(one.value, _information(means, given))


def _information(means: dict[tuple[str, ...], tuple[float, float]], given: list[int]) -> float | None:
    joint: Counter[tuple[int, int, tuple[str, ...]]] = Counter()
    for (first, a), (second, b) in itertools.permutations(means.items(), 2):
        u = tuple(first[axis] for axis in given) + tuple(second[axis] for axis in given)
        joint[sign(a[0], b[0]), sign(a[1], b[1]), u] += 1
    total = sum(joint.values())
    of_u: Counter[tuple[str, ...]] = Counter()
    of_x: Counter[tuple[int, tuple[str, ...]]] = Counter()
    of_y: Counter[tuple[int, tuple[str, ...]]] = Counter()
    for (sx, sy, u), n in joint.items():
        of_u[u] += n
        of_x[sx, u] += n
        of_y[sy, u] += n
    entropy = -sum(n / total * math.log(n / of_u[u]) for (_, u), n in of_y.items())
    if entropy < 1e-12:
        return None
    shared = sum(n / total * math.log(n * of_u[u] / (of_x[sx, u] * of_y[sy, u])) for (sx, sy, u), n in joint.items())
    return shared / entropy


@checked
@given(tables(), st.sampled_from([None, 20, 200]), st.sampled_from([0.0, 2.0, 12.0]))
def test_sign_error_is_the_weighted_mean_over_pairs_of_seeds(table: Table, examples: int | None, least: float) -> None:
    y = table.y / 10
    found = sign_error.sign_errors(
        sign_error.environments(table.found, y, test_examples=examples, least_effective=least), table.x
    )
    sizes = Counter(table.rows)
    if examples is None and max(sizes.values()) ** 2 < least:
        least = 0.0
    everything = []
    for axis, one in enumerate(found[:-1]):
        errors = []
        for first, second in itertools.permutations(sizes, 2):
            if [place for place in range(3) if first[place] != second[place]] != [axis]:
                continue
            weights, wrong = [], []
            for i, j in itertools.product(range(len(y)), repeat=2):
                if (table.rows[i], table.rows[j]) == (first, second):
                    weights.append(1.0 if examples is None else _weight(y[i] - y[j], examples))
                    wrong.append((1 - sign(table.x[i], table.x[j]) * sign(y[i], y[j])) / 2)
            total = sum(weights)
            effective = total**2 / sum(w * w for w in weights) if total else 0.0
            if effective > 0 and effective >= least - 1e-6:
                errors.append(sum(w * e for w, e in zip(weights, wrong, strict=True)) / total)
        everything += errors
        _same(one, AXES[axis], errors)
    _same(found[-1], "all", everything)


def _weight(difference: float, examples: int) -> float:
    each = max(0.0, 1 - 2 * math.exp(-2 * examples * (difference / 2) ** 2))
    return max(0.0, each**2 - 0.5)


def _same(one: sign_error.SignError, axis: str, errors: list[float]) -> None:
    assert (one.axis, one.environments) == (axis, len(errors))
    for found, statistic in ((one.mean, np.mean), (one.p90, lambda e: np.percentile(e, 90)), (one.max, np.max)):
        assert close(found, float(statistic(errors)) if errors else None)


@checked
@given(tables())
def test_partial_correlation_is_that_of_residuals(table: Table) -> None:
    means = table.means()
    x, y = (np.array([pair[side] for pair in means.values()]) for side in (0, 1))
    design = np.column_stack(
        [np.ones(len(means))]
        + [[row[axis] == level for row in means] for axis in range(3) for level in {row[axis] for row in means}]
    ).astype(float)
    left = []
    for values in (x, y):
        rank = stats.rankdata(values)
        left.append(rank - design @ np.linalg.pinv(design) @ rank)
    found = partial.partial_rank(x, y, table.found.levels)
    if len(means) - np.linalg.matrix_rank(design) < 3 or min(one @ one for one in left) < 1e-6:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(stats.pearsonr(*left).statistic, abs=1e-9)


@pytest.mark.parametrize("ties", [False, True])
def test_every_partial_resample_is_that_of_the_drawn_configurations(ties: bool) -> None:
    rng = np.random.default_rng(0)
    levels = np.array(list(itertools.product(range(3), range(4), range(2))))
    x, y = rng.normal(size=(2, 24))
    if ties:
        x, y = np.round(x), np.round(y)
    drawn = bootstrap.draw(24, 70, 3)
    found = partial.bootstrap_partial([x, -x], y, levels, drawn.counts)
    for place, count in enumerate(drawn.counts):
        rows = np.repeat(np.arange(24), count.astype(int))
        expected = partial.partial_rank(x[rows], y[rows], levels[rows])
        assert [one[place] for one in found] == pytest.approx([expected, -expected], abs=1e-6)


@checked
@given(tables())
def test_crossfit_is_a_line_through_ranks_of_the_other_levels(table: Table) -> None:
    means = table.means()
    x, y = (np.array([pair[side] for pair in means.values()]) for side in (0, 1))
    found = crossfit(table.found, x, y)
    for axis, name in enumerate(AXES):
        level = np.array([row[axis] for row in means])
        missed = spread = 0.0
        folds = [(level != out, level == out) for out in set(level)]
        if min(fit.sum() for fit, _ in folds) < 3:
            assert found[name] is None
            continue
        for fit, out in folds:

            def rank(value: float, ranked: np.ndarray = x[fit]) -> float:
                return float((ranked < value).mean() + (ranked == value).mean() / 2)

            ranks = np.array([rank(value) for value in x[fit]])
            slope, start = (0.0, y[fit].mean()) if np.ptp(ranks) == 0 else np.polyfit(ranks, y[fit], 1)
            missed += sum((y[i] - start - slope * rank(x[i])) ** 2 for i in np.flatnonzero(out))
            spread += ((y[out] - y[fit].mean()) ** 2).sum()
        assert close(found[name], 1 - missed / spread if spread > 0 else None)


@pytest.mark.parametrize("relation", [lambda x: x, lambda x: -x, np.exp])
def test_closed_forms_of_a_monotone_measure(relation: Callable[[np.ndarray], np.ndarray]) -> None:
    """Whoever orders all pairs rightly has psi 1, information 1, and sign error 0; wrongly: -1, 1 and 1."""
    rows: list[tuple[str, ...]] = list(itertools.product("abc", "de", "fgh"))
    y = np.random.default_rng(0).normal(size=18)
    table = Table(rows, relation(y), y)
    expected = float(np.sign(relation(np.ones(1)) - relation(np.zeros(1)))[0])
    assert {psi.value for psi in granulated(table.found, table.x, y).values()} == {expected}
    information = [one.value for one in conditional.conditional(AXES, table.found.levels, [table.x], y)[0]]
    assert information == pytest.approx([1.0] * 7)
    errors = sign_error.sign_errors(sign_error.environments(table.found, y), table.x)
    assert {(one.mean, one.max) for one in errors} == {((1 - expected) / 2,) * 2}
    assert partial.partial_rank(y, relation(y), np.zeros((18, 1), dtype=np.int64)) == pytest.approx(expected)


def test_a_measure_that_only_says_the_setting_has_no_information_given_it() -> None:
    """Pooled it orders most pairs; within one width it orders none."""
    rng = np.random.default_rng(0)
    rows: list[tuple[str, ...]] = [("a", str(width), str(trial)) for width in range(6) for trial in range(8)]
    x = np.repeat(np.arange(6.0), 8)
    table = Table(rows, x, x + 0.2 * rng.normal(size=48))
    found = {one.axes: one.value for one in conditional.conditional(AXES, table.found.levels, [x], table.y)[0]}
    assert found[()] is not None
    assert found[()] > 0.5
    assert found["width",] == pytest.approx(0, abs=1e-12)
    assert granulated(table.found, x, table.y)["optimizer"].value == 0
