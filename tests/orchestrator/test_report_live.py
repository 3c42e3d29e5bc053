"""`report --live`: the page is written anew while rows come, says so, and stops with the study or with Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flatmin import Results, plugins
from flatmin.errors import RequestError
from flatmin.orchestrator.report import follow

NAMES = {"dataset": "digits", "network": "mlp", "optimizer": "sgd"}
IDS = ["m0", "m1", "m2"]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Three models are planned, none is trained."""
    made = Results.create(tmp_path / "r", "made-up")
    planned = {"study": "made-up", "planned_at": datetime.now(UTC), **NAMES}
    rows = [{"model_id": model, "seed": seed, **planned} for seed, model in enumerate(IDS)]
    made.write("plan", "plan", rows, plugins.program_arguments(NAMES))
    return made


def train(results: Results, number: int) -> None:
    row: dict[str, object] = {
        "model_id": IDS[number],
        "trial_id": f"t{number}",
        "study": "made-up",
        "status": "finished",
        **NAMES,
    }
    row |= {"epochs_run": 1, "test_acc": 0.5, "gen_gap": 0.1 * number, "seed": number, "started_at": datetime.now(UTC)}
    results.write("models", f"t{number}", [row], plugins.program_arguments(NAMES))


def is_live(page: str) -> bool:
    return '<body data-refresh="5">' in page


def test_it_follows_a_study_to_its_end(results: Results, tmp_path: Path) -> None:
    path, told, seen = tmp_path / "report.html", list[str](), list[str]()
    steps: list[Callable[[], None]] = [
        lambda: train(results, 0),
        lambda: None,
        lambda: train(results, 1),
        lambda: train(results, 2),
    ]

    def sleep(seconds: float) -> None:
        assert seconds >= 5
        page = path.read_text()
        assert is_live(page)
        seen.append(page)
        steps.pop(0)()

    assert follow(results.path, path, every=5, tell=told.append, sleep=sleep) == path
    assert told == ["0 of 3 models", "1 of 3 models", "2 of 3 models", "3 of 3 models"]
    assert "No model is trained yet." in seen[0]
    assert seen[1] == seen[2]  # nothing had come, so nothing was written
    assert "<strong>2</strong> <span>of 3 models</span>" in seen[3]
    last = path.read_text()
    assert "data-refresh" not in last.split("<body")[1].split(">")[0]
    assert "<strong>3</strong> <span>of 3 models</span>" in last


def test_a_page_that_nobody_writes_any_more_does_not_load_itself(results: Results, tmp_path: Path) -> None:
    train(results, 0)
    path = tmp_path / "report.html"

    def sleep(seconds: float) -> None:
        assert is_live(path.read_text())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(results.path, path, every=5, tell=lambda line: None, sleep=sleep)
    assert "<body>" in path.read_text()
    assert "<strong>1</strong> <span>of 3 models</span>" in path.read_text()


def test_ctrl_c_is_clean(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    line = [sys.executable, "-m", "flatmin.orchestrator", "report", "--results", str(results.path), "-o", str(path)]
    with subprocess.Popen(
        [*line, "--live"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    ) as running:
        assert running.stderr is not None
        assert running.stderr.readline() == "0 of 3 models\n"
        time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stdout) == (130, "")
    assert stderr == f"stopped; {path} is as of the last rows\n"
    assert "<body>" in path.read_text()


def test_no_time_between_two_looks_is_refused(results: Results, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--every: 0 seconds are no time to wait"):
        follow(results.path, tmp_path / "report.html", every=0, tell=lambda line: None)
