"""Epochs to learn a frequency and the spectral bias, against loops, closed forms, SciPy and simulated laws."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from scipy import stats

from flatmin.analysis import censored, frequency, frequency_learning
from flatmin.analysis.frequency_learning import Bias
from flatmin.errors import RequestError

Floats = npt.NDArray[np.float64]


def ratio_of(make: Any, curves: dict[tuple[str, float], dict[int, float]]) -> pd.DataFrame:
    spectra = pd.concat([make.curve(model, "ratio", k, points) for (model, k), points in curves.items()])
    models = pd.DataFrame({"model_id": sorted({model for model, _ in curves}), "optimizer": "sgd"})
    return frequency.read(spectra, models)[0].ratio


def test_a_frequency_is_learnt_at_the_first_record_within_the_tolerance(make: Any) -> None:
    curves = {
        ("a", 1.0): {0: 1.0, 5: 0.5, 10: 0.95, 15: 1.3, 20: 1.05, 25: 0.99},
        ("a", 2.0): {0: 0.0, 5: 1.0, 10: 1.0, 15: 1.0, 20: 1.0, 25: 1.0},
        ("a", 4.0): {0: 0.0, 5: 0.2, 10: 0.3, 15: 0.4, 20: 0.5, 25: 0.6},
        ("a", 8.0): {0: 0.0, 5: 0.2, 10: 1.0, 15: 1.0, 20: 1.0, 25: math.nan},
    }
    columns = ["k", "after", "epoch", "end"]
    found = frequency_learning.epochs_to_learn(ratio_of(make, curves))[columns]
    assert found.to_numpy().tolist() == [[1, 5, 10, 25], [2, 0, 5, 25], [4, 25, math.inf, 25], [8, 5, 10, 25]]
    lasting = frequency_learning.epochs_to_learn(ratio_of(make, curves), lasting=True)[columns]
    assert lasting.to_numpy().tolist() == [[1, 15, 20, 25], [2, 0, 5, 25], [4, 25, math.inf, 25], [8, 25, math.inf, 25]]
    wide = frequency_learning.epochs_to_learn(ratio_of(make, curves), tolerance=0.4, lasting=True)
    assert wide["epoch"].tolist() == [10.0, 5.0, 25.0, math.inf]


@pytest.mark.parametrize("lasting", [False, True])
def test_random_curves_agree_with_a_loop(make: Any, lasting: bool) -> None:
    rng = np.random.default_rng(0)
    curves = {}
    for model, k in itertools.product("abc", (1.0, 2.0, 3.0)):
        records = rng.choice(np.arange(1, 100), size=rng.integers(1, 12), replace=False)
        curves[model, k] = {int(epoch): float(rng.choice([0.5, 1.0, 1.02])) for epoch in np.sort(records)}
    found: Any = frequency_learning.epochs_to_learn(ratio_of(make, curves), lasting=lasting).set_index(
        ["model_id", "k"]
    )
    for key, points in curves.items():
        epochs = sorted(points)
        inside = [points[epoch] >= 1 for epoch in epochs]
        hits = [place for place in range(len(epochs)) if (all(inside[place:]) if lasting else inside[place])]
        place = hits[0] if hits else len(epochs)
        expected = [epochs[place] if hits else math.inf, epochs[place - 1] if place else 0, epochs[-1]]
        assert found.loc[key, ["epoch", "after", "end"]].tolist() == expected


@pytest.mark.parametrize("tolerance", [0.0, -0.1, 1.0, math.nan])
def test_a_tolerance_that_is_none_is_refused(made: Any, tolerance: float) -> None:
    (curves,) = frequency.read(made.spectra, made.models)
    with pytest.raises(RequestError, match=r"tolerance: .* between 0 and 1"):
        frequency_learning.epochs_to_learn(curves.ratio, tolerance=tolerance)


def bounds(rng: np.random.Generator, n: int, slope: float, end: float) -> tuple[Floats, Floats, Floats]:
    """Frequencies 1, 2, 4, 8 of n models, recorded every 10 epochs up to `end`: x, and log bounds."""
    x = np.tile(np.log([1.0, 2.0, 4.0, 8.0]), n)
    epochs = np.exp(4 + slope * x + 0.3 * rng.normal(size=4 * n))
    high = np.ceil(epochs / 10) * 10
    low = np.where(high > end, end, high - 10)
    high[high > end] = np.inf
    with np.errstate(divide="ignore"):
        return x, np.log(low), np.log(high)


def test_narrow_bounds_give_least_squares() -> None:
    rng = np.random.default_rng(0)
    x, y, weights = rng.normal(5, 2, 40), rng.normal(size=40), rng.integers(0, 4, (3, 40)).astype(float)
    found = censored.fit(x, y - 1e-6, y + 1e-6, weights)
    for place, own in enumerate(weights):
        slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(own))
        spread = math.sqrt(np.average((y - intercept - slope * x) ** 2, weights=own))
        ours = [found.slope[place], found.intercept[place], found.spread[place]]
        np.testing.assert_allclose(ours, [slope, intercept, spread], rtol=1e-4, atol=1e-5)


def test_bounds_give_the_maximum_likelihood_that_scipy_finds() -> None:
    x, low, high = bounds(np.random.default_rng(1), 20, 2.0, 1000.0)
    low[:3] = -np.inf
    assert np.isinf(high).sum() > 10
    found = censored.fit(x, low, high, np.ones((1, len(x))))
    slope = found.slope[0]
    rest = np.column_stack([low, high]) - slope * x[:, None]
    loc, scale = stats.norm.fit(stats.CensoredData.interval_censored(*rest.T))
    np.testing.assert_allclose([found.intercept[0], found.spread[0]], [loc, scale], rtol=1e-3)

    def likelihood(b: float) -> float:
        """The profile of the slope, in SciPy's words."""
        ends = np.column_stack([low, high]) - b * x[:, None]
        loc, scale = stats.norm.fit(stats.CensoredData.interval_censored(*ends.T))
        low_end, high_end = (ends.T - loc) / scale
        return float(np.log(stats.norm.cdf(high_end) - stats.norm.cdf(low_end)).sum())

    here = likelihood(slope)
    assert here > likelihood(slope - 0.02)
    assert here > likelihood(slope + 0.02)


