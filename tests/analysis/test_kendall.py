"""Kendall's tau-b and its bootstrap against scipy and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from flatmin.analysis import kendall


def brute_tau(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, pair by pair."""
    agree = untied_x = untied_y = 0.0
    for i, j in itertools.combinations(range(len(x)), 2):
        sx, sy = np.sign(x[i] - x[j]), np.sign(y[i] - y[j])
        agree += sx * sy
        untied_x += abs(sx)
        untied_y += abs(sy)
    return float(agree / math.sqrt(untied_x * untied_y))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_tau_is_the_definition(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 30))
    if ties:
        x, y = np.round(x), np.round(y)
    assert kendall.tau_b(x, y) == pytest.approx(brute_tau(x, y), abs=1e-12)


@pytest.mark.parametrize(("x", "y"), [([1.0], [2.0]), ([], []), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0])])
def test_tau_without_untied_pairs_is_undefined(x: list[float], y: list[float]) -> None:
    assert math.isnan(kendall.tau_b(np.array(x), np.array(y)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_tau_a_is_the_definition(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 30))
    if ties:
        x, y = np.round(x), np.round(y)
    pairs = list(itertools.combinations(range(30), 2))
    agree = sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs)
    assert kendall.tau_a(x, y) == pytest.approx(agree / len(pairs), abs=1e-12)
    assert kendall.tied_pairs(x, y) == sum(x[i] == x[j] or y[i] == y[j] for i, j in pairs)


def test_tau_a_of_a_constant_is_zero_and_of_one_point_undefined() -> None:
    assert kendall.tau_a(np.array([1.0, 1.0]), np.array([1.0, 2.0])) == 0
    assert math.isnan(kendall.tau_a(np.array([1.0]), np.array([1.0])))


@pytest.mark.parametrize("m", [5, 40, 1100])
def test_every_resample_is_scipys_tau_of_the_drawn_points(m: int) -> None:
    rng = np.random.default_rng(m)
    x = np.round(rng.normal(size=m), 1)
    y = x + rng.normal(size=m)
    counts = np.random.default_rng(7).multinomial(m, np.full(m, 1 / m), size=12)
    taus = kendall.bootstrap_tau(x, y, counts.astype(np.float32))
    for tau, count in zip(taus, counts, strict=True):
        drawn = np.repeat(np.arange(m), count)
        assert tau == pytest.approx(stats.kendalltau(x[drawn], y[drawn]).statistic, abs=1e-12)


def test_a_resample_of_one_point_is_undefined_and_the_others_are_not() -> None:
    counts = np.array([[2, 0], [1, 1], [0, 2]], dtype=np.float32)
    taus = kendall.bootstrap_tau(np.array([1.0, 2.0]), np.array([5.0, 9.0]), counts)
    np.testing.assert_array_equal(taus, [np.nan, 1.0, np.nan])


def test_values_at_the_ends_of_the_float_range_do_not_overflow() -> None:
    x = np.array([-1.7e308, 0.0, 1.7e308, 1.0])
    taus = kendall.bootstrap_tau(x, -x, np.array([[1, 1, 1, 1], [2, 0, 2, 0]], dtype=np.float32))
    np.testing.assert_allclose(taus, [-1.0, -1.0])
    assert kendall.tau_b(x, -x) == -1.0
