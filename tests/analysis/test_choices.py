"""What a reader may choose: the tables of each choice, the words said of them, and the figures cut for one measure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatmin.analysis import choices, panels
from flatmin.analysis.association import MeasureCorrelation
from flatmin.analysis.conclusions import conclusions
from flatmin.analysis.correlation import Correlations
from flatmin.analysis.figures import against_axis, scatter


@pytest.fixture(scope="module")
def views(tables: Any) -> dict[tuple[str, str], choices.View]:
    found = choices.views(tables.models, tables.sharpness, "gen_gap")
    assert (found[0].filter, found[0].seeds) == ("all", "means")
    return {(view.filter, view.seeds): view for view in found}


def test_every_choice_is_there(views: Any, tables: Any) -> None:
    assert set(views) == {(filter, seeds) for filter in choices.FILTERS for seeds in choices.SEEDS}
    converged = (tables.models["status"] == "converged").sum()
    assert {view.result.n for (name, _), view in views.items() if name == "converged"} == {converged}
    assert {view.result.n for (name, _), view in views.items() if name == "all"} == {65}


def test_rows_are_every_model_and_have_no_interval(views: Any, tables: Any) -> None:
    models = tables.models[tables.models["status"] == "converged"]
    lpf = tables.sharpness[tables.sharpness["label"] == "lpf"].set_index("model_id")["value"]
    expected = stats.kendalltau(models["model_id"].map(lpf), models["gen_gap"]).statistic
    one = views["converged", "rows"].result.measures["lpf"]
    assert one.tau == pytest.approx(expected)
    assert one.tau == pytest.approx(views["converged", "means"].result.measures["lpf"].tau_rows)
    assert (one.tau_low, one.partial_low, one.q) == (None, None, None)
    assert set(one.psi) == {"width", "label_noise"}


def test_psi_of_rows_compares_models_of_one_seed() -> None:
    """Seed 0 goes with the gap, seed 1 against it: the two groups have psi 1 and -1."""
    rows = [(width, seed) for seed in (0, 1) for width in (1, 2, 3)]
    models = pd.DataFrame(rows, columns=["width", "seed"]).assign(status="finished", model_id=list("abcdef"))
    models["gen_gap"] = [0.1, 0.2, 0.4, 0.11, 0.21, 0.41]
    value = [1.0, 2.0, 3.0, 6.0, 5.0, 4.0]
    sharpness = pd.DataFrame({"model_id": models["model_id"], "label": "lpf", "value": value})
    rows_view = next(view for view in choices.views(models, sharpness, "gen_gap") if view.seeds == "rows")
    assert rows_view.result is not None
    psi = rows_view.result.measures["lpf"].psi["width"]
    assert (psi.value, psi.groups) == (0.0, 2)


def test_a_choice_that_changes_nothing_is_not_offered(tables: Any) -> None:
    one_seed = tables.models[tables.models["seed"] == 0].assign(status="finished")
    views = choices.views(one_seed, tables.sharpness, "gen_gap")
    assert [(view.filter, view.seeds) for view in views] == [("all", "means")]


def _one(tau: float, low: float, high: float, partial: float, n: int = 941) -> MeasureCorrelation:
    return MeasureCorrelation(tau, low, high, n, 314, tau, None, None, partial, None, None, bool(tau * partial < 0))


def test_conclusions_are_built_from_the_numbers() -> None:
    measures = {"lpf": _one(0.614, 0.57, 0.64, 0.5), "eps_sharpness": _one(-0.2, -0.3, 0.1, 0.3)}
    controls = {"random": _one(0.01, -0.1, 0.1, 0.0), "train_loss": _one(-0.4, -0.5, -0.3, -0.2)}
    result = Correlations("gen_gap", ("width",), 941, {}, measures, controls=controls)
    assert conclusions(result) == [
        "lpf ranks highest with gen_gap: tau .61 [.57, .64], n = 941, 314 configurations; given width, .50.",
        "Intervals of 1 of 2 measures are clear of zero.",
        "eps_sharpness changes sign given width: the settings order the gen_gap there.",
        "A random measure has tau .01 [−.10, .10]: 2 of 2 measures are further from zero.",
        "The training loss has tau −.40 [−.50, −.30]: 1 of 2 measures are further from zero.",
    ]
    assert conclusions(result, rows=True)[0].split(";")[0].endswith("n = 941")


def test_a_measure_that_goes_against_the_target_is_named() -> None:
    result = Correlations("gen_gap", (), 9, {}, {"a": _one(0.1, 0, 0.2, 0.1), "b": _one(-0.8, -0.9, -0.7, -0.5)})
    assert "Further from zero, but against it, is b: tau −.80 [−.90, −.70]" in conclusions(result)[0]


def test_nothing_is_concluded_from_nothing() -> None:
    undefined = MeasureCorrelation(None, None, None, 3, 3, None, None, None)
    assert conclusions(Correlations("gen_gap", (), 3, {}, {"flat": undefined})) == []


def test_a_panel_alone_has_its_own_points_colours_and_titles(tables: Any) -> None:
    data = scatter.data(tables.models, tables.sharpness)
    whole = panels.drawn(scatter.draw(data))
    alone = panels.alone(whole, "lpf")
    assert [trace["meta"] for trace in alone["data"]] == ["lpf"]
    assert alone["data"][0]["xaxis"] == "x2"
    layout = alone["layout"]
    assert {name for name in layout if name.startswith(("xaxis", "yaxis"))} == {"xaxis2", "yaxis2"}
    assert layout["xaxis2"]["domain"] == layout["yaxis2"]["domain"] == [0, 1]
    assert layout["yaxis2"]["title"]["text"] == "generalisation gap (fraction)"
    assert [note["text"] for note in layout["annotations"]] == ["lpf"]
    buttons, before = layout["updatemenus"][1]["buttons"], whole["layout"]["updatemenus"][1]["buttons"]
    assert buttons[1]["args"][0]["marker.color"] == before[1]["args"][0]["marker.color"][1:]


def test_errors_stay_above_a_measure_alone(tables: Any) -> None:
    whole = panels.drawn(against_axis.draw(against_axis.data(tables.models, tables.sharpness, axis="width")))
    alone = panels.alone(whole, "lpf")
    assert {trace.get("meta") for trace in alone["data"]} == {None, "lpf"}
    layout = alone["layout"]
    assert (layout["xaxis"]["matches"], layout["xaxis3"]["type"]) == ("x3", "log")
    assert layout["yaxis"]["domain"][0] > layout["yaxis3"]["domain"][1]
    assert layout["xaxis3"]["title"]["text"] == "width (units or channels)"
    assert [note["text"] for note in layout["annotations"]] == ["test error, training error", "lpf"]


def test_points_are_averaged_over_seeds(tables: Any) -> None:
    data = scatter.data(tables.models, tables.sharpness)
    means = scatter.averaged(data)
    assert len(means) == 2 * 22
    assert means["models"].sum() == len(data)
    own = data[(data["measure"] == "lpf") & (data["width"] == 8) & (data["label_noise"] == 0.2)]
    row = means[(means["measure"] == "lpf") & (means["width"] == 8) & (means["label_noise"] == 0.2)].iloc[0]
    np.testing.assert_allclose([row["value"], row["target_value"]], [own["value"].mean(), own["target_value"].mean()])
    assert len(scatter.draw(means).data) == 2


def test_thinned_points_are_the_same_models_everywhere(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "MOST_POINTS", 20)
    data = scatter.data(tables.models, tables.sharpness)
    thin = scatter.thinned(data)
    kept = [set(part["model_id"]) for _, part in thin.groupby("measure")]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 10
    assert (thin["target_value"].min(), thin["target_value"].max()) == (
        data["target_value"].min(),
        data["target_value"].max(),
    )
