"""Kills for real: SIGKILL to a worker within a trial, and to the driver within a sweep."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
from tests.faults.conftest import TIMEOUT, Judge, finish, no_process_left, rows, start, under_way, wait_for, workers

from flatmin.orchestrator.launch import LaunchOptions, launch
from flatmin.plugins import optimizer_names, optimizer_parts
from flatmin.results import Results


def test_a_killed_worker_is_replaced_and_loses_nothing(
    study: Path, undisturbed: list[pd.DataFrame], tmp_path: Path, judge: Judge
) -> None:
    driver = start(study, tmp_path / "r")
    with no_process_left(driver):
        wait_for(lambda: under_way(tmp_path / "r") and bool(workers(driver.pid)), driver)
        workers(driver.pid)[0].kill()
        said = finish(driver)
    assert "will be tried again" in said
    failures = Results.open(tmp_path / "r").failures()
    assert failures["error"].str.contains("ActorDiedError").all()
    assert len(failures) >= 1
    judge("worker SIGKILLed", 1, tmp_path / "r", undisturbed)


def test_a_killed_driver_leaves_a_sweep_that_goes_on(
    study: Path, undisturbed: list[pd.DataFrame], tmp_path: Path, judge: Judge
) -> None:
    first = start(study, tmp_path / "r")
    with no_process_left(first):
        family = []
        wait_for(lambda: any(tmp_path.glob("r/models/*.parquet")) and under_way(tmp_path / "r"), first)
        family = psutil.Process(first.pid).children(recursive=True)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    done = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("r/models/*.parquet")}
    second = start(study, tmp_path / "r")
    with no_process_left(second):
        finish(second)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    judge("driver SIGKILLed, launched again", 1, tmp_path / "r", undisturbed)
    for name, written in done.items():
        assert (tmp_path / "r" / "models" / name).stat().st_mtime_ns == written, "a finished trial was done again"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_with_130_and_the_same_command_goes_on(
    study: Path, undisturbed: list[pd.DataFrame], tmp_path: Path, judge: Judge, number: signal.Signals
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
    judge(f"driver {number.name}, launched again", 1, tmp_path / "r", undisturbed)


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
def test_every_optimizer_goes_on_bit_for_bit_after_sigkill(optimizer: str, tmp_path: Path, judge: Judge) -> None:
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
    judge(f"{optimizer}: SIGKILL", 1, tmp_path / "r", rows(tmp_path / "undisturbed"))
