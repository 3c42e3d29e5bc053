"""The report's figures of frequencies in a real browser: lines, arrows, heat map and bars are drawn; buttons work."""

from __future__ import annotations

from typing import Any

import pytest
from tests.analysis.browsing import BUILD, LEAVE, chromium, play

from flatmin.analysis.report import report

pytestmark = pytest.mark.browser

SCRIPT = (
    """
(async () => {
  const plots = [...document.querySelectorAll(".plot")];
  while (plots.some((one) => !one.querySelector(".main-svg"))) await new Promise((done) => setTimeout(done, 50));
  const found = { figures: {} };
  for (const place of plots.filter((one) => one.dataset.figure.startsWith("frequency-"))) {
    const count = (selector) => place.querySelectorAll(selector).length;
    found.figures[place.dataset.figure] = {
      lines: count(".scatterlayer .js-line"), points: count(".scatterlayer .point"),
      bars: count(".barlayer .point path"), cells: count(".heatmaplayer image"),
      panels: count(".cartesianlayer > .subplot"),
      texts: [...place.querySelectorAll(".legendtext, .annotation-text")].map((one) => one.textContent),
    };
  }
  const heat = plots.find((one) => one.dataset.figure === "frequency-errors-1");
  const press = (words) => [...heat.closest("figure").querySelectorAll(".menus button")]
    .find((one) => one.textContent === words).click();
  const scales = () => [heat.layout.coloraxis.cmin, heat.layout.coloraxis.cmax, heat.layout.xaxis.type ?? "linear"];
  found.before = scales();
  press("log colours");
  press("log epochs");
  await new Promise((done) => setTimeout(done, 300));
  found.after = scales();
  found.least = Math.min(...heat.data[0].z.flat());
  found.said = [...document.querySelectorAll("#conclusions p")].map((one) => one.textContent);
"""
    + LEAVE
    + "})();"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, made: Any) -> dict[str, Any]:
    """What a script sees of the report of two optimizers with known exponents; a screenshot is kept."""
    path = tmp_path_factory.mktemp("frequency") / "report.html"
    report(study={"study": "waves"}, models=made.models, epochs=made.epochs, spectra=made.spectra, path=path)
    BUILD.mkdir(exist_ok=True)
    chromium(path, f"--screenshot={BUILD / 'report-frequency.png'}", width=1160, height=5200)
    return play(path, SCRIPT)


def test_every_figure_of_frequencies_is_drawn(found: dict[str, Any]) -> None:
    figures = found["figures"]
    assert set(figures) == {
        f"frequency-{name}-1" for name in ("coefficients", "epochs", "errors", "accuracy", "regression", "loss")
    }
    coefficients = figures["frequency-coefficients-1"]
    assert coefficients["panels"] == 2
    assert coefficients["lines"] >= 2 * 5  # a line per optimizer and frequency, and the edges of bands
    assert coefficients["texts"] == ["k = 0", "k = 1", "k = 2", "k = 4", "k = 8", "adam", "sgd"]
    assert figures["frequency-errors-1"]["cells"] == 2
    assert figures["frequency-regression-1"]["bars"] == 3 * 5  # both optimizers, and each
    assert figures["frequency-accuracy-1"]["points"] == 2 * 60  # an epoch of an optimizer


def test_the_spectral_bias_is_drawn_and_said(found: dict[str, Any]) -> None:
    drawn = found["figures"]["frequency-epochs-1"]
    assert (drawn["points"], drawn["lines"]) == (2 * 4 * 4, 2)  # optimizers, models and frequencies; a fit each
    assert any(text.startswith("sgd: k^2.01 [1.8") for text in drawn["texts"])
    (said,) = [text for text in found["said"] if text.startswith("Spectral bias")]
    assert "adam 0.98 [0." in said


def test_buttons_change_the_heat_map(found: dict[str, Any]) -> None:
    assert found["before"] == [0, 1, "linear"]
    assert found["after"] == [-3, 0, "log"]
    assert -3 <= found["least"] < -1