def test_a_known_slope_is_found_although_a_third_is_never_seen() -> None:
    rng = np.random.default_rng(2)
    ours, dropped = [], []
    for _ in range(100):
        x, low, high = bounds(rng, 5, 2.0, 700.0)
        seen = np.isfinite(high)
        ours.append(censored.fit(x, low, high, np.ones((1, 20))).slope[0])
        dropped.append(np.polyfit(x[seen], high[seen], 1)[0])
    assert np.mean(ours) == pytest.approx(2.0, abs=3 * np.std(ours) / 10 + 0.01)
    # what leaving out the frequencies never learnt would say
    assert np.mean(dropped) < 2.0 - 5 * np.std(dropped) / 10


def test_extreme_bounds_stay_finite() -> None:
    x = np.array([0.0, 1.0, 2.0, 3.0])
    low = np.array([-np.inf, 2.0, 4.0, 5.0])
    found = censored.fit(x, low, np.array([1.0, 2.0 + 1e-4, 4.0 + 1e-4, np.inf]), np.ones((1, 4)))
    assert found.slope[0] == pytest.approx(2.0, abs=0.01)
    far = censored.fit(x, low * 1e3, np.array([1e3, 2e3 + 1, 4e3 + 1, np.inf]), np.ones((1, 4)))
    assert far.slope[0] == pytest.approx(2000, abs=10)


