"""Accuracy against errors of frequencies: correlation and Lasso, against SciPy, closed forms and planted laws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from scipy import stats
from sklearn.linear_model import Lasso, LinearRegression

from flatmin.analysis import frequency, frequency_accuracy
from flatmin.analysis.frequency_accuracy import PENALTY, Panel

Floats = npt.NDArray[np.float64]


def planted(rng: np.random.Generator, *, seeds: int = 5, epochs: int = 60, noise: float = 0.02) -> Panel:
    """Accuracy falls with the error of frequency 3 alone; what all models share moves with the epoch."""
    ks = np.arange(12.0)
    shared = rng.random((epochs, len(ks)))
    errors = shared + noise * rng.normal(size=(seeds, epochs, len(ks)))
    accuracy = 0.9 - 0.2 * errors[:, :, 3] + noise * 0.1 * rng.normal(size=(seeds, epochs))
    return Panel(np.arange(1.0, epochs + 1), ks, accuracy, errors)


def test_accuracy_and_errors_meet_at_their_epochs(made: Any) -> None:
    (curves,) = frequency.read(made.spectra, made.models)
    epochs = made.epochs[made.epochs["epoch"] % 2 == 0]
    found = frequency_accuracy.panels(curves.error, epochs, "val_acc")
    assert list(found) == ["adam", "sgd"]
    panel = found["sgd"]
    assert panel.ks.tolist() == [0, 1, 2, 4, 8]
    assert panel.epochs.tolist() == list(range(2, 61, 2))
    assert panel.errors.shape == (4, 30, 5)
    rows = curves.error[(curves.error["model_id"] == "sgd-2") & (curves.error["k"] == 4)].set_index("epoch")["value"]
    assert panel.errors[2, :, 3].tolist() == rows[rows.index % 2 == 0].tolist()
    own = epochs[epochs["model_id"] == "sgd-2"]["val_acc"]
    assert panel.accuracy[2].tolist() == own.tolist()


def test_a_frequency_that_some_model_never_has_is_left_out(made: Any) -> None:
    spectra = made.spectra[(made.spectra["x"] != 4) | (made.spectra["model_id"] != "sgd-2")]
    (curves,) = frequency.read(spectra, made.models)
    found = frequency_accuracy.panels(curves.error, made.epochs, "val_acc")
    assert found["adam"].ks.tolist() == [0, 1, 2, 8]


def test_validation_comes_before_test() -> None:
    epochs = pd.DataFrame({"val_acc": [0.1, None], "test_acc": [0.2, 0.3]})
    assert frequency_accuracy.accuracy_column(epochs) == "val_acc"
    assert frequency_accuracy.accuracy_column(epochs.assign(val_acc=None)) == "test_acc"
    assert frequency_accuracy.accuracy_column(epochs.assign(val_acc=None, test_acc=None)) is None


def test_means_skip_what_a_model_does_not_have() -> None:
    values = np.array([[1.0, 2.0], [3.0, math.nan], [8.0, math.nan]])
    assert frequency_accuracy.means(values, np.array([2.0, 1.0, 0.0])).tolist() == [5 / 3, 2.0]
    assert math.isnan(frequency_accuracy.means(values, np.array([0.0, 1.0, 1.0]))[1])


def test_the_correlation_is_scipys_and_its_interval_holds_it() -> None:
    panel = planted(np.random.default_rng(0))
    (one,) = frequency_accuracy.associations({"sgd": panel})
    ours: Any = [one.pearson, one.slope, one.intercept]
    x, y = panel.errors.mean(axis=(0, 2)), panel.accuracy.mean(axis=0)
    expected = stats.linregress(x, y)
    np.testing.assert_allclose(ours, [expected.rvalue, *expected[:2]], rtol=1e-12)
    assert one.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
    assert one.low is not None
    assert one.high is not None
    assert -1 < one.low < expected.rvalue < one.high < 1
    assert (one.models, one.epochs) == (5, 60)


def test_a_constant_side_has_no_correlation() -> None:
    panel = planted(np.random.default_rng(0))
    flat = Panel(panel.epochs, panel.ks, np.full_like(panel.accuracy, 0.9), panel.errors)
    (one,) = frequency_accuracy.associations({"sgd": flat})
    assert (one.pearson, one.low, one.high, one.slope) == (None, None, None, None)
    assert frequency_accuracy.regressions({"sgd": flat}) == []


def standardised(values: Floats) -> Floats:
    return np.asarray((values - values.mean(axis=0)) / values.std(axis=0))


def test_the_lasso_meets_its_optimality_conditions() -> None:
    panel = planted(np.random.default_rng(1), noise=0.5)
    (one,) = frequency_accuracy.regressions({"sgd": panel}, resamples=2)
    late = panel.epochs > 18
    x, y = standardised(panel.errors[:, late, :10].mean(axis=0)), standardised(panel.accuracy[:, late].mean(axis=0))
    b = one.coefficients["coefficient"].to_numpy()
    assert one.epochs == len(y) == 42
    gradient = x.T @ (y - x @ b) / len(y)
    np.testing.assert_allclose(gradient[b != 0], PENALTY * np.sign(b[b != 0]), atol=2e-4)
    assert (np.abs(gradient[b == 0]) <= PENALTY + 2e-4).all()
    assert one.r2 == pytest.approx(1 - ((y - x @ b) ** 2).sum() / (y**2).sum())
    assert one.r2 < LinearRegression().fit(x, y).score(x, y)


def test_the_published_lasso_leaves_out_falls_and_scales_by_the_largest(make: Any) -> None:
    """Of a table in which accuracy follows two indices, and falls at one late epoch for another reason."""
    rng, epochs = np.random.default_rng(3), np.arange(1, 41)
    axis = {"label": "fourier(published=true)", "published": True, "ks": range(12)}
    made = make(exponents={"sgd": 1.0}, seeds=2, epochs=epochs, **axis)
    errors = 0.5 + 0.1 * rng.random((len(epochs), 12))
    text = made.spectra["settings"].str.contains('"part": "error"')
    spectra = made.spectra[text].copy()
    spectra["value"] = [errors[int(epoch) - 1, int(k)] for epoch, k in zip(spectra["epoch"], spectra["x"], strict=True)]
    accuracy = 0.9 - 0.2 * errors[:, 3] + 0.1 * errors[:, 7]
    accuracy[34] = 0.1
    table = made.epochs.assign(val_acc=accuracy[made.epochs["epoch"].to_numpy() - 1])
    found = frequency_accuracy.as_published(frequency.read(spectra, made.models), table)
    late = np.setdiff1d(np.arange(12, 40), [34])
    assert accuracy[late].min() > accuracy[12:].mean() - accuracy[12:].std() > accuracy[34]
    x, y = errors[late, :10], accuracy[late]
    model = Lasso(alpha=PENALTY, fit_intercept=False, max_iter=100_000).fit(standardised(x), standardised(y))
    scaled = model.coef_ / np.abs(model.coef_).max()
    assert list(found) == ["lasso_r2", *[f"lasso_coefficient({k})" for k in range(10)]]
    np.testing.assert_allclose([found[f"lasso_coefficient({k})"] for k in range(10)], scaled, atol=1e-8)
    assert scaled[3] == -1
    assert found["lasso_r2"] == pytest.approx(model.score(standardised(x), standardised(y)))
    plain = spectra.assign(settings=spectra["settings"].str.replace('"published": true', '"published": false'))
    assert frequency_accuracy.as_published(frequency.read(plain, made.models), table) == {}
    assert frequency_accuracy.as_published(frequency.read(spectra, made.models), table.iloc[:0]) == {}


def test_orthogonal_columns_are_shrunk_by_the_penalty() -> None:
    # columns of a Hadamard matrix: standardised and orthogonal
    signs = np.array([[1.0]])
    for _ in range(5):
        signs = np.block([[signs, signs], [signs, -signs]])
    x = signs[:, 1:5]
    y = 0.8 * x[:, 0] - 0.5 * x[:, 1] + 0.005 * x[:, 2] + 0.33 * signs[:, 9]
    epochs = np.arange(1.0, 33.0) + 100
    (one,) = frequency_accuracy.regressions({"sgd": Panel(epochs, np.arange(4.0), y[None], x[None])})
    pulled = np.array([0.8, -0.5, 0.005, 0.0]) / y.std()
    expected = np.sign(pulled) * np.maximum(np.abs(pulled) - PENALTY, 0)
    np.testing.assert_allclose(one.coefficients["coefficient"], expected, atol=1e-6)
    assert one.coefficients[["low", "high", "same_sign"]].isna().all(axis=None)
    assert (one.r2_low, one.r2_unseen) == (None, None)


def test_a_planted_frequency_is_found_and_is_stable() -> None:
    rng = np.random.default_rng(2)
    pooled, *each = frequency_accuracy.regressions({"adam": planted(rng), "sgd": planted(rng)}, resamples=40)
    assert [one.line for one in (pooled, *each)] == [frequency_accuracy.POOLED, "adam", "sgd"]
    for one in (pooled, *each):
        table: Any = one.coefficients.set_index("k")
        assert table.index.tolist() == list(range(10))
        assert table.loc[3.0, "same_sign"] == 1
        assert table.loc[3.0, "high"] < -0.5
        assert table["coefficient"].abs().idxmax() == 3
        assert one.r2_low is not None
        assert one.r2_unseen is not None
        assert one.r2_low > 0.9
        assert one.r2_unseen > 0.8
    assert pooled.epochs == each[0].epochs + each[1].epochs


@pytest.mark.parametrize("ended", [1, 2, 4])
def test_models_that_stopped_early_are_resampled_with_the_others(ended: int) -> None:
    panel = planted(np.random.default_rng(5))
    panel.accuracy[:ended, 10:] = math.nan
    panel.errors[:ended, 10:] = math.nan
    (one,) = frequency_accuracy.regressions({"sgd": panel}, resamples=40)
    assert one.coefficients["coefficient"].abs().idxmax() == 3
    assert (one.coefficients["low"] <= one.coefficients["high"]).all()
    assert one.r2_low is not None
    assert (one.r2_unseen is None) == (ended == 4)


def test_a_model_of_one_late_epoch_is_nothing_to_try_a_fit_on() -> None:
    panel = planted(np.random.default_rng(5), seeds=20)
    ends = np.arange(20)[:, None] + 19 != np.arange(60)  # every model has one late epoch, another for each
    panel.accuracy[ends] = math.nan
    panel.errors[ends] = math.nan
    (one,) = frequency_accuracy.regressions({"sgd": panel}, resamples=40)
    assert one.r2_unseen is None


def test_chance_is_seen_on_the_model_left_out() -> None:
    rng = np.random.default_rng(3)
    errors, accuracy = rng.random((4, 30, 10)), rng.random((4, 30))
    panel = Panel(np.arange(1.0, 31.0), np.arange(10.0), accuracy, errors)
    (one,) = frequency_accuracy.regressions({"sgd": panel}, resamples=20)
    assert one.r2_unseen is not None
    assert one.r2 > 0.3 > 0 > one.r2_unseen
    assert one.coefficients["same_sign"].min() < 0.95


def test_too_few_epochs_are_not_fitted(make: Any) -> None:
    made = make(exponents={"sgd": 1.0}, epochs=range(1, 7))
    (curves,) = frequency.read(made.spectra, made.models)
    found = frequency_accuracy.panels(curves.error, made.epochs, "val_acc")
    assert len(found["sgd"].epochs) == 6
    assert len(frequency_accuracy.regressions(found, resamples=2)) == 1
    few = frequency_accuracy.panels(curves.error, made.epochs[made.epochs["epoch"] < 6], "val_acc")
    assert frequency_accuracy.regressions(few, resamples=2) == []
