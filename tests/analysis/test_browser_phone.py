"""The report on a phone of 390 pixels: nothing is written over something else, and nothing is wider than the page.

The page is in a frame, because no window of Chromium is as narrow. A screenshot is kept under `build/`.
"""

from __future__ import annotations

from typing import Any

import pytest
from tests.analysis.browsing import BUILD, LEAVE, chromium, found_in

from flatmin.analysis.report import report

pytestmark = pytest.mark.browser

INNER = """
(async () => {
  const plots = [...document.querySelectorAll(".plot")];
  while (plots.some((one) => !one.querySelector(".main-svg"))) await new Promise((done) => setTimeout(done, 50));
  const found = { titles: 0, overlaps: [], menus: [], wide: document.documentElement.scrollWidth };
  const cross = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  const look = (place, selector) => {
    const texts = [...place.querySelectorAll(selector)].map((one) => [one.textContent, one.getBoundingClientRect()]);
    texts.forEach(([left, a], number) => texts.slice(number + 1).forEach(([right, b]) => {
      if (cross(a, b)) found.overlaps.push([place.dataset.figure, left, right]);
    }));
    return texts;
  };
  for (const place of plots) {
    found.titles += look(place, ".annotation-text, .legendtext").length;
    look(place, ".xaxislayer-above .xtick text");
    look(place, ".yaxislayer-above .ytick text");
  }
  for (const one of document.querySelectorAll(".menus button, .menus select")) {
    const { left, right } = one.getBoundingClientRect();
    found.menus.push(left >= 0 && right <= 390);
  }
  parent.postMessage(found, "*");
})();
"""

OUTER = f"window.addEventListener('message', ({{ data: found }}) => {{{LEAVE}}});"

NAMES = {"lpf": "lpf(max_samples=16, metric=identity)", "eps_sharpness(radius=0.1)": "eps_sharpness(tolerance=0.25)"}


@pytest.fixture(scope="module")
def phone(tmp_path_factory: pytest.TempPathFactory, tables: Any, study: dict[str, object]) -> dict[str, Any]:
    """What a script sees of a report of measures with long names."""
    folder = tmp_path_factory.mktemp("phone")
    sharpness = tables.sharpness.assign(label=tables.sharpness["label"].map(NAMES))
    inner, outer, shot = folder / "inner.html", folder / "outer.html", BUILD / "report-phone.png"
    report(study=study, models=tables.models, epochs=tables.epochs, sharpness=sharpness, path=inner)
    inner.write_text(inner.read_text().replace("</body>", f"<script>{INNER}</script></body>"))
    frame = '<iframe src="inner.html" style="border:0;width:390px;height:6600px"></iframe>'
    outer.write_text(f'<!DOCTYPE html><body style="margin:0"><script>{OUTER}</script>{frame}</body>')
    BUILD.mkdir(exist_ok=True)
    chromium(outer, f"--screenshot={shot}", width=390, height=6600)
    return found_in(chromium(outer, "--dump-dom"))


def test_nothing_is_written_over_something_else(phone: dict[str, Any]) -> None:
    assert phone["titles"] > 15
    assert phone["overlaps"] == []


def test_the_page_is_as_wide_as_the_phone_and_so_are_the_menus(phone: dict[str, Any]) -> None:
    assert phone["wide"] == 390
    assert phone["menus"]
    assert all(phone["menus"])


def test_a_screenshot_is_kept(phone: dict[str, Any]) -> None:
    assert (BUILD / "report-phone.png").stat().st_size > 100_000
