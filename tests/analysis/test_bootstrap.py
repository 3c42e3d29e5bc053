"""Draws, intervals and p-values of the bootstrap over configurations, and the seeds that an interval would need."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatmin.analysis import bootstrap, configurations, kendall
from flatmin.analysis.correlation import correlate


def grid(configs: int, seeds: int) -> configurations.Configurations:
    table = pd.DataFrame({"c": np.repeat(np.arange(configs), seeds)})
    return configurations.of(table, ["c"], repeated=True)


def noisy(configs: int, seeds: int, noise: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A measure of configurations that the target follows, each seen through the noise of seeds."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(rng.normal(size=configs), seeds)
    return truth + noise * rng.normal(size=truth.size), truth + noise * rng.normal(size=truth.size)


def test_a_draw_has_as_many_configurations_as_there_are() -> None:
    drawn = bootstrap.draw(30, 200, 1)
    assert drawn.counts.shape == (200, 30)
    assert set(drawn.counts.sum(axis=1)) == {30}
    assert (drawn.shrink, drawn.part.tolist()) == (1.0, list(range(30)))


def test_the_p_value_is_below_5_percent_where_the_interval_is_clear_of_zero() -> None:
    rng = np.random.default_rng(0)
    for centre in np.linspace(-3, 3, 25):
        drawn = centre + rng.normal(size=1999)
        low, high = bootstrap.interval(centre, drawn, centre, 1.0)
        assert low is not None
        assert high is not None
        p = bootstrap.p_value(centre, drawn, centre, 1.0)
        assert p is not None
        assert (p < 0.05) == (low > 0 or high < 0)
        assert p == pytest.approx(2 * stats.norm.sf(abs(centre)), abs=0.05)


def test_without_resamples_there_is_neither() -> None:
    assert bootstrap.interval(0.5, np.full(3, np.nan), 0.5, 1.0) == (None, None)
    assert bootstrap.p_value(0.5, np.empty(0), 0.5, 1.0) is None


def test_a_part_of_a_large_table_has_the_interval_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = noisy(1200, 1, 1.0)
    frame = pd.DataFrame({"c": range(1200), "x": x, "gap": y})
    whole = correlate(frame, target="gap", axes=["c"], measures=["x"], controls=False)
    monkeypatch.setattr(bootstrap, "MOST_CONFIGURATIONS", 300)
    part = correlate(frame, target="gap", axes=["c"], measures=["x"], controls=False)
    assert whole.notes == ()
    assert part.notes == ("intervals and cmi are from a random 300 of 1200 configurations",)
    one, other = whole.measures["x"], part.measures["x"]
    assert one.tau == other.tau
    for ends in ((one.tau_low, other.tau_low), (one.tau_high, other.tau_high)):
        assert ends[0] == pytest.approx(ends[1], abs=0.015)


def test_many_seeds_halve_an_interval_that_noise_makes() -> None:
    """With B the variance of one seed: A + B / s falls to a quarter at B / (now / 4 - A)."""
    found = grid(40, 4)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 160))

    def statistic(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Normal numbers, exactly of variance 1/8 for four seeds and 1/2 for one: A = 0, B = 1/2."""
        scale = math.sqrt(1 / 8) if one.shape == (40,) and np.allclose(one, found.means(x)) else math.sqrt(1 / 2)
        return np.asarray(scale * stats.zscore(np.arange(200.0), ddof=1))

    assert bootstrap.seeds_to_halve(found, x, y, statistic) == pytest.approx(16)


def test_seeds_cannot_halve_an_interval_that_configurations_make() -> None:
    drawn = bootstrap.draw(40, 400, 0)

    def statistic(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return kendall.bootstrap_tau(one, other, drawn.counts)

    assert bootstrap.seeds_to_halve(grid(40, 4), *noisy(40, 4, 0.01), statistic) == math.inf
    assert bootstrap.seeds_to_halve(grid(40, 1), *noisy(40, 1, 0.1), statistic) is None
    assert bootstrap.seeds_to_halve(grid(3, 4), *noisy(3, 4, 0.1), statistic) is None
