"""The report's figures and tables of frequencies: what is in them, what is left out and why, and how large they are."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flatmin.analysis import frequency, listed_frequency, published, sections_frequency
from flatmin.analysis.figures import frequency_coefficients, frequency_epochs, frequency_errors, frequency_loss
from flatmin.analysis.report import report
from flatmin.analysis.section import Left, Section, Variant

NAMES = ("coefficients", "epochs", "errors", "accuracy", "regression", "loss")


def sections_of(made: Any, **changes: Any) -> tuple[dict[str, Variant], dict[str, str]]:
    """The figures by name, and the reasons by heading."""
    models, epochs = changes.get("models", made.models), changes.get("epochs", made.epochs)
    waves = frequency.read(changes.get("spectra", made.spectra), models)
    found = list(sections_frequency.sections(waves, models, epochs))
    figures = {one.name: one.variants[0] for one in found if isinstance(one, Section)}
    drawn = {name: variant for name, variant in figures.items() if isinstance(variant, Variant)}
    return drawn, {one.heading: one.reason for one in found if isinstance(one, Left)}


def table_of(made: Any, compared: pd.DataFrame | None = None) -> str:
    waves = frequency.read(made.spectra, made.models)
    compared = pd.DataFrame(columns=["quantity", "settings"]) if compared is None else compared
    return listed_frequency.tables(waves, made.epochs, compared)


@pytest.fixture(scope="module")
def whole(made: Any) -> tuple[dict[str, Variant], dict[str, str]]:
    """All that the report has of a study."""
    return sections_of(made)


def test_everything_is_there(whole: tuple[dict[str, Variant], dict[str, str]]) -> None:
    figures, left = whole
    assert set(figures) == {f"frequency-{name}-1" for name in NAMES}
    assert left == {}
    (bias,) = figures["frequency-epochs-1"].findings
    assert "adam 0.98 [0." in bias
    assert "8 of 16 never learnt): low frequencies first" in bias
    (explained,) = figures["frequency-regression-1"].findings
    assert "frequencies whose sign holds in 95 % of refits: 8" in explained
    for variant in figures.values():
        json.dumps(variant.figure, allow_nan=False)


def test_coefficients_have_a_panel_per_optimizer_and_a_line_per_frequency(made: Any) -> None:
    (curves,) = frequency.read(made.spectra, made.models)
    data = frequency_coefficients.data(curves.ratio)
    figure = frequency_coefficients.draw(data)
    lines = [trace for trace in figure.data if trace.name]
    assert [trace.name for trace in lines] == ["k = 0", "k = 1", "k = 2", "k = 4", "k = 8"] * 2
    assert [trace.xaxis for trace in lines] == ["x"] * 5 + ["x2"] * 5
    assert [bool(trace.showlegend) for trace in lines] == [True] * 5 + [False] * 5
    own = data[(data["line"] == "sgd") & (data["k"] == 8)]
    assert list(lines[-1].y) == own["mean"].tolist()
    high, low = [trace for trace in figure.data if not trace.name][-2:]
    np.testing.assert_allclose(np.array(high.y) - np.array(low.y), 2 * own["sd"])
    assert (low.fill, high.fill) == ("tonexty", None)
    assert len(figure.layout.shapes) == 2


def test_errors_stand_low_frequencies_below_and_have_both_scales(made: Any) -> None:
    (curves,) = frequency.read(made.spectra, made.models)
    data = frequency_errors.data(curves.error)
    figure = frequency_errors.draw(data)
    assert [trace.y for trace in figure.data] == [("0", "1", "2", "4", "8")] * 2
    assert (figure.layout.yaxis.type, figure.layout.yaxis2.type) == ("category", "category")
    heat = figure.data[1]
    own = data[(data["line"] == "sgd") & (data["k"] == 8)]
    assert heat.z[4].tolist() == own["mean"].tolist()
    assert heat.x.tolist() == own["epoch"].tolist()
    linear, logarithmic = figure.layout.updatemenus[1].buttons
    assert linear.args[0]["z"][1] == heat.z.tolist()
    np.testing.assert_allclose(logarithmic.args[0]["z"][1], np.log10(np.maximum(heat.z, 1e-3)))
    scale = logarithmic.args[1]["coloraxis"]
    assert (scale["cmin"], scale["cmax"]) == (-3, 0)
    assert scale["colorbar"]["tickvals"] == [-3, -2, -1, 0]


def test_epochs_to_learn_show_what_was_never_learnt(whole: tuple[dict[str, Variant], dict[str, str]]) -> None:
    data = whole[0]["frequency-epochs-1"].data
    never = data[(data["line"] == "sgd") & data["epoch"].isna()]
    assert len(never) == 8
    assert 0.0 not in set(data["k"])
    figure = frequency_epochs.draw(data)
    points, line = [trace for trace in figure.data if trace.legendgroup == "sgd"]
    assert [symbol == "arrow-up-open" for symbol in points.marker.symbol] == data[data["line"] == "sgd"][
        "epoch"
    ].isna().tolist()
    assert line.name.startswith("sgd: k^2.01 [1.8")
    slope = np.diff(np.log(line.y)) / np.diff(np.log(line.x))
    np.testing.assert_allclose(slope, data[data["line"] == "sgd"]["slope"].iloc[0])


def test_losses_are_a_line_per_optimizer(made: Any) -> None:
    figure = frequency_loss.draw(frequency_loss.data(made.epochs, made.models))
    assert [trace.name for trace in figure.data if trace.name] == ["adam", "sgd"]


def test_one_seed_and_one_optimizer_have_no_bands_and_no_intervals(make: Any) -> None:
    made = make(exponents={"sgd": 1.0}, seeds=1)
    figures, left = sections_of(made)
    assert set(figures) == {f"frequency-{name}-1" for name in NAMES}
    assert left == {}
    names = [trace.get("name") for trace in figures["frequency-coefficients-1"].figure["data"]]
    assert names == ["k = 0", "k = 1", "k = 2", "k = 4", "k = 8"]
    assert figures["frequency-regression-1"].data["line"].unique().tolist() == ["sgd"]
    assert "nan" not in table_of(made).lower()


def test_what_is_missing_is_said(made: Any) -> None:
    without, reasons = sections_of(made, epochs=made.epochs.assign(val_acc=np.nan))
    assert set(without) == {f"frequency-{name}-1" for name in ("coefficients", "epochs", "errors", "loss")}
    assert set(reasons.values()) == {"no accuracy was recorded under way."}
    without, reasons = sections_of(made, epochs=pd.DataFrame())
    assert set(without) == {f"frequency-{name}-1" for name in ("coefficients", "epochs", "errors")}
    assert "no epoch was recorded." in reasons.values()
    diverged = made.models.assign(status="diverged")
    assert sections_of(made, models=diverged) == ({}, {"Frequencies": "no model that counts has a spectrum."})
    apart = made.epochs.assign(epoch=made.epochs["epoch"] + 1000)
    assert "no epoch has both an accuracy and a spectrum." in sections_of(made, epochs=apart)[1].values()
    empty = made.spectra.assign(value=np.nan)
    assert set(sections_of(made, spectra=empty)[0]) == {"frequency-epochs-1", "frequency-loss-1"}
    amplitude = made.spectra[made.spectra["settings"].str.contains("amplitude")]
    assert sections_of(made, spectra=amplitude)[0] == {}


def test_a_study_whose_validation_set_is_its_test_set_says_so(make: Any) -> None:
    made = make(exponents={"sgd": 1.0}, seeds=1)
    epochs = made.epochs.rename(columns={"val_acc": "test_acc"})
    figures, _ = sections_of(made, epochs=epochs)
    assert figures["frequency-accuracy-1"].caption.startswith("Test accuracy (no validation set")


def test_the_published_axis_has_no_exponent(make: Any) -> None:
    made = make(exponents={"sgd": 1.0}, seeds=1, label="fourier(published=true)", published=True, ks=range(10))
    figures, left = sections_of(made)
    assert left == {
        "Epochs to learn a frequency: fourier(published=true)": "the published axis has indices, not frequencies."
    }
    assert "index of the published axis" in figures["frequency-errors-1"].caption
    assert "Low frequencies are above" in figures["frequency-errors-1"].caption
    said = [text for figure in figures.values() for text in (figure.caption, *figure.findings)]
    assert [text for text in said if "lowest" in text or "below." in text or "cycles over" in text] == []
    assert table_of(made) == ""


def test_many_spectra_are_named(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections_frequency, "MOST_LABELS", 1)
    parts = [make(exponents={"sgd": 1.0}, seeds=1, ks=(1, 2), epochs=(1, 2), label=f"fourier({n})") for n in range(2)]
    figures, left = sections_of(parts[0], spectra=pd.concat([one.spectra for one in parts]))
    assert left["Frequencies: fourier(1)"] == "only the first 1 of this kind are drawn."
    assert {name.rpartition("-")[2] for name in figures} == {"1"}


def test_tables_have_the_published_coefficients_and_what_never_got_there(make: Any) -> None:
    made = make(exponents={"sgd": 1.0, "adam": 2.0}, ks=(1, 2, 4, 8), study="frequency-sinusoids")
    made.epochs.loc[made.epochs["model_id"].isin(["sgd-0", "sgd-1"]), "train_loss"] = 0.3
    waves = frequency.read(made.spectra, made.models)
    measured = frequency.with_ratios(pd.DataFrame(), waves, made.models, made.epochs)
    text = table_of(made, published.compare(made.models, measured, made.epochs))
    at = frequency.at_loss(waves[0].ratio, made.epochs)
    own = at[(at["line"] == "sgd") & (at["k"] == 8)]["value"].dropna()
    assert f"<td>8</td><td>{own.mean():.3f}</td><td>{own.std():.3f}</td><td>2</td><td>2</td>" in text
    assert "<td>0.497</td>" in text
    for tolerance in listed_frequency.TOLERANCES:
        assert text.count(f'<th scope="row">sgd</th><td>{tolerance}</td>') == 1
    assert '<th scope="row">adam</th><td>0.1</td>' in text
    assert "<td>never</td>" in text


def test_no_model_at_the_loss_is_counted(made: Any) -> None:
    high = table_of(type(made)(made.models, made.epochs.assign(train_loss=1.0), made.spectra))
    assert high.count("<td>–</td><td>–</td><td>0</td><td>4</td><td>–</td><td>–</td>") == 10


def test_the_report_has_figures_and_tables(made: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    tables = {"models": made.models.assign(test_loss=0.1), "epochs": made.epochs, "spectra": made.spectra}
    text = report(study={}, path=path, **tables).read_text(encoding="utf-8")
    for name in NAMES:
        assert f'data-figure="frequency-{name}-1"' in text
    assert text.count('<section class="frequencies">') == 2
    # plotly.js alone is 4.8 MB
    assert len(text) < 5.6e6


@pytest.mark.slow
def test_four_million_points_make_a_small_report_quickly(make: Any, tmp_path: Path) -> None:
    laws = {name: 1.0 for name in ("adahessian", "adam", "scrn", "sgd")}
    made = make(exponents=laws, seeds=10, ks=range(21), epochs=range(1, 1601))
    assert len(made.spectra) > 4e6
    path, begin = tmp_path / "report.html", time.process_time()
    report(study={}, path=path, models=made.models.assign(test_loss=0.1), epochs=made.epochs, spectra=made.spectra)
    assert time.process_time() - begin < 60
    assert path.stat().st_size < 8e6
