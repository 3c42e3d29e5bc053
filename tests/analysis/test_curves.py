"""Curves of few or many models: which are shown, the numbers behind their figures, and when the report has them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flatmin.analysis import curves, sections_curves
from flatmin.analysis.figures import density, surface
from flatmin.analysis.report import report
from flatmin.analysis.section import Left, Section, Variant
from flatmin.errors import RequestError


def curve(model: str, kind: str, label: str, points: Sequence[tuple[Any, ...]], **settings: Any) -> pd.DataFrame:
    """Return rows of `spectra/` with points (x, y, value)."""
    frame = pd.DataFrame(points, columns=["x", "y", "value"]).astype(float)
    text = json.dumps({"label": label, **settings}, sort_keys=True)
    return frame.assign(model_id=model, trial_id=f"t{model}", epoch=3, kind=kind, settings=text)


def line(model: str, depth: float, label: str = "loss_surface") -> pd.DataFrame:
    return curve(model, "surface", label, [(x, None, depth + x * x) for x in (1.0, -1.0, 0.0)])


def plane(model: str, depth: float, label: str = "loss_surface(dimensions=2)") -> pd.DataFrame:
    ticks = (-1.0, 0.0, 1.0)
    return curve(model, "surface", label, [(x, y, depth + x * x + 2 * y * y) for x in ticks for y in ticks])


def spectrum(model: str, *values: float, start: float = 0.0) -> pd.DataFrame:
    points = [(start + x, None, value) for x, value in enumerate(values)]
    return curve(model, "hessian_density", "hessian_density", points, part="density")


def models_of(gaps: dict[str, float | None], **columns: Any) -> pd.DataFrame:
    names = pd.Series(list(gaps), dtype=object)
    table = pd.DataFrame({"model_id": names, "gen_gap": list(gaps.values()), "status": "finished"})
    return table.assign(trial_id="t" + table["model_id"], seed=range(len(gaps)), **columns)


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ({"a": 0.3, "b": 0.1, "c": 0.2, "d": 0.5, "e": 0.4}, "lowest gen_gap 0.1: b, median 0.3: a, highest 0.5: d"),
        ({"a": 0.3, "b": 0.1, "c": 0.2, "d": 0.4}, "lowest gen_gap 0.1: b, median 0.2: c, highest 0.4: d"),
        ({"a": 0.3, "b": 0.1}, "lowest gen_gap 0.1: b, highest 0.3: a"),
        ({"a": 0.3}, "only model, gen_gap 0.3: a"),
        ({"b": 0.1, "a": 0.1, "c": 0.1}, "lowest gen_gap 0.1: a, median 0.1: b, highest 0.1: c"),
        ({"a": None, "b": 0.1, "c": None}, "only model, gen_gap 0.1: b"),
        ({"b": None, "a": None}, "model a: a, model b: b"),
        ({}, ""),
    ],
)
def test_the_few_are_the_lowest_the_median_and_the_highest(gaps: dict[str, float | None], expected: str) -> None:
    chosen = curves.representatives(models_of(gaps), list(gaps), target="gen_gap")
    said = ", ".join(f"{one.name}: {one.model_id}" for one in chosen)
    assert said.replace("median gen_gap", "median").replace("highest gen_gap", "highest") == expected


def test_the_few_are_of_those_that_count_and_have_the_curve() -> None:
    models = models_of({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}, width=[1, 2, 3, 4], lr=0.1)
    models.loc[3, "status"] = "diverged"
    chosen = curves.representatives(models, ["b", "c", "d", "elsewhere"], target="gen_gap")
    assert [one.model_id for one in chosen] == ["b", "c"]
    assert [one.about for one in chosen] == ["width 2, seed 1", "width 3, seed 2"]


def test_a_curve_is_taken_at_its_last_epoch() -> None:
    early = line("a", 9.0).assign(epoch=1)
    rows = curves.of_kind(pd.concat([line("a", 1.0), early, spectrum("a", 1.0)]), "surface")
    assert sorted(rows["value"]) == [1.0, 2.0, 2.0]
    assert set(rows["label"]) == {"loss_surface"}


@pytest.mark.parametrize("settings", ["{}", "[]", "{", None])
def test_a_curve_without_a_label_has_its_kinds(settings: str | None) -> None:
    assert set(curves.of_kind(line("a", 1.0).assign(settings=settings), "surface")["label"]) == {"surface"}


def test_a_table_without_curves_columns_is_refused() -> None:
    with pytest.raises(RequestError, match="spectra table: the table has no column 'x'"):
        curves.of_kind(line("a", 1.0).drop(columns="x"), "surface")


def test_surfaces_of_lines_are_sorted_points_of_the_few() -> None:
    models = models_of({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4})
    spectra = pd.concat([line(name, depth) for name, depth in zip("abcd", (1.0, 2.0, 3.0, 4.0), strict=True)])
    data = surface.data(pd.concat([spectra, plane("a", 5.0)]), models, label="loss_surface")
    assert data["model_id"].tolist() == ["a"] * 3 + ["b"] * 3 + ["d"] * 3
    assert data["x"].tolist() == [-1.0, 0.0, 1.0] * 3
    assert data["value"].tolist() == [2.0, 1.0, 2.0, 3.0, 2.0, 3.0, 5.0, 4.0, 5.0]
    assert data["y"].isna().all()
    figure = surface.draw(data)
    assert [list(trace.y) for trace in figure.data] == [[2.0, 1.0, 2.0], [3.0, 2.0, 3.0], [5.0, 4.0, 5.0]]
    assert figure.data[0].name == "lowest gen_gap 0.1 (seed 0)"


@pytest.mark.parametrize("depth", [0.01, 10.0], ids=["log", "linear"])
def test_planes_are_drawn_the_right_way_round(depth: float) -> None:
    data = surface.data(plane("a", depth), models_of({"a": 0.1}), label="loss_surface(dimensions=2)")
    assert len(data) == 9
    contour, three_d, _ = surface.draw(data).data
    scale = math.log10 if depth < 1 else float
    expected = [[scale(depth + x * x + 2 * y * y) for x in (-1, 0, 1)] for y in (-1, 0, 1)]
    for trace in (contour, three_d):
        np.testing.assert_allclose(np.array(trace.z, dtype=float), expected, rtol=1e-12)
        assert (list(trace.x), list(trace.y)) == ([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0])
        assert trace.text[0][1] == f"{depth + 2:.4g}"
    assert (contour.zmin, contour.zmax) == (three_d.cmin, three_d.cmax) == (expected[1][1], expected[0][0])


def test_a_point_that_is_not_finite_is_a_gap() -> None:
    spectra = plane("a", 1.0)
    spectra.loc[0, "value"] = np.nan
    data = surface.data(spectra, models_of({"a": 0.1}), label="loss_surface(dimensions=2)")
    (contour, three_d, _) = surface.draw(data).data
    assert contour.z[0][0] is None
    assert three_d.text[0][0] == "not finite"
    assert "NaN" not in surface.draw(data).to_json()


def test_a_flat_surface_can_be_drawn() -> None:
    flat = plane("a", 1.0).assign(value=2.0)
    data = surface.data(flat, models_of({"a": 0.1}), label="loss_surface(dimensions=2)")
    assert surface.draw(data).data[0].contours.size > 0


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(1.23, 3.6, [1.5, 2.0, 2.5, 3.0, 3.5]), (1.0, 1.4, [1.0, 1.1, 1.2, 1.3, 1.4]), (0.0, 4.0, [0, 1, 2, 3, 4])],
)
def test_losses_are_marked_at_round_numbers(low: float, high: float, marks: list[float]) -> None:
    rows = plane("a", 1.0)
    scaled = (rows["value"] - rows["value"].min()) / (rows["value"].max() - rows["value"].min())
    data = surface.data(
        rows.assign(value=low + (high - low) * scaled), models_of({"a": 0.1}), label="loss_surface(dimensions=2)"
    )
    figure = surface.draw(data)
    bar, level = figure.data[0].colorbar, figure.layout.scene.zaxis
    assert list(bar.tickvals) == pytest.approx(marks)
    assert list(bar.ticktext) == [f"{mark:g}" for mark in marks]
    assert list(level.tickvals) == pytest.approx(marks[::2])
    assert list(figure.layout.scene.xaxis.ticktext) == ["-1", "0", "1"]


def test_densities_of_models_are_theirs() -> None:
    models = models_of({"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4})
    error = curve("a", "hessian_density", "hessian_density", [(0.0, None, 50.0)], part="stderr")
    parts = [spectrum("a", 1.0, 2.0), spectrum("b", 3.0, 4.0), spectrum("c", 5.0, 6.0), spectrum("d", 7.0, 8.0), error]
    data = density.data(pd.concat(parts), models, label="hessian_density")
    assert data["density"].tolist() == [1.0, 2.0, 3.0, 4.0, 7.0, 8.0]
    assert data["x"].tolist() == [0.0, 1.0] * 3
    assert data["line"].unique()[1] == "median gen_gap 0.2 (seed 1)"
    assert set(data["n"]) == {1}


def test_densities_of_a_setting_are_means_on_all_points() -> None:
    models = models_of({"a": 0.1, "b": 0.2, "c": 0.3}, width=[8, 8, 4])
    spectra = pd.concat([spectrum("a", 1.0, 3.0, 5.0), spectrum("b", 2.0, 4.0, start=0.5), spectrum("c", 9.0)])
    data = density.data(spectra, models, label="hessian_density", axis="width")
    assert data["line"].tolist() == ["width 4"] + ["width 8"] * 5
    assert data["n"].tolist() == [1, 2, 2, 2, 2, 2]
    wide = data[data["line"] == "width 8"]
    assert wide["x"].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    np.testing.assert_allclose(wide["density"], [0.5, (2 + 2) / 2, (3 + 3) / 2, (4 + 4) / 2, 2.5])


def test_few_of_many_values_and_points_of_a_density_are_drawn() -> None:
    names = [f"m{number:02d}" for number in range(20)]
    models = models_of(dict.fromkeys(names, 0.1), width=range(20))
    x = np.linspace(0, 1, 5000)
    spectra = pd.concat(
        [curve(name, "hessian_density", "hessian_density", [(at, None, at) for at in x]) for name in names]
    )
    data = density.data(spectra, models, label="hessian_density", axis="width")
    assert data["line"].nunique() == density.MOST_LINES
    assert (data.groupby("line").size() == density.MOST_POINTS).all()
    np.testing.assert_allclose(data["density"], data["x"], atol=1e-12)


def test_a_density_of_zero_has_no_place_on_a_log_axis() -> None:
    models = models_of({"a": 0.1})
    figure = density.draw(density.data(spectrum("a", 0.0, 1.0), models, label="hessian_density"))
    assert figure.layout.yaxis.type == "log"
    assert math.isnan(figure.data[0].y[0])
    assert list(figure.layout.yaxis.range) == [-8.0, 0.3]


def shown(models: pd.DataFrame, spectra: pd.DataFrame) -> tuple[list[Section], list[Left]]:
    made = list(sections_curves.sections(spectra, models, "gen_gap"))
    return [one for one in made if isinstance(one, Section)], [one for one in made if isinstance(one, Left)]


def only(section: Section) -> Variant:
    """The one figure of a section."""
    assert len(section.variants) == 1
    assert isinstance(section.variants[0], Variant)
    return section.variants[0]


def test_the_report_has_curves_where_there_are_any(tables: Any) -> None:
    first, second = tables.models["model_id"].iloc[[7, 9]]
    spectra = pd.concat([line(first, 1.0), plane(second, 1.0), spectrum(first, 1.0, 2.0)])
    found = shown(tables.models, spectra)[0]
    assert [section.name for section in found] == ["surface-1", "surface-2", "hessian-density-1"]
    headings = ["Loss surface: loss_surface", "Loss surface: loss_surface(dimensions=2)"]
    assert [section.heading for section in found] == [*headings, "Hessian spectral density: hessian_density"]
    assert only(found[0]).caption.startswith("All models that have it: n = 1.")
    assert "n = 1;" not in only(found[2]).caption
    assert "Models converged or finished: n = 1." in only(found[2]).caption
    for other in (spectra.iloc[:0], spectra.assign(kind="fourier")):
        assert shown(tables.models, other) == ([], [])


def test_the_report_says_how_models_were_chosen(tables: Any) -> None:
    ids = tables.models["model_id"]
    found, _ = shown(tables.models, pd.concat([line(name, 1.0) for name in ids]))
    assert only(found[0]).caption.startswith(
        "Of n = 65 models that have it, those with the lowest, the median and the highest gen_gap. The loss"
    )
    kept = tables.models[tables.models["status"] != "diverged"].sort_values(["gen_gap", "model_id"])["model_id"]
    assert list(only(found[0]).data["model_id"].unique()) == [kept.iloc[0], kept.iloc[32], kept.iloc[64]]


def test_curves_of_models_that_do_not_count_are_left_out(tables: Any) -> None:
    diverged = tables.models.loc[tables.models["status"] == "diverged", "model_id"].iloc[0]
    found, left = shown(tables.models, pd.concat([line(diverged, 1.0), spectrum(diverged, 1.0, 2.0)]))
    assert found == []
    reasons = {item.heading: item.reason for item in left}
    assert reasons["Loss surface: loss_surface"] == "no model that counts has a finite one."
    assert reasons["Hessian spectral density: hessian_density"] == "no model that counts has one."


def test_of_many_measures_the_rest_is_named(tables: Any) -> None:
    first = tables.models["model_id"].iloc[5]
    labels = [f"loss_surface(reach={reach})" for reach in range(1, 7)]
    found, left = shown(tables.models, pd.concat([line(first, 1.0, label) for label in labels]))
    assert len(found) == sections_curves.MOST_LABELS
    told = [item.reason for item in left if "reach" in item.heading]
    assert told == [f"only the first {sections_curves.MOST_LABELS} measures of this kind are drawn."] * 2


def test_a_thousand_surfaces_stay_small_and_labels_are_escaped(tmp_path: Path, tables: Any) -> None:
    nasty = "</script><b>&loss_surface"
    models = pd.concat([tables.models.assign(model_id=tables.models["model_id"] + str(copy)) for copy in range(16)])
    ticks = np.linspace(-1, 1, 21)
    grid = curve("", "surface", nasty, [(x, y, 0.1 + x * x + y * y) for x in ticks for y in ticks])
    ids = models["model_id"].unique()
    spectra = pd.concat([grid] * len(ids), ignore_index=True).assign(model_id=np.repeat(ids, len(grid)))
    start = time.perf_counter()
    path = report(study={}, models=models, spectra=spectra, path=tmp_path / "r.html")
    assert time.perf_counter() - start < 20
    assert path.stat().st_size < 8e6
    text = path.read_text(encoding="utf-8")
    assert "<b>&loss" not in text
    assert "&lt;b&gt;&amp;loss_surface" in text
