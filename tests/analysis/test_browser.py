"""The report in a real browser: headless Chromium draws it, follows the controls, and asks nothing of a network.

Screenshots for people to look at are kept under `build/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.analysis.browsing import BUILD, chromium, play

from flatmin.analysis.report import report

pytestmark = pytest.mark.browser

SCRIPT = """
(async () => {
  const found = { errors: [], violations: 0 };
  window.addEventListener("error", (event) => found.errors.push(event.message));
  window.addEventListener("unhandledrejection", (event) => found.errors.push(String(event.reason)));
  document.addEventListener("securitypolicyviolation", () => { found.violations += 1; });
  const place = (name) => document.querySelector(`[data-figure="${name}"]`);
  const choose = (name, value) => {
    const control = document.querySelector(`[data-control="${name}"]`);
    control.value = value;
    control.dispatchEvent(new Event("change"));
  };
  const look = () => ({
    drawn: [...document.querySelectorAll(".plot")].filter((one) => one.querySelector(".main-svg")).length,
    plots: document.querySelectorAll(".plot").length,
    points: (place("scatter")._fullData ?? []).map((trace) => trace.x.length),
    interval: (place("correlations")._fullData ?? []).some((trace) => Math.max(...trace.error_x.array) > 0),
    lines: [...new Set((place("training").data ?? []).map((trace) => trace.name))],
    caption: place("correlations").closest("figure").querySelector(".caption").textContent,
    said: [...document.querySelectorAll("#conclusions p")].filter((one) => !one.hidden).map((one) => one.textContent),
    tables: [...document.querySelectorAll("main > section[data-of]")].filter((one) => !one.hidden).length,
    paper: place("psi").layout?.paper_bgcolor,
    scales: ["xaxis", "xaxis2", "yaxis"].map((axis) => place("scatter").layout?.[axis]?.type),
  });
  const buttons = () => [...place("scatter").closest("figure").querySelectorAll(".menus button")];
  const press = (label) => buttons().find((one) => one.textContent.startsWith(label)).click();
  while (look().drawn < look().plots) await new Promise((done) => setTimeout(done, 50));
  found.first = look();
  choose("seeds", "rows"); found.rows = look();
  choose("filter", "converged"); found.converged = look();
  choose("measure", "lpf"); found.measure = look();
  choose("axis", "label_noise"); found.axis = look();
  found.absent = place("against-axis").closest("figure").querySelector(".caption").textContent;
  choose("axis", "width"); choose("measure", "");
  press("log both");
  await new Promise((done) => setTimeout(done, 500));
  found.pressed = look().scales;
  found.held = buttons().map((one) => one.getAttribute("aria-pressed"));
  choose("filter", "all"); choose("split", "label_noise");
  await new Promise((done) => setTimeout(done, 500));
  found.split = look();
  choose("split", "");
  press("fitted axes");
  await new Promise((done) => setTimeout(done, 500));
  document.getElementById("theme").click(); found.dark = look();
  document.getElementById("theme").click();
  for (const [name, value] of [["seeds", "means"], ["filter", "all"], ["measure", ""]]) choose(name, value);
  found.back = look();
  let blob = null;
  URL.createObjectURL = (made) => { blob = made; return "#"; };
  place("psi").closest("figure").querySelector(".download").click();
  found.csv = await blob.text();
  found.svg = document.querySelectorAll(".updatemenu-container").length;
  const colour = place("scatter").closest("figure").querySelector(".menus select");
  colour.selectedIndex = 1;
  colour.dispatchEvent(new Event("change"));
  const bar = place("scatter").layout.coloraxis.colorbar;
  found.coloured = [colour.getAttribute("aria-label"), colour.selectedOptions[0].textContent, bar.title.text];
  const reachable = [...document.querySelectorAll("select, button, input, summary")];
  found.unreachable = reachable.filter((one) => one.tabIndex < 0).length;
  found.fetched = performance.getEntriesByType("resource").map((entry) => entry.name);
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
})();
"""


LIVE = """
(async () => {
  const control = document.querySelector('[data-control="seeds"]');
  const again = history.state !== null;
  if (!again) {
    while (!document.querySelector(".main-svg")) await new Promise((done) => setTimeout(done, 50));
    control.value = "rows";
    control.dispatchEvent(new Event("change"));
    document.getElementById("filter").value = "width=8";
    document.getElementById("theme").click();
    return;
  }
  while (!document.querySelector(".main-svg")) await new Promise((done) => setTimeout(done, 50));
  document.getElementById("live").click();
  const found = {
    seeds: control.value,
    search: document.getElementById("filter").value,
    count: document.getElementById("count").textContent,
    dark: document.getElementById("theme").getAttribute("aria-pressed"),
    following: document.getElementById("live").getAttribute("aria-pressed"),
  };
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
})();
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tables: Any, study: dict[str, object]) -> Path:
    """A report whose data are packed, as those of a large one are."""
    path = tmp_path_factory.mktemp("browser") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flatmin.analysis.page.PACKED_FROM", 10_000)
        report(study=study, models=tables.models, epochs=tables.epochs, sharpness=tables.sharpness, path=path)
    assert path.read_text().count("data-packed=") > 3
    return path


