"""Faults injected for real: studies, what they give undisturbed, and the table that `make faults` prints at its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from rich.console import Console
from rich.table import Table

from flatmin.bucket import Place
from flatmin.orchestrator.launch import LaunchOptions, launch
from flatmin.results import Results

STUDY = """\
study: faults
settings: {dataset: digits, network: mlp, dropout: 0.1, optimizer: adam, lr: 3e-3, batch_size: 100, epochs: 150}
axes: {width: [4, 8, 16], stop_loss: [0.0, 0.5]}
seeds: 2
measures: [lpf(max_samples=16), lambda_max]
measure_every: 60
"""

PLUGIN_STUDY = """\
study: faults
settings: {dataset: digits, network: mlp, precision: fp64, optimizer: faulty, batch_size: 100, epochs: 8}
axes: {width: [4, 8], lr: [0.001, 0.002]}
seeds: 2
measures: [l2_norm, lambda_max]
"""

PLUGIN = '''\
"""Sign descent, which does in its update what FLATMIN_FAULT says: some only where FLATMIN_ONCE is no file yet."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from flatmin.optimizers.arguments import LearningRate
from flatmin.optimizers.interface import Base


def faulty(*, lr: LearningRate = 1e-3) -> Base:
    """Sign descent."""
    return Faulty(lr)


def once() -> bool:
    marker = Path(os.environ["FLATMIN_ONCE"])
    first = not marker.exists()
    marker.touch()
    return first


@dataclass(frozen=True)
class Faulty:
    lr: float

    def init(self, params):
        return {"mean": torch.zeros_like(params)}

    def update(self, params, found, state, step):
        faults = os.environ.get("FLATMIN_FAULT", "").split()
        if step.count == 40:
            if "sleep" in faults and once():
                time.sleep(1e6)
            if "stop" in faults and once():
                os.kill(os.getpid(), signal.SIGSTOP)
            if "memory" in faults and len(params) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            if "raise" in faults and bool((torch.as_tensor(self.lr) == 0.002).any()) and params.shape[1] < 400:
                raise ZeroDivisionError("a bug of the plug-in")
        if "swell" in faults and step.count == 5 and once():
            self.swell()
        if "slow" in faults:
            time.sleep(0.02)
        if "slower" in faults:
            time.sleep(0.1)
        mean = 0.9 * state["mean"] + 0.1 * found.grad
        return params - self.lr * step.lr_factor * mean.sign(), {"mean": mean}

    def swell(self):
        """Take memory until whoever watches over it ends this process."""
        taken = []
        while True:
            taken.append(bytearray(b"x" * 100_000_000))
            time.sleep(0.05)
