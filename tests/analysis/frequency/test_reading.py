"""Reading of spectra, means over models, coefficients at a loss, and the interval, against loops and closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatmin.analysis import frequency, published
from flatmin.errors import RequestError


def test_a_label_has_its_parts_of_the_models_that_ended(made: Any, make: Any) -> None:
    models = made.models.assign(status=["diverged", *["finished"] * (len(made.models) - 1)])
    other = make.curve("sgd-1", "error", 3.0, {5: 0.5}, label="fourier(data=test)")
    theirs = make.curve("sgd-1", "error", 0.0, {5: 0.5}, label="fourier(published=true)", published=True)
    density = made.spectra.iloc[:3].assign(kind="hessian_density")
    spectra = pd.concat([density, theirs, made.spectra, other], ignore_index=True)
    first, second, third = frequency.read(spectra, models)
    assert [first.label, second.label, third.label] == ["fourier", "fourier(data=test)", "fourier(published=true)"]
    assert [first.published, second.published, third.published] == [False, False, True]
    ratio = made.spectra[made.spectra["settings"].str.contains("ratio") & (made.spectra["model_id"] != "adam-0")]
    assert first.ratio["value"].tolist() == ratio["value"].tolist()
    assert first.ratio["model_id"].astype(str).tolist() == ratio["model_id"].tolist()
    assert first.ratio["line"].astype(str).tolist() == [name[:-2] for name in ratio["model_id"]]
    assert second.ratio.empty
    assert second.error[["epoch", "k", "value"]].to_numpy().tolist() == [[5.0, 3.0, 0.5]]


def test_spectra_of_no_model_are_named_and_empty(made: Any) -> None:
    (only,) = frequency.read(made.spectra, made.models.assign(status="diverged"))
    assert only.ratio.empty
    assert only.error.empty
    assert frequency.read(made.spectra.iloc[:0], made.models) == []


def test_models_without_an_optimizer_are_one_line(made: Any) -> None:
    (only,) = frequency.read(made.spectra, made.models.drop(columns="optimizer"))
    assert set(only.ratio["line"]) == {frequency.ALL}


def test_models_whose_optimizer_is_null_are_a_line_of_their_own(made: Any) -> None:
    known = made.models["optimizer"] != "sgd"
    (curves,) = frequency.read(made.spectra, made.models.assign(optimizer=made.models["optimizer"].where(known, None)))
    assert set(curves.ratio["line"]) == {"adam", frequency.UNKNOWN}


def test_a_table_that_is_no_spectrum_is_refused(made: Any) -> None:
    with pytest.raises(RequestError, match="spectra table: the table has no column 'x'"):
        frequency.read(made.spectra.drop(columns="x"), made.models)


def test_means_are_over_the_models_of_each_line(made: Any) -> None:
    (only,) = frequency.read(made.spectra, made.models)
    found: Any = frequency.over_models(only.ratio, most_epochs=10, most_frequencies=3)
    assert sorted(found["k"].unique()) == [0, 2, 8]
    assert found["epoch"].nunique() <= 10
    assert set(found["epoch"]) >= {1.0, 60.0}
    for row in found.sample(20, random_state=0).itertuples():
        own = only.ratio[(only.ratio["line"] == row.line) & (only.ratio["k"] == row.k)]
        values = own.loc[own["epoch"] == row.epoch, "value"].to_numpy()
        np.testing.assert_allclose([row.mean, row.sd], [values.mean(), values.std(ddof=1)], rtol=1e-9, atol=1e-15)
        assert row.n == 4


def test_optimizers_of_other_lengths_keep_their_own_epochs(make: Any) -> None:
    long = make(exponents={"sgd": 1.0}, epochs=range(10, 1210, 10), seeds=1)
    short = make(exponents={"adam": 1.0}, epochs=range(10, 810, 10), seeds=1)
    spectra, models = pd.concat([long.spectra, short.spectra]), pd.concat([long.models, short.models])
    (only,) = frequency.read(spectra, models)
    found = frequency.over_models(only.ratio, most_epochs=50)
    last = found.groupby("line")["epoch"].agg(["max", "nunique"])
    assert last["max"].to_dict() == {"adam": 800.0, "sgd": 1200.0}
    assert last["nunique"].between(35, 50).all()


def test_losses_are_averaged_as_logarithms(made: Any) -> None:
    epochs = made.epochs.assign(train_loss=made.epochs["train_loss"].mask(made.epochs["epoch"] == 7, 0.0))
    found: Any = frequency.losses(epochs, made.models, most_epochs=100).set_index(["line", "epoch"])
    own = made.epochs[made.epochs["model_id"].str.startswith("sgd") & (made.epochs["epoch"] == 9)]["train_loss"]
    np.testing.assert_allclose(found.loc[("sgd", 9.0), "mean"], np.log10(stats.gmean(own)), rtol=1e-12)
    assert ("sgd", 7.0) not in found.index


def test_coefficients_at_a_loss_are_those_of_the_first_epoch_there(made: Any) -> None:
    (only,) = frequency.read(made.spectra, made.models)
    epochs = made.epochs.copy()
    # rises again later, and one model never gets there
    epochs.loc[epochs["epoch"] == 40, "train_loss"] = 5.0
    epochs.loc[epochs["model_id"] == "sgd-2", "train_loss"] = 0.21
    found: Any = frequency.at_loss(only.ratio, epochs).set_index(["model_id", "k"])
    assert len(found) == len(made.models) * 5
    for name in made.models["model_id"]:
        own = epochs[(epochs["model_id"] == name) & (epochs["train_loss"] <= 0.2)]
        if name == "sgd-2":
            assert found.loc["sgd-2", ["epoch", "value"]].isna().all().all()
            continue
        first = own["epoch"].min()
        for k in (0, 1, 8):
            rows = only.ratio[(only.ratio["model_id"] == name) & (only.ratio["k"] == k)]
            expected = rows.loc[rows["epoch"] == first, "value"].item()
            assert found.loc[(name, k), ["epoch", "value"]].tolist() == [first, expected]


def test_without_a_recorded_loss_nothing_gets_there(made: Any) -> None:
    (only,) = frequency.read(made.spectra, made.models)
    for epochs in (pd.DataFrame(), made.epochs.assign(epoch=made.epochs["epoch"] + 1000)):
        found: Any = frequency.at_loss(only.ratio, epochs)
        assert len(found) == len(made.models) * 5
        assert found[["epoch", "value"]].isna().all().all()


def test_coefficients_stand_beside_the_published_ones(make: Any) -> None:
    made = make(exponents={"sgd": 1.0, "adam": 2.0}, ks=(1, 2, 4, 8), study="frequency-sinusoids")
    curves = frequency.read(made.spectra, made.models)
    measures = frequency.with_ratios(pd.DataFrame(), curves, made.models, made.epochs)
    compared: Any = published.compare(made.models, measures, made.epochs).set_index(["settings", "quantity"])
    at = frequency.at_loss(curves[0].ratio, made.epochs)
    own = at[(at["line"] == "sgd") & (at["k"] == 8)]["value"]
    row = compared.loc[('{"optimizer": "sgd"}', "fourier_ratio(8)")]
    np.testing.assert_allclose([row["ours"], row["ours_sd"], row["value"]], [own.mean(), own.std(), 0.497], rtol=1e-12)
    assert row["ours_n"] == 4


def test_measures_stay_as_they_are_without_a_spectrum(made: Any) -> None:
    sharpness = pd.DataFrame({"model_id": ["a"], "label": ["lpf"], "value": [1.0]})
    assert frequency.with_ratios(sharpness, [], made.models, made.epochs) is sharpness
    curves = frequency.read(made.spectra, made.models)
    both = frequency.with_ratios(sharpness, curves, made.models, made.epochs)
    assert both["label"].value_counts().to_dict() == {"lpf": 1} | {f"fourier_ratio({k})": 8 for k in (0, 1, 2, 4, 8)}


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_interval_of_a_mean_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(3, 2, n)
    every = np.array([np.mean(some) for some in itertools.product(values, repeat=n)])
    found: Any = frequency.interval(float(values.mean()), every, n)
    expected = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_there_is_no_interval_of_one_model_or_of_nothing() -> None:
    assert frequency.interval(1.0, np.ones(10), 1) == (None, None)
    assert frequency.interval(math.nan, np.ones(10), 5) == (None, None)
    assert frequency.interval(1.0, np.array([1.0, *[math.nan] * 9]), 5) == (None, None)