@pytest.fixture(scope="module")
def found(page: Path) -> dict[str, Any]:
    """What a script saw that plays a reader."""
    return play(page, SCRIPT)


def test_it_loads_without_an_error_and_without_a_network(found: dict[str, Any]) -> None:
    assert found["errors"] == []
    assert found["violations"] == 0
    assert found["fetched"] == []
    assert found["first"]["drawn"] == found["first"]["plots"] == 8


def test_seeds_change_points_and_intervals(found: dict[str, Any]) -> None:
    assert (found["first"]["points"], found["rows"]["points"]) == ([22, 22], [65, 65])
    assert (found["first"]["interval"], found["rows"]["interval"]) == (True, False)


def test_the_filter_changes_points_and_words(found: dict[str, Any], tables: Any) -> None:
    converged = int((tables.models["status"] == "converged").sum())
    assert found["converged"]["points"] == [converged] * 2
    assert f"Models converged: n = {converged}; " in found["converged"]["caption"]
    assert f"n = {converged}" in found["converged"]["said"][0]
    assert "n = 65" in found["rows"]["said"][0]


def test_measure_and_axis_change_the_figures(found: dict[str, Any]) -> None:
    assert len(found["measure"]["points"]) == 1
    assert found["measure"]["lines"][0] == "width 16"
    assert found["axis"]["lines"] == ["label_noise 0", "label_noise 0.2"]
    assert found["absent"] == "No figure for this choice: label_noise has no 5 numeric values or more."


def test_pressed_buttons_stay_and_points_are_split(found: dict[str, Any]) -> None:
    assert found["first"]["scales"] == ["linear", "log", "linear"]
    assert found["pressed"] == ["log", "log", "log"]
    assert found["held"] == ["false", "false", "false", "true"]
    assert found["split"]["scales"] == ["log", "log", "log"]
    assert found["split"]["points"] == [32, 33, 32, 33]  # one model diverged


def test_a_live_page_loads_itself_and_keeps_what_was_chosen(page: Path, tables: Any, study: dict[str, object]) -> None:
    path = page.with_name("live.html")
    report(study=study, models=tables.models, sharpness=tables.sharpness, path=path, refresh=3)
    chosen = {"seeds": "rows", "search": "width=8", "count": "6 of 66 models", "dark": "true", "following": "false"}
    assert play(path, LIVE) == chosen


def test_one_table_of_correlations_is_shown_and_the_way_back_is_open(found: dict[str, Any]) -> None:
    assert {state["tables"] for state in found.values() if isinstance(state, dict)} == {1}
    assert found["back"] == found["first"]


def test_there_is_a_dark_page(found: dict[str, Any]) -> None:
    assert len({found[state]["paper"] for state in ("first", "dark", "back")}) == 2


def test_the_data_can_be_had_and_all_is_reached_by_keyboard(found: dict[str, Any]) -> None:
    lines = found["csv"].splitlines()
    assert lines[0] == "measure,axis,psi,groups,undefined,alone,tied,control"
    assert len(lines) == 1 + 2 * (2 + 2)
    assert found["unreachable"] == 0
    assert found["svg"] == 0  # no keyboard reaches the menus that plotly.js draws
    assert found["coloured"] == ["colour by", "label_noise", "label_noise"]


def test_screenshots_are_kept(page: Path) -> None:
    BUILD.mkdir(exist_ok=True)
    shot = BUILD / "report.png"
    shot.unlink(missing_ok=True)
    chromium(page, f"--screenshot={shot}", width=1160, height=6000)
    assert shot.stat().st_size > 100_000
