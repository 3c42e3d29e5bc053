"""Kills for real: SIGKILL to a worker within a trial, and to the driver within a sweep."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest

from flatmin.orchestrator.launch import LaunchOptions, launch
from flatmin.plugins import optimizer_names, optimizer_parts
from flatmin.results import Results

STUDY = """\
study: faults
settings: {dataset: digits, network: mlp, dropout: 0.1, optimizer: adam, lr: 3e-3, batch_size: 100, epochs: 150}
axes: {width: [4, 8, 16], stop_loss: [0.0, 0.5]}
seeds: 2
measures: [lpf(max_samples=16), lambda_max]
measure_every: 60
"""

TIMEOUT = 180.0


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "faults.yaml"
    file.write_text(STUDY)
    return file


@pytest.fixture(scope="module")
def undisturbed(study: Path, tmp_path_factory: pytest.TempPathFactory) -> list[pd.DataFrame]:
    """Return the rows of a run that nothing disturbs, in this process."""
    path = tmp_path_factory.mktemp("undisturbed") / "r"
    launch(str(study), path, options=LaunchOptions(inline=True))
    return rows(path)


def rows(path: Path) -> list[pd.DataFrame]:
    """Return what must be equal bit for bit: all but times and how a trial was run."""
    results = Results.open(path)
    tables = [
        results.models().drop(columns=["seconds", "started_at", "execution"]),
        results.epochs().drop(columns="seconds"),
        results.sharpness().drop(columns="seconds"),
    ]
    keys = [["model_id"], ["model_id", "epoch"], ["model_id", "epoch", "label"]]
    return [table.sort_values(key, ignore_index=True) for table, key in zip(tables, keys, strict=True)]


def assert_same(path: Path, expected: list[pd.DataFrame]) -> None:
    planned = sorted(Results.open(path).plan()["model_id"])
    assert sorted(Results.open(path).models()["model_id"]) == planned
    for ours, theirs in zip(rows(path), expected, strict=True):
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    assert not list(path.glob("checkpoints/*.state")), "nothing is left under way"
    assert not list(path.rglob(".*.tmp")), "nothing is left half written"


def start(study: Path, results: Path, *options: str) -> subprocess.Popen[str]:
    """Launch a sweep on a private Ray unless told otherwise, with a checkpoint every 0.2 s."""
    command = [sys.executable, "-m", "flatmin.orchestrator", "launch", str(study), "--results", str(results)]
    return subprocess.Popen(
        [*command, "--checkpoint-every", "0.2s", *options],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )


def finish(driver: subprocess.Popen[str]) -> str:
    _, said = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 0, said
    return said


def wait_for(what: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not what():
        assert driver.poll() is None, "the driver ended before the fault"
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


def under_way(results: Path) -> bool:
    return any(results.glob("checkpoints/*.state"))


def workers(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the Ray workers that train right now; Ray names a process by the method it runs."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "Trainable.train" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_killed_worker_is_replaced_and_loses_nothing(
    study: Path, undisturbed: list[pd.DataFrame], tmp_path: Path
) -> None:
    driver = start(study, tmp_path / "r")
    with no_process_left(driver):
        wait_for(lambda: under_way(tmp_path / "r") and bool(workers(driver)), driver)
        workers(driver)[0].kill()
        said = finish(driver)
    assert "will be tried again" in said
    failures = Results.open(tmp_path / "r").failures()
    assert failures["error"].str.contains("ActorDiedError").all()
    assert len(failures) >= 1
    assert_same(tmp_path / "r", undisturbed)


def test_a_killed_driver_leaves_a_sweep_that_goes_on(
    study: Path, undisturbed: list[pd.DataFrame], tmp_path: Path
) -> None:
    first = start(study, tmp_path / "r")
    with no_process_left(first):
        family = []
        wait_for(lambda: any(tmp_path.glob("r/models/*.parquet")) and under_way(tmp_path / "r"), first)
        family = psutil.Process(first.pid).children(recursive=True)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        first.stderr.close()  # type: ignore[union-attr]
    done = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("r/models/*.parquet")}
    second = start(study, tmp_path / "r")
    with no_process_left(second):
        finish(second)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert_same(tmp_path / "r", undisturbed)
    for name, written in done.items():
        assert (tmp_path / "r" / "models" / name).stat().st_mtime_ns == written, "a finished trial was done again"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_with_130_and_the_same_command_goes_on(
    study: Path, undisturbed: list[pd.DataFrame], tmp_path: Path, number: signal.Signals
) -> None:
    first = start(study, tmp_path / "r")
    with no_process_left(first):
        wait_for(lambda: under_way(tmp_path / "r"), first)
        first.send_signal(number)
        _, said = first.communicate(timeout=TIMEOUT)
    assert first.returncode == 130, said
    assert "run the same command to go on" in said
    assert "Traceback" not in said
    second = start(study, tmp_path / "r", "--inline")
    with no_process_left(second):
        finish(second)
    assert_same(tmp_path / "r", undisturbed)


def test_a_second_driver_is_refused_while_the_first_one_lives(study: Path, tmp_path: Path) -> None:
    first = start(study, tmp_path / "r", "width=4")
    with no_process_left(first):
        wait_for(lambda: (tmp_path / "r" / "lease.json").exists(), first)
        second = start(study, tmp_path / "r", "width=4")
        _, said = second.communicate(timeout=TIMEOUT)
        assert second.returncode == 2
        assert f"in use by process {first.pid}" in said
        finish(first)


KILLED_ALWAYS = ("vasso-adam", "lpf-sgd", "adahessian")
"""Optimizers with an average, a schedule of noise and a stored diagonal; the others take the slow tests' time."""

OPTIMIZER_STUDY = """\
study: optimizers
settings:
  dataset: digits
  network: mlp
  width: 8
  optimizer: {optimizer}
  batch_size: 100
  epochs: {epochs}
{extra}
seeds: 2
"""


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(name, marks=[] if name in KILLED_ALWAYS else [pytest.mark.slow]) for name in optimizer_names()],
)
def test_every_optimizer_goes_on_bit_for_bit_after_sigkill(optimizer: str, tmp_path: Path) -> None:
    """Averages, noise and its schedule, inner steps and stored diagonals are all in the checkpoint."""
    own = {key for part in optimizer_parts(optimizer) for key in part.arguments}
    wanted = {"lpf_increase": 5, "lpf_batches": 2, "lpf_gamma": 0.01, "hessian_every": 3, "scrn_penalty": 5}
    extra = "\n".join(f"  {key}: {value}" for key, value in wanted.items() if key in own)
    study = tmp_path / "study.yaml"
    study.write_text(OPTIMIZER_STUDY.format(optimizer=optimizer, epochs=80, extra=extra))
    launch(str(study), tmp_path / "undisturbed", options=LaunchOptions(inline=True))
    command = [sys.executable, "-m", "flatmin.orchestrator", "launch", str(study), "--inline"]
    command += ["--results", str(tmp_path / "r"), "--checkpoint-every", "0.1s"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first, no_process_left(first):
        wait_for(lambda: under_way(tmp_path / "r"), first)
        first.kill()
    assert under_way(tmp_path / "r")
    finish(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    assert Results.open(tmp_path / "r").models()["execution"].str.contains('"resumed": true').all()
    assert_same(tmp_path / "r", rows(tmp_path / "undisturbed"))
