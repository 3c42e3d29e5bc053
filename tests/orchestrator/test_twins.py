"""The small twin of every built-in study, end to end on Ray through the command line: rows, measures, report.

`make twins` runs all of them and prints how long each took; `make test` runs three.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from tests.orchestrator.conftest import Command

from flatmin.orchestrator.study import builtin_names, read_study
from flatmin.results import Results

QUICK = ("digits-double-descent", "frequency-mnist", "frequency-sinusoids")
"""Run by `make test`: digits, a classification from stand-ins, and a regression."""

Report = Callable[[str], None]


@pytest.fixture(scope="module")
def took(request: pytest.FixtureRequest) -> Iterator[Report]:
    """Return a function that notes a line of the table, which is printed at the end."""
    lines: list[str] = []
    yield lines.append
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join([f"{'study':<24}{'models':>8}{'seconds':>9}", *lines]))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in builtin_names()]
)
def test_twin(name: str, tmp_path: Path, took: Report, flatmin_sweep: Command) -> None:
    began = time.monotonic()
    results, page = tmp_path / "results", tmp_path / "report.html"
    command = [sys.executable, "-m", "flatmin.orchestrator", "launch", name, "--small", "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reported = flatmin_sweep("report", "--results", str(results), "-o", str(page))
    assert reported.returncode == 0, reported.stderr
    seconds = time.monotonic() - began

    twin = read_study(name, small=True)
    found = Results.open(results)
    models, sharpness, epochs = found.models(), found.sharpness(), found.epochs()
    assert sorted(models["model_id"]) == sorted(model.model_id for model in twin.models)
    assert set(models["study"]) == {f"{name}-small"}
    assert found.table("failures").num_rows == 0
    assert set(models["model_id"]) == set(epochs["model_id"])

    ends = sharpness.merge(models[["model_id", "epochs_run"]]).query("epoch == epochs_run")
    ended = models[models["status"] != "diverged"]["model_id"]
    assert len(ended) > len(models) / 2
    expected = {(model_id, label) for model_id in ended for label in twin.measures_of[model_id]}
    assert pairs(ends) == expected and len(ends) == len(expected)
    refused = sharpness[sharpness["settings"].str.contains('"refused"|"failed"')]
    assert refused.empty, refused["settings"].tolist()
    every = twin.file.measure_every
    if every is not None:
        assert set(sharpness["epoch"]) == set(range(every, max(models["epochs_run"]) + 1, every))

    text = page.read_text(encoding="utf-8")
    assert f"<h1>{name}-small</h1>" in text and text.rstrip().endswith("</html>")
    for section in ("<h2>Models</h2>", "<summary>Settings</summary>", "Training curves"):
        assert section in text
    took(f"{name:<24}{len(models):>8}{seconds:>9.0f}")


def pairs(rows: pd.DataFrame) -> set[tuple[str, str]]:
    return set(zip(rows["model_id"], rows["label"], strict=True))
