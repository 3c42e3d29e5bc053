"""The numbers behind every figure, and that each one can be drawn from them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from flatmin.analysis import frames
from flatmin.analysis.correlation import correlate
from flatmin.analysis.figures import against_axis, correlations, scatter, theme, training
from flatmin.errors import RequestError


def drawn(figure: go.Figure) -> dict[str, Any]:
    """What a browser would get."""
    return dict(json.loads(figure.to_json()))


def test_against_axis_is_the_mean_and_range_over_seeds(tables: Any) -> None:
    data = against_axis.data(tables.models, tables.sharpness, axis="width", by="label_noise")
    rows = tables.models[(tables.models["width"] == 8) & (tables.models["label_noise"] == 0.2)]
    point = data[(data["quantity"] == "test_error") & (data["x"] == 8) & (data["by_value"] == 0.2)]
    errors = 1 - rows["test_acc"]
    assert len(point) == 1
    expected = [errors.mean(), errors.min(), errors.max(), errors.std(), 3]
    np.testing.assert_allclose(point[["mean", "low", "high", "std", "n"]].to_numpy()[0], expected)
    quantities = list(data["quantity"].unique())
    assert quantities == ["test_error", "train_error", "eps_sharpness(radius=0.1)", "lpf"]
    assert len(data) == 4 * 11 * 2


def test_against_axis_leaves_diverged_models_out(tables: Any) -> None:
    data = against_axis.data(tables.models, tables.sharpness, axis="width", by="label_noise")
    first = data[(data["x"] == 1) & (data["by_value"] == 0.0)]
    assert set(first["n"]) == {2}


def test_against_axis_serves_label_noise_too(tables: Any) -> None:
    data = against_axis.data(tables.models, axis="label_noise", measures=["n_params"])
    assert sorted(data["x"].unique()) == [0.0, 0.2]
    assert data["by_value"].isna().all()
    assert set(data.loc[data["kind"] == "measure", "quantity"]) == {"n_params"}
    assert drawn(against_axis.draw(data))["layout"]["xaxis"]["type"] == "linear"


def test_against_axis_falls_back_to_losses(tables: Any) -> None:
    models = tables.models.assign(train_acc=np.nan, test_acc=None)
    data = against_axis.data(models, axis="width")
    assert set(data["quantity"]) == {"train_loss", "test_loss"}
    assert set(data["kind"]) == {"loss"}
    assert "loss (nats)" in json.dumps(drawn(against_axis.draw(data)))


def test_against_axis_draws_a_few_of_many_lines(tables: Any) -> None:
    noises = np.linspace(0, 0.9, len(tables.models))
    data = against_axis.data(tables.models.assign(label_noise=noises), axis="width", by="label_noise")
    assert data["by_value"].nunique() <= against_axis.MOST_LINES


def test_against_axis_has_a_panel_per_measure_on_one_log_axis(tables: Any) -> None:
    figure = drawn(against_axis.draw(against_axis.data(tables.models, tables.sharpness, axis="width")))
    axes = [figure["layout"][name] for name in ("xaxis", "xaxis2", "xaxis3")]
    assert [axis["type"] for axis in axes] == ["log"] * 3
    assert "xaxis4" not in figure["layout"]
    assert axes[2]["title"]["text"] == "width (units or channels)"
    assert {trace["name"] for trace in figure["data"] if trace.get("showlegend")} == {
        "test error",
        "training error",
    }


def test_against_axis_refuses_a_name_for_an_axis(tables: Any) -> None:
    with pytest.raises(RequestError, match="axis: column 'network' is not numeric"):
        against_axis.data(tables.models, axis="network")


def test_scatter_has_a_row_per_model_and_measure(tables: Any) -> None:
    sharpness = tables.sharpness.assign(value=tables.sharpness["value"].where(tables.sharpness.index != 5))
    data = scatter.data(tables.models, sharpness)
    assert len(data) == 2 * (len(tables.models) - 1) - 1
    fixed = ["model_id", "measure", "value", "stderr", "target", "target_value"]
    assert list(data.columns) == [*fixed, "width", "label_noise", "seed"]
    model = tables.models.iloc[20]
    row = data[(data["model_id"] == model["model_id"]) & (data["measure"] == "lpf")].iloc[0]
    own = sharpness[(sharpness["model_id"] == model["model_id"]) & (sharpness["label"] == "lpf")].iloc[0]
    assert (row["value"], row["stderr"]) == (own["value"], own["stderr"])
    assert (row["target_value"], row["width"]) == (model["gen_gap"], model["width"])


def test_rows_of_joined_tables_are_not_multiplied(tables: Any) -> None:
    """Tables put together carry the same index values twice."""
    other = tables.models.assign(model_id=tables.models["model_id"] + "b")
    others = tables.sharpness.assign(model_id=tables.sharpness["model_id"] + "b")
    models, sharpness = pd.concat([tables.models, other]), pd.concat([tables.sharpness, others])
    assert len(scatter.data(models, sharpness)) == 2 * len(scatter.data(tables.models, tables.sharpness))
    twice = against_axis.data(models, axis="width")
    assert twice["n"].sum() == 2 * against_axis.data(tables.models, axis="width")["n"].sum()


def test_scatter_colours_by_every_setting(tables: Any) -> None:
    figure = drawn(scatter.draw(scatter.data(tables.models, tables.sharpness)))
    buttons = figure["layout"]["updatemenus"][1]["buttons"]
    assert [button["label"] for button in buttons] == ["width", "label_noise", "seed"]
    ranks, layout = buttons[1]["args"]
    assert {rank for panel in ranks["marker.color"] for rank in panel} == {0, 1}
    assert layout["coloraxis.colorbar.ticktext"] == ["0", "0.2"]
    assert [len(panel) for panel in ranks["marker.color"]] == [len(tables.models) - 1] * 2
    assert figure["layout"]["xaxis2"]["type"] == "log"
    assert figure["data"][0]["error_x"]["array"] is not None


def test_scatter_escapes_names_in_hover_text(tables: Any) -> None:
    models = tables.models.assign(network=["<i>a</i>", "b"] * (len(tables.models) // 2))
    figure = json.dumps(drawn(scatter.draw(scatter.data(models, tables.sharpness))))
    assert "<i>" not in figure
    assert "&lt;i&gt;a&lt;/i&gt;" in figure


def test_scatter_of_many_models_has_no_error_bars(tables: Any) -> None:
    data = pd.concat([scatter.data(tables.models, tables.sharpness)] * 20)
    traces = drawn(scatter.draw(data))["data"]
    assert {trace["type"] for trace in traces} == {"scattergl"}
    assert all("array" not in trace.get("error_x", {}) for trace in traces)


def test_correlations_are_sorted_and_undefined_comes_last(tables: Any) -> None:
    models = tables.models.assign(flat=1.0)
    result = correlate(models, tables.sharpness, measures=["flat", "n_params", "lpf"], target="test_loss")
    data = correlations.data(result)
    assert list(data["measure"])[:3] == ["lpf", "n_params", "flat"]
    assert set(data["measure"][3:]) == {"random", "train_loss"} == set(data.loc[data["control"], "measure"])
    assert np.isnan(data["tau"].iloc[2])
    assert data["tau_low"].iloc[0] == result.measures["lpf"].tau_low
    figure = drawn(correlations.draw(data))
    notes = figure["layout"]["annotations"]
    assert {note["y"] for note in notes if note["text"] == "undefined" and note["xref"] == "x"} == {"flat"}
    said = [text for trace in figure["data"] for text in trace["text"] if text.startswith("lpf: ")]
    assert len(said) == 2
    assert said[0].endswith("n = 65, 22 configurations")


def test_training_curves_average_over_the_models_of_a_value(tables: Any) -> None:
    data = training.data(tables.epochs, tables.models, axis="label_noise")
    kept = tables.models[frames.kept(tables.models)]
    ids = set(kept.loc[kept["label_noise"] == 0.2, "model_id"])
    rows = tables.epochs[tables.epochs["model_id"].isin(ids) & (tables.epochs["epoch"] == 3)]
    point = data[(data["quantity"] == "test_loss") & (data["value"] == 0.2) & (data["epoch"] == 3)]
    assert point["mean"].tolist() == [pytest.approx(rows["test_loss"].mean())]
    assert point["n"].tolist() == [33]
    assert set(data["quantity"]) == {"train_error", "test_error", "train_loss", "test_loss"}


def test_a_stopped_model_keeps_its_last_value() -> None:
    models = pd.DataFrame({"model_id": ["a", "b"], "status": ["converged", "finished"]})
    epochs = pd.DataFrame(
        {
            "model_id": ["a", "b", "b", "b"],
            "epoch": [1, 1, 2, 3],
            "train_loss": [0.0, 3.0, 2.0, 1.0],
            "test_loss": [None] * 4,
        }
    )
    data = training.data(epochs, models)
    assert data["quantity"].unique().tolist() == ["train_loss"]
    assert data["mean"].tolist() == [1.5, 1.0, 0.5]
    assert data["n"].tolist() == [2, 2, 2]


def test_training_curves_are_thinned_but_keep_both_ends() -> None:
    models = pd.DataFrame({"model_id": ["a"], "status": ["finished"]})
    epochs = pd.DataFrame({"model_id": "a", "epoch": range(1, 4001), "train_loss": 1.0})
    shown = training.data(epochs, models)["epoch"]
    assert len(shown) <= training.MOST_EPOCHS
    assert (shown.min(), shown.max()) == (1, 4000)
    assert (shown <= 100).sum() > 10


def test_training_draws_a_line_per_value_and_panel(tables: Any) -> None:
    figure = drawn(training.draw(training.data(tables.epochs, tables.models, axis="width")))
    assert len(figure["data"]) == 4 * training.MOST_LINES
    first = figure["data"][0]
    assert (first["name"], first["showlegend"]) == ("width 1", True)
    assert set(figure["layout"]["updatemenus"][0]["buttons"][1]["args"][0].values()) == {"log"}


def test_a_quantity_has_one_colour_everywhere() -> None:
    labels = ["a", "b", "c", "d", "e"]
    assert theme.colour("test_error") == theme.colour("test_loss") != theme.colour("train_error")
    assert len({theme.colour(label, labels) for label in labels[:4]}) == 4
    assert theme.colour("e", labels) == theme.colour("a", labels)


@pytest.mark.parametrize(
    ("values", "scale"),
    [([1, 256], "log"), ([1, 5], "linear"), ([0, 0.9], "linear"), ([], "linear"), ([-1, 99], "linear")],
)
def test_scale(values: list[float], scale: str) -> None:
    assert theme.scale_of(pd.Series(values, dtype=float)) == scale
