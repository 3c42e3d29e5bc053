"""The command line in this process, small studies, and results that nobody trained."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.console import Console

from flatmin import Results, plugins
from flatmin.orchestrator.cli import main
from flatmin.orchestrator.launch import Launched, LaunchOptions, launch, measure

TINY = """\
study: tiny
about: A few seconds of training.
source: nobody
settings: {dataset: digits, network: mlp, optimizer: sgd, lr: 0.05, batch_size: 250, epochs: 4}
axes:
  width: [2, 4]
seeds: 2
"""


@dataclass(frozen=True)
class Done:
    """What a command has left, as of a process."""

    returncode: int
    stdout: bytes
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def flatmin_sweep(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Command:
    """Return a function that runs `flatmin-sweep` in this process, which has loaded already what it needs."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["flatmin-sweep", *arguments])
        monkeypatch.setattr("warnings.showwarning", warnings.showwarning)
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            main()
        signal.signal(signal.SIGTERM, before)
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return Done(int(ended.value.code or 0), out, err.decode())

    return run


NAMES = {"dataset": "digits", "network": "mlp", "optimizer": "sgd"}


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a study file and returns its path."""

    def write(text: str = TINY) -> Path:
        file = tmp_path / "study.yaml"
        file.write_text(text)
        return file

    return write


def fill(path: Path | str, trials: int = 3, epochs: int = 4) -> Results:
    """Write results of two models per trial, without training; one measure also under way, one of one model only."""
    results = Results.create(path, "made-up")
    arguments = plugins.program_arguments(NAMES)
    started = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    for number in range(trials):
        trial, models = f"t{number:05d}", [f"m{number:05d}{place}" for place in "ab"]
        key = [{"model_id": model, "trial_id": trial} for model in models]
        settings = {**NAMES, "lr": 0.1 * (number + 1), "width": 8 * (number + 1), "milestones": (2, 3)}
        rows = [{**of, "study": "made-up", "epochs_run": epochs, "started_at": started, **settings} for of in key]
        scores = {"status": "finished", "test_acc": 0.5 + number / 1000, "gen_gap": number / 100}
        results.write("models", trial, [{**row, **scores} for row in rows], arguments)
        planned = {"study": "made-up", "planned_at": started, **settings}
        results.write("plan", f"p{number}", [{"model_id": model, **planned} for model in models], arguments)
        of_epochs = [
            {**of, "epoch": epoch, "train_loss": 1 / epoch + number} for of in key for epoch in range(1, epochs + 1)
        ]
        results.write("epochs", trial, of_epochs)
        measured = [
            {
                **of,
                "epoch": epoch,
                "measure": "lpf",
                "label": "lpf(sigma=0.1)",
                "value": epoch + number,
                "settings": "{}",
            }
            for of in key
            for epoch in (2, epochs)
        ]
        one = {**key[0], "epoch": epochs, "measure": "l2_norm", "label": "l2_norm", "value": -1.5, "settings": "{}"}
        results.write("sharpness", trial, [*measured, one])
    return results


TWO_WIDTHS = """\
study: tiny
about: Two widths.
source: Nobody 2020
settings: {dataset: digits, network: mlp, optimizer: sgd, lr: 0.05, batch_size: 250, epochs: 2}
axes: {width: [2, 4]}
seeds: 2
measures: [l2_norm, 'loss_surface(points_per_axis=3)']
"""

INLINE = LaunchOptions(inline=True)


def go(study: Path, path: Path, *overrides: str) -> Launched:
    """Launch a study in this process, without a display."""
    return launch(str(study), path, overrides, INLINE, Console(quiet=True))


def two_widths(folder: Path) -> Results:
    """Run `tiny.yaml` in a folder: four models, two failed attempts of one of them, a measure that was added later."""
    (folder / "tiny.yaml").write_text(TWO_WIDTHS)
    found = go(folder / "tiny.yaml", folder / "results").results
    measure(found.path, ["random"], INLINE)
    for attempt in (1, 2):  # of a model that was trained in the end
        row = found.table("models").to_pylist()[0]
        at = {"model_id": row["model_id"], "trial_id": row["trial_id"], "at": row["started_at"]}
        found.write("failures", f"{row['trial_id']}-{attempt}", [{**at, "attempt": attempt, "error": "lost node"}])
    return found
