"""Packing: stack sizes for a number of devices, and how many stacks a device's memory holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from flatmin import Results
from flatmin.errors import RequestError
from flatmin.orchestrator import packing
from flatmin.orchestrator.launch import LaunchOptions, launch
from flatmin.orchestrator.packing import balanced, fitting, share_of_a_gpu, stacks_per_gpu, with_balanced
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.rates import Line, Rates, makespan
from flatmin.orchestrator.study import Study, read_study
from flatmin.trial import Execution

Write = Callable[..., Path]


@pytest.fixture
def one_kind(write_study: Write) -> Callable[[int], Study]:
    """Return a function that reads a study of so many models of one kind."""
    return lambda models: read_study(str(write_study()), ["width=2", f"seeds={models}"])


def test_the_shortest_of_a_few_jobs_is_found_by_trying_all_ways() -> None:
    seconds, machines = [5.0, 4.0, 3.0, 3.0, 3.0], 2
    ways = itertools.product(range(machines), repeat=len(seconds))
    best = min(
        max(sum(s for s, m in zip(seconds, way, strict=True) if m == machine) for machine in range(machines))
        for way in ways
    )
    assert best == 9.0
    assert best <= makespan(seconds, machines) <= (4 / 3 - 1 / (3 * machines)) * best, "Graham's bound of 1969"


@pytest.mark.parametrize(
    ("models", "at_a_time", "stacks"),
    [
        (32, 1, [32]),  # alone, one stack costs least
        (32, 2, [16] * 2),
        (32, 4, [8] * 4),
        (32, 8, [4] * 8),
        (48, 3, [16] * 3),
        (4, 64, [1] * 4),  # more devices than models
        (40 * 20, 1, [40] * 20),  # so many trials that the last ones do not count
    ],
)
def test_stacks_are_as_large_as_keeps_all_devices_busy(
    one_kind: Callable[[int], Study],
    models: int,
    at_a_time: int,
    stacks: list[int],
) -> None:
    line = Line(1.0, 1.0)  # a stack of n takes 1 + n: a second is lost for every stack, whatever its size
    study = one_kind(models)
    largest = balanced(study, at_a_time, lambda trial, cost: Rates(line, Line(0.0, 0.0), 0.0))
    assert [len(trial.models) for trial in make_plan(study, largest).trials] == stacks


def test_what_a_study_was_launched_with_stays(write_study: Write, tmp_path: Path) -> None:
    study, options = write_study(), LaunchOptions(inline=True, models_per_trial="balanced", concurrency=4)
    overrides = ["seeds=8", "width=2", "epochs=1"]
    launch(str(study), tmp_path / "r", overrides, options, Console(quiet=True))
    results = Results.open(tmp_path / "r")
    trials = set(results.models()["trial_id"])
    assert len(trials) == 4
    assert yaml.safe_load(results.study_file.read_text())["resources"]["models_per_trial"] == 2
    again = with_balanced(read_study(str(study), overrides), results.path, at_a_time=1)
    assert {trial.trial_id for trial in make_plan(again).trials} == trials


def test_several_processes_for_a_model_are_no_stack_to_balance(write_study: Write, tmp_path: Path) -> None:
    from flatmin.orchestrator.runner import RunOptions

    options = LaunchOptions(models_per_trial="balanced", run=RunOptions(processes_per_model=2))
    with pytest.raises(RequestError, match="--models-per-trial balanced: --processes-per-model 2 trains one"):
        launch(str(write_study()), tmp_path / "r", options=options)


def test_as_many_stacks_share_a_device_as_its_memory_holds(write_study: Write) -> None:
    study = read_study(str(write_study()), ["width=4096", "seeds=4"])
    weights = 4 * 4 * (64 * 4096 + 4096 + 4096 * 10 + 10)  # of four models, in bytes
    fits = stacks_per_gpu(make_plan(study).trials, Execution(), device_bytes=2**30, device="cpu")
    assert 1 <= fits <= 2**30 / (3 * weights), "weights, gradients and momentum at least"


def test_without_a_gpu_there_is_nothing_to_fill(write_study: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_probed", lambda trial, execution, device: (2**30, None))
    trials = make_plan(read_study(str(write_study()))).trials
    assert stacks_per_gpu(trials, Execution(), device_bytes=8 * 2**30) == 7
    with pytest.raises(RequestError, match="torch sees no GPU here; give a number"):
        stacks_per_gpu(trials, Execution())
    with pytest.raises(RequestError, match=r"a stack takes 1\.1 GB, and the device has 0\.1 GB"):
        stacks_per_gpu(trials, Execution(), device_bytes=2**27)


def test_memory_is_not_filled_to_the_brim() -> None:
    assert [fitting(taken, 1000) for taken in (1, 100, 300, 450, 451, 1000)] == [16, 9, 3, 2, 1, 1]


def test_a_share_is_asked_for_once() -> None:
    assert share_of_a_gpu(0.5, None, (), Execution()) == 0.5
    assert share_of_a_gpu(None, 4, (), Execution()) == 0.25
    with pytest.raises(RequestError, match=r"--stacks-per-gpu and --gpus-per-trial 0\.5 say the same"):
        share_of_a_gpu(0.5, 4, (), Execution())