'''

ENTRY = "[flatmin.optimizers]\nfaulty = flatmin_faulty:faulty\n"

TIMEOUT = 540.0


@dataclass(frozen=True)
class Verdict:
    """What a fault has done to a study: every planned model should be there once, equal to the undisturbed run's.

    Attributes:
        fault: What was injected.
        injected: How often.
        planned: Models planned.
        lost: Models that are not there.
        duplicated: Rows over one per model, over a model and epoch, over a model, epoch and measure.
        differing: Models of which a value is not that of the undisturbed run.
    """

    fault: str
    injected: int
    planned: int
    lost: int
    duplicated: int
    differing: int


Judge = Callable[..., Verdict]


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Judge:
    """Return a function that compares results with the undisturbed ones, and keeps the verdict for the table."""

    def check(
        fault: str,
        injected: int,
        results: Place | str,
        expected: list[pd.DataFrame],
        *,
        failed: int = 0,
        tolerance: float = 0.0,
    ) -> Verdict:
        opened = Results.open(results)
        found = rows(results)
        planned = set(opened.plan()["model_id"])
        verdict = Verdict(
            fault,
            injected,
            len(planned),
            lost=len(planned - set(found[0]["model_id"])) - failed,
            duplicated=sum(
                len(table) - len(table.drop_duplicates(key)) for table, key in zip(found, KEYS, strict=True)
            ),
            differing=len(differing(found, expected, tolerance)),
        )
        request.node.user_properties.append(("fault", json.dumps(asdict(verdict))))
        assert (verdict.lost, verdict.duplicated, verdict.differing) == (0, 0, 0), verdict
        if isinstance(opened.path, Path):
            assert not list(opened.path.glob("checkpoints/*.state")), "nothing is left under way"
            assert not list(opened.path.rglob(".*.tmp")), "nothing is left half written"
        return verdict

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print a row for every fault that was injected."""
    kept = [
        json.loads(value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "fault"
    ]
    if not kept:
        return
    table = Table("fault", "injected", "planned", "lost", "duplicated", "differing", title="faults")
    for verdict in kept:
        table.add_row(*map(str, verdict.values()))
    Console(width=120).print(table)


@pytest.fixture(autouse=True)
def _workers_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ray's workers run at the niceness of this process, not at 15 more: on a busy machine they would starve."""
    monkeypatch.setenv("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study of 12 models in 3 trials."""
    file = tmp_path_factory.mktemp("study") / "faults.yaml"
    file.write_text(STUDY)
    return file


@pytest.fixture(scope="session")
def undisturbed(study: Path, tmp_path_factory: pytest.TempPathFactory) -> list[pd.DataFrame]:
    """Return the rows of a run that nothing disturbs, in this process."""
    path = tmp_path_factory.mktemp("undisturbed") / "r"
    launch(str(study), path, options=LaunchOptions(inline=True))
    return rows(path)


@pytest.fixture
def plugin(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install an optimizer that can go wrong, for this process and those that it starts; return a study with it."""
    folder = tmp_path_factory.mktemp("package")
    info = folder / "flatmin_faulty-1.0.dist-info"
    info.mkdir()
    (folder / "flatmin_faulty.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flatmin-faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "flatmin_faulty", raising=False)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("FLATMIN_ONCE", str(folder / "once"))
    monkeypatch.delenv("FLATMIN_FAULT", raising=False)
    study = folder / "faulty.yaml"
    study.write_text(PLUGIN_STUDY)
    return study


@pytest.fixture(scope="session")
def kept() -> list[pd.DataFrame]:
    """Return where `unharmed` keeps what it has made."""
    return []


@pytest.fixture
def unharmed(plugin: Path, kept: list[pd.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> list[pd.DataFrame]:
    """Return the rows of the plug-in's study when it does not go wrong; made once, by whoever needs it first."""
    if not kept:
        path = tmp_path_factory.mktemp("unharmed") / "r"
        launch(str(plugin), path, options=LaunchOptions(inline=True))
        kept.extend(rows(path))
    return kept


KEYS = (["model_id"], ["model_id", "epoch"], ["model_id", "epoch", "label"])


def rows(path: Place | str) -> list[pd.DataFrame]:
    """Return what must be equal bit for bit: all but times and how and with whom a model was trained."""
    results = Results.open(path)
    apart = ["seconds", "trial_id"]
    tables = [
        results.models().drop(columns=[*apart, "started_at", "execution"]),
        results.epochs().drop(columns=apart),
        results.sharpness().drop(columns=apart),
    ]
    return [table.sort_values(key, ignore_index=True) for table, key in zip(tables, KEYS, strict=True)]


def differing(found: list[pd.DataFrame], expected: list[pd.DataFrame], tolerance: float) -> set[str]:
    """Return the models that are there and of which a row is not that of the undisturbed run."""
    wrong = set[str]()
    for ours, theirs in zip(found, expected, strict=True):
        for model_id, own in ours.groupby("model_id"):
            other = theirs[theirs["model_id"] == model_id].reset_index(drop=True)
            try:
                pd.testing.assert_frame_equal(
                    own.reset_index(drop=True), other, check_exact=not tolerance, rtol=tolerance, atol=tolerance
                )
            except AssertionError:
                wrong.add(str(model_id))
    return wrong


def start(study: Path, results: Place | str, *options: str) -> subprocess.Popen[str]:
    """Launch a sweep on a private Ray unless told otherwise, with a checkpoint every 0.2 s."""
    command = [sys.executable, "-m", "flatmin.orchestrator", "launch", str(study), "--results", str(results)]
    return subprocess.Popen(
        [*command, "--checkpoint-every", "0.2s", *options],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )


def finish(driver: subprocess.Popen[str], code: int = 0) -> str:
    _, said = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == code, said
    return said


def wait_for(what: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not what():
        assert driver.poll() is None, f"the driver ended before the fault: {driver.communicate()[1]}"
        assert time.monotonic() < deadline, "the moment for the fault never came"
        time.sleep(0.02)


@contextlib.contextmanager
def no_process_left(driver: subprocess.Popen[str]) -> Iterator[None]:
    """Kill at the end what the driver has started and not ended, its own processes alone."""
    family: list[psutil.Process] = []
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(driver.pid).children(recursive=True)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if driver.poll() is None:
            driver.kill()
        driver.wait()
        if driver.stderr:
            driver.stderr.close()


def under_way(results: Path) -> bool:
    return any(results.glob("checkpoints/*.state"))


def workers(parent: int) -> list[psutil.Process]:
    """Return the Ray workers below a process that train right now; Ray names a process by the method it runs."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "Trainable.train" in " ".join(process.cmdline()):
                found.append(process)
    return found