def test_exact_laws_have_a_slope_and_hardly_a_spread() -> None:
    x = np.log([1.0, 2.0, 4.0])
    found = censored.fit(x, 1 + 2 * x - 1e-3, 1 + 2 * x + 1e-3, np.ones((1, 3)))
    np.testing.assert_allclose([found.slope[0], found.intercept[0]], [2, 1], atol=1e-6)
    assert 0 < found.spread[0] < 0.02


def test_without_two_frequencies_there_is_no_line() -> None:
    x, ones = np.array([0.0, 1.0, 2.0]), np.ones((2, 3))
    low, high = np.array([1.0, 5.0, 5.0]), np.array([1.1, np.inf, np.inf])
    assert np.isnan(censored.fit(x, low, high, ones).slope).all()
    weights = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    slope = censored.fit(x, low, np.array([1.1, 5.1, np.inf]), weights).slope
    assert np.isnan(slope).tolist() == [False, True]


def test_the_bias_of_every_optimizer_is_its_law(made: Any) -> None:
    (curves,) = frequency.read(made.spectra, made.models)
    learnt = frequency_learning.epochs_to_learn(curves.ratio)
    adam, sgd = frequency_learning.biases(learnt)
    for bias, law in ((adam, 1.0), (sgd, 2.0)):
        assert bias.low is not None
        assert bias.high is not None
        assert bias.low < law < bias.high < bias.low + 1
        assert (bias.models, bias.count) == (4, 16)
    # 90 % at epoch 3.3 t: k = 8 of sgd would take 425 epochs, of which there are 60
    never = learnt[(learnt["line"] == "sgd") & np.isinf(learnt["epoch"])]
    assert sgd.learnt == 16 - len(never) == 8
    assert set(never["k"]) == {4.0, 8.0}
    table: Any = frequency_learning.medians(learnt).set_index(["line", "k"])
    assert table.loc[("sgd", 8.0)].tolist() == [math.inf, 4, 4]
    assert table.loc[("adam", 8.0), "median"] == pytest.approx(16 * math.log2(10), rel=0.1)


def test_the_interval_covers_the_slope_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = []
    for _ in range(40):
        x, low, high = bounds(rng, 5, 1.5, 500.0)
        rows = pd.DataFrame({"line": "sgd", "k": np.exp(x), "after": np.exp(low), "epoch": np.exp(high), "end": 500.0})
        rows["model_id"] = np.repeat(list("abcde"), 4)
        (bias,) = frequency_learning.biases(rows, resamples=60)
        hits.append(bias.low is not None and bias.high is not None and bias.low <= 1.5 <= bias.high)
    assert sum(hits) >= stats.binom.ppf(0.001, 40, 0.9)


def test_one_model_has_a_slope_without_an_interval(make: Any) -> None:
    made = make(exponents={"sgd": 1.0}, seeds=1)
    (curves,) = frequency.read(made.spectra, made.models)
    (bias,) = frequency_learning.biases(frequency_learning.epochs_to_learn(curves.ratio))
    assert bias.slope == pytest.approx(1.0, abs=0.2)
    assert (bias.low, bias.high) == (None, None)
    assert "n = 1" in frequency_learning.in_words(bias)


def test_what_was_never_learnt_gives_a_reason(make: Any) -> None:
    made = make(exponents={"sgd": 2.0}, scale=1e6)
    (curves,) = frequency.read(made.spectra, made.models)
    (bias,) = frequency_learning.biases(frequency_learning.epochs_to_learn(curves.ratio))
    assert (bias.slope, bias.learnt, bias.count) == (None, 0, 16)
    assert frequency_learning.in_words(bias) == "sgd: no exponent (n = 4), for no frequency was learnt"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.5, 1.0, "low frequencies first"), (-0.2, 0.3, "no order"), (-1.0, -0.5, "high frequencies first")],
)
def test_the_order_is_said_where_the_interval_knows_it(low: float, high: float, said: str) -> None:
    assert said in frequency_learning.in_words(Bias("sgd", 5, 20, 20, (low + high) / 2, low, high, 1.0))
