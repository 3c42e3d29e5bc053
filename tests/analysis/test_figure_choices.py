"""What a reader chooses within a figure: scales, panels per value of a setting, lines along another axis, peaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatmin.analysis import panels, peak, sections_models, sweeps
from flatmin.analysis.choices import View
from flatmin.analysis.figures import against_axis, noise, optimizers_along, scatter
from flatmin.analysis.page import embed_figures
from flatmin.analysis.section import Missing, Variant


@pytest.fixture(scope="module")
def points(tables: Any) -> pd.DataFrame:
    return scatter.averaged(scatter.data(tables.models, tables.sharpness))


def test_buttons_make_axes_logarithmic_where_values_are_positive(points: pd.DataFrame) -> None:
    signed = points.assign(value=points["value"].where(points["measure"] == "lpf", points["value"] - 0.5))
    figure = panels.drawn(scatter.draw(signed))
    buttons = {one["label"]: one["args"][0] for one in figure["layout"]["updatemenus"][0]["buttons"]}
    below = int((signed.loc[signed["measure"] == "lpf", "target_value"] <= 0).sum())
    assert list(buttons) == [
        "fitted axes",
        "linear",
        "log measure",
        f"log both ({below} ≤ 0 hidden)",
    ]
    assert below > 0
    eps, lpf = "xaxis.type", "xaxis2.type"  # panels by name
    assert [(one[eps], one[lpf]) for one in buttons.values()] == [
        ("linear", "log"),
        ("linear", "linear"),
        ("linear", "log"),
        ("linear", "log"),
    ]
    assert [one["yaxis.type"] for one in buttons.values()] == ["linear"] * 3 + ["log"]
    assert figure["layout"]["xaxis2"]["type"] == "log"


def test_targets_that_are_all_below_zero_have_no_logarithm(points: pd.DataFrame) -> None:
    figure = panels.drawn(scatter.draw(points.assign(target_value=-1.0)))
    assert [one["label"] for one in figure["layout"]["updatemenus"][0]["buttons"]][-1] == "log measure"


def test_a_panel_alone_has_buttons_for_its_own_axes_only(points: pd.DataFrame) -> None:
    alone = panels.alone(panels.drawn(scatter.draw(points)), "lpf")
    changed = {name.partition(".")[0] for name in alone["layout"]["updatemenus"][0]["buttons"][0]["args"][0]}
    assert changed == {"xaxis2", "yaxis2"}


def test_a_split_has_every_point_of_a_value_in_its_panel(points: pd.DataFrame) -> None:
    whole = panels.drawn(scatter.draw(points))
    figure = scatter.split(whole, points, "label_noise")
    assert [trace["meta"] for trace in figure["data"]] == ["eps_sharpness(radius=0.1)"] * 2 + ["lpf"] * 2
    shown: dict[str, list[list[float]]] = {trace["meta"]: [] for trace in figure["data"]}
    for trace in figure["data"]:
        shown[trace["meta"]].append([trace["x"][place] for place in trace["pick"]])
    lpf = points[points["measure"] == "lpf"]
    for value, found in zip((0.0, 0.2), shown["lpf"], strict=True):
        np.testing.assert_allclose(found, lpf.loc[lpf["label_noise"] == value, "value"], rtol=1e-5)
    titles = [note["text"] for note in figure["layout"]["annotations"]]
    assert titles[2:] == ["lpf<br>label_noise 0", "lpf<br>label_noise 0.2"]
    colours = figure["layout"]["updatemenus"][1]["buttons"][0]["args"][0]["marker.color"]
    assert [len(one) for one in colours] == [len(trace["pick"]) for trace in figure["data"]]


def test_many_values_are_split_into_a_few_panels(points: pd.DataFrame) -> None:
    figure = scatter.split(panels.drawn(scatter.draw(points)), points, "width")
    assert len(figure["data"]) == 2 * scatter.MOST_COLUMNS
    assert {len(trace["pick"]) for trace in figure["data"]} == {2}


def test_a_row_of_a_split_fills_the_figure(points: pd.DataFrame) -> None:
    figure = scatter.split(panels.drawn(scatter.draw(points)), points, "label_noise")
    layout = panels.alone(figure, "lpf")["layout"]
    axes = {name: layout[name] for name in layout if name.startswith(("xaxis", "yaxis"))}
    assert set(axes) == {"xaxis3", "yaxis3", "xaxis4", "yaxis4"}
    assert (axes["yaxis3"]["domain"], axes["yaxis4"]["domain"]) == ([0, 1], [0, 1])
    assert axes["xaxis3"]["domain"][1] < axes["xaxis4"]["domain"][0]
    assert (axes["xaxis4"]["matches"], axes["yaxis4"]["matches"]) == ("x3", "y3")
    assert "matches" not in axes["xaxis3"]
    assert layout["height"] < figure["layout"]["height"]


def test_a_split_repeats_no_point_in_the_page(points: pd.DataFrame) -> None:
    whole = panels.drawn(scatter.draw(points))
    variants = [Variant("", whole, points, of={"split": ""})]
    alone = len(embed_figures("scatter", variants))
    variants.append(Variant("", scatter.split(whole, points, "label_noise"), points, of={"split": "label_noise"}))
    assert embed_figures("scatter", variants).count('"hovertemplate"') == 2  # a trace per measure, as before
    assert len(embed_figures("scatter", variants)) - alone < 12_000  # panels, not points


def test_noise_has_lines_along_another_setting(tables: Any) -> None:
    data = noise.data(tables.models, tables.sharpness, axis="label_noise", by="width")
    goal = data[(data["kind"] == "target") & (data["by_value"] == 256) & (data["x"] == 0.2)]
    rows = tables.models[(tables.models["width"] == 256) & (tables.models["label_noise"] == 0.2)]
    assert goal["mean"].item() == pytest.approx(rows["gen_gap"].mean())
    lpf = data[data["quantity"] == "lpf"]
    assert (lpf["scaled"].min(), lpf["scaled"].max()) == (0, 1)
    assert lpf["by_value"].nunique() == against_axis.MOST_LINES
    assert lpf["tau_level"].nunique() == 1
    figure = panels.drawn(noise.draw(data))
    named = [trace["name"] for trace in figure["data"] if trace.get("showlegend")]
    assert named[0] == "gen_gap, width 1"
    assert named[-1].startswith("lpf: τ ")
    assert len(figure["data"]) == 3 * against_axis.MOST_LINES + 2 * against_axis.MOST_LINES


def _optimizers() -> pd.DataFrame:
    rows = [
        {"optimizer": name, "lr": lr, "schedule": schedule, "seed": seed, "test_acc": 0.5 + lr * slope + seed / 100}
        for name, slope in (("sgd", 1.0), ("adam", -1.0))
        for lr, schedule in ((0.1, "step"), (0.2, "cosine"))
        for seed in range(3)
    ]
    return pd.DataFrame(rows).assign(status="finished")


def test_optimizers_along_a_setting_are_means_with_intervals() -> None:
    data = optimizers_along.data(_optimizers(), axis="lr")
    assert list(zip(data["optimizer"], data["value"], strict=True)) == [
        ("sgd", 0.1),
        ("sgd", 0.2),
        ("adam", 0.1),
        ("adam", 0.2),
    ]
    half = stats.t.ppf(0.975, 2) * 0.01 / np.sqrt(3)
    np.testing.assert_allclose(data["mean"], [0.61, 0.71, 0.41, 0.31])
    np.testing.assert_allclose(data["high"] - data["mean"], half)
    assert optimizers_along.draw(data).layout.xaxis.type == "linear"
    words = optimizers_along.data(_optimizers(), axis="schedule")
    assert optimizers_along.draw(words).layout.xaxis.type == "category"


def test_every_axis_but_the_optimizer_has_its_figure() -> None:
    models = _optimizers().assign(width=np.tile([1, 2, 3], 4))
    view = View("all", "means", models, None, "")
    made = {one.of["axis"]: one for one in sections_models.optimizers_along_settings(view)}
    assert set(made) == {"optimizer", "schedule", "width"}
    assert isinstance(made["optimizer"], Missing)
    assert isinstance(made["width"], Variant)
    assert made["width"].data["axis"].unique().tolist() == ["width"]


def test_the_peak_has_its_interval_in_figure_and_words(tables: Any) -> None:
    view = View("all", "means", tables.models, None, "")
    width = next(one for one in sections_models.against(view, tables.sharpness) if one.of["axis"] == "width")
    assert isinstance(width, Variant)
    found = peak.peak_over_seeds(
        sweeps.curves(tables.models, "test_error", axis="width", of=tables.models["label_noise"] == 0.2)
    )
    assert found.x == 16
    assert f"Over 3 seeds the peak lies at width 16 [16, 16] and stands {found.height:.3g}" in width.findings[1]
    shapes = width.figure["layout"]["shapes"]
    assert [(one["x0"], one["x1"]) for one in shapes if one["type"] == "rect"] == [(16, 16)] * 2
    assert "95 % interval of the place of the peak" in width.caption
    assert panels.alone(width.figure, "lpf")["layout"]["shapes"] == shapes


def test_a_curve_without_a_clear_peak_has_no_stripe(tables: Any) -> None:
    rising = tables.models.assign(test_acc=1 - tables.models["width"] / 1000)
    view = View("all", "means", rising, None, "")
    width = next(one for one in sections_models.against(view, tables.sharpness) if one.of["axis"] == "width")
    assert isinstance(width, Variant)
    assert "shapes" not in width.figure["layout"]
    assert "Over 3 seeds" not in " ".join(width.findings)
