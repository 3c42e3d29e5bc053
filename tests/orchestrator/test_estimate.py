"""What a study will cost: counts against closed forms, schedules against brute force, pilots against a launch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from flatmin.errors import RequestError
from flatmin.orchestrator.calibrate import BEGUN, UNSEEN, calibrate, kinds_of, spread, summed
from flatmin.orchestrator.cli import app
from flatmin.orchestrator.endings import Curve, Ending, ending, extrapolated
from flatmin.orchestrator.estimate import estimate, trial_costs
from flatmin.orchestrator.launch import LaunchOptions, launch
from flatmin.orchestrator.plan import make_plan, plan
from flatmin.orchestrator.rates import Line, Rates, makespan, measure_passes, training_seconds
from flatmin.orchestrator.study import Study, read_study
from flatmin.orchestrator.study_file import Resources
from flatmin.plugins import listing
from flatmin.results import Results
from flatmin.settings import REQUIRED
from flatmin.trainables.cost import network_cost
from flatmin.trainables.known_data import published_size
from flatmin.trainables.pilot import Pilot, Seen
from flatmin.trainables.trainer import network_builder

Write = Callable[..., Path]

GREYS = """\
study: greys
settings: {dataset: mnist, network: mlp, width: 3, optimizer: sgd, lr: 0.1, batch_size: 20, epochs: 2}
seeds: 2
"""

STOPS = """\
study: stops
settings: {dataset: digits, network: mlp, optimizer: sgd, epochs: 60, stop_loss: 0.3, eval_every: 20}
axes:
  width: [8, 16]
  batch_size: [50, 100]
  lr: [0.05, 0.1]
seeds: 2
measures: [lpf, gradient_norm]
"""


@pytest.fixture
def no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the data folder, which is not there."""
    monkeypatch.setenv("FLATMIN_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def settings(name: str, **given: Any) -> tuple[tuple[str, Any], ...]:
    """Return a network's name and settings, defaults filled in."""
    arguments = listing("network")[name].arguments
    own = {key: given.get(key, argument.default) for key, argument in arguments.items()}
    return (("network", name), *((key, 4 if value is REQUIRED else value) for key, value in own.items()))


def test_operations_of_an_mlp_are_two_for_each_weight_of_a_matrix() -> None:
    counted = network_cost(settings("mlp", width=12, depth=2), (1, 8, 8), 10)
    assert counted.flops == 2 * (64 * 12 + 12 * 12 + 12 * 10)
    assert counted.n_params == 64 * 12 + 12 * 12 + 12 * 10 + 12 + 12 + 10
    assert (counted.loops, counted.chain_outputs) == (False, 10)


@pytest.mark.parametrize("name", ["lenet5", "resnet18_narrow", "shake_shake", "unet", "vgg16_bn"])
def test_operations_of_convolutions_are_those_of_their_closed_form(name: str) -> None:
    total = 0

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += 2 * module.in_features * module.out_features
        elif isinstance(module, nn.ConvTranspose2d):  # every number that comes in goes to a kernel's worth of others
            total += 2 * inputs[0][0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Conv2d):
            total += 2 * output[0].numel() * module.weight[0].numel()

    network = network_builder(dict(settings(name)), (3, 32, 32), 10)().eval()
    for module in network.modules():
        module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    counted = network_cost(settings(name), (3, 32, 32), 10)
    assert counted.flops == total
    assert (counted.loops, counted.chain_outputs) == (True, 0)


@pytest.mark.parametrize("concurrency", [1, 2, 3])
@pytest.mark.parametrize("seconds", [[5.0], [3.0, 3.0, 2.0, 2.0, 2.0], [8.0, 7.0, 6.0, 5.0, 4.0], [1.0, 1.0, 9.0]])
def test_a_schedule_is_as_near_to_the_best_as_the_longest_first_are(seconds: list[float], concurrency: int) -> None:
    best = min(
        max(sum(s for s, at in zip(seconds, places, strict=True) if at == worker) for worker in range(concurrency))
        for places in product(range(concurrency), repeat=len(seconds))
    )
    found = makespan(seconds, concurrency)
    assert best <= found <= best * (4 / 3 - 1 / (3 * concurrency)) + 1e-12  # Graham 1969
    assert makespan(seconds, 1) == sum(seconds)


def test_a_stack_that_shrinks_takes_what_its_epochs_do(write_study: Write) -> None:
    trial = plan(str(write_study(STOPS))).trials[0]
    cost = {"train_size": 1000, "test_size": 797, "val_size": 0, "batches": 1}
    rates = Rates(Line(2.0, 0.5), Line(0.1, 0.03), measures=7.0)
    ends = [3, 60, 7, 7]
    steps, seconds = 1000 / trial.program["batch_size"], 0.0
    for epoch in range(60):
        alive = sum(end > epoch for end in ends)
        seconds += steps * (2.0 + 0.5 * alive) + (1 + 0.797 / 20) * (0.1 + 0.03 * alive)
    assert training_seconds(trial, cost, rates, ends) == pytest.approx(seconds)


def test_every_measure_has_a_cost() -> None:
    passes = {name: measure_passes(name, 10_000, 1000) for name in listing("measure")}
    assert all(0 <= value < math.inf for value in passes.values())
    assert passes["random"] == 0
    assert passes["gradient_norm"] == 2
    assert passes["fourier"] == 1
    assert passes["lambda_max"] > passes["lpf"] > passes["gradient_norm"]
    assert measure_passes("hessian_trace", 5, 1000) == 20
    assert measure_passes("hessian_trace(max_samples=8)", 10_000, 1000) == 32
    assert measure_passes("hessian_trace", 10_000, 1000, chain_outputs=10) == 22
    assert measure_passes("hessian_trace(max_samples=5)", 10_000, 1000, chain_outputs=10) == 20
    assert measure_passes("lpf(subset=100)", 10_000, 1000) == passes["lpf"] / 10


def test_data_that_are_not_here_are_as_large_as_published(no_data: Path, write_study: Write) -> None:
    cost = estimate(plan(str(write_study(GREYS))).trials)
    assert cost.problem == ""
    assert cost.total is not None
    assert "mnist is not at" in cost.basis
    assert trial_costs(plan(str(write_study(GREYS))).trials)[0]["train_size"] == 60_000
    assert [place.name for place in no_data.iterdir()] == ["costs"]


def test_the_size_of_every_data_set_with_files_is_known() -> None:
    bundled = {"digits", "quadratic", "sinusoids"}
    for name, plugin in listing("dataset").items():
        if plugin.module.startswith("flatmin."):
            assert (published_size({"dataset": name}) is None) == (name in bundled), name


def curve(points: list[tuple[float, float]], *, ended: bool = False) -> Curve:
    return Curve(tuple(epoch for epoch, _ in points), tuple(loss for _, loss in points), ended)


def test_a_loss_that_falls_as_a_power_or_exponentially_bounds_the_end() -> None:
    power = curve([(epoch, 10 / epoch) for epoch in range(1, 41)])
    exponential = curve([(epoch, math.exp(-epoch / 10)) for epoch in range(1, 41)])
    assert 40 < extrapolated(power, 0.1, 1000) < 100  # reached at 100
    assert 60 < extrapolated(exponential, math.exp(-6), 1000) < 100  # reached at 60
    assert extrapolated(power, 10 / 40, 1000) == pytest.approx(40)
    assert extrapolated(power, 1e-9, 50) == pytest.approx(50)
    assert extrapolated(curve([(1, 2.0), (2, 2.5)]), 0.1, 70) == 70
    assert extrapolated(curve([(1, 2.0)]), 0.1, 70) == 70


def test_a_model_goes_the_way_of_others_at_its_own_pace() -> None:
    def loss(time: float) -> float:
        return 2.0 / (1 + time) + 0.5 * math.exp(-((time / 30) ** 3))  # slow, then fast: no power, no exponential

    fast = curve([(epoch, loss(epoch)) for epoch in range(1, 61)], ended=True)
    slow = curve([(epoch, loss(epoch / 4)) for epoch in range(1, 41)])
    found = ending(slow, loss(60), 1000, [fast])
    assert found.expected == pytest.approx(240, rel=0.02)
    assert found.low < 240 < found.high < 400
    assert ending(fast, loss(60), 1000) == Ending(60, 60, 60)
    assert ending(slow, 0.0, 1000, [fast]) == Ending(1000, 1000, 1000)
    assert ending(slow, loss(60), 100, [fast]).expected == 100
    alone = ending(slow, loss(60), 1000)
    assert (alone.low, alone.high) == (40, 1000)


def fake(models: int, *, end: float | None, seconds: float = 2.0) -> Pilot:
    """Return a pilot of models that ended there, or have not after 10 epochs."""
    seen = Seen((5.0, 10.0), (2.0, 1.0), ended=False) if end is None else Seen((end,), (0.3,), ended=True)
    return Pilot((0.0, seconds), (0.0, 0.0), 3.0, 1.0, (seen,) * models, complete=False, spent=5.0)


def test_trials_take_what_pilots_found_and_others_what_the_nearest_did(write_study: Write) -> None:
    study = read_study(str(write_study(STOPS)))
    trials = plan(str(write_study(STOPS))).trials
    costs = trial_costs(trials)
    kinds = kinds_of(trials, costs, study.arguments)
    assert [len(trial.models) for trial in trials] == [4, 4, 4, 4]
    own = list(kinds.values())
    for kind in own[:3]:
        kind.take(fake(4, end=20.0))
    found = summed(trials, costs, own, 2)
    steps = [1000 / trial.program["batch_size"] for trial in trials]
    seconds = [second or 0.0 for second in found.seconds]
    for place in range(3):
        assert seconds[place] == pytest.approx(4 * (20 * steps[place] * 2.0 + 3.0))
    ratio = seconds[3] / max(seconds[:3])  # of another width or batch: by its counts
    assert 0.2 < ratio < 5
    assert found.total is not None
    assert found.low == pytest.approx(sum(seconds[:3]) / BEGUN + seconds[3] / UNSEEN)
    assert found.high == pytest.approx(sum(seconds[:3]) * BEGUN + seconds[3] * UNSEEN)
    assert found.wall is not None
    assert found.wall > found.total / 2


def test_the_interval_goes_from_ending_now_to_all_epochs(write_study: Write) -> None:
    study = read_study(str(write_study(STOPS)))
    trials = plan(str(write_study(STOPS))).trials[:1]
    kind = next(iter(kinds_of(trials, trial_costs(trials), study.arguments).values()))
    kind.take(fake(4, end=None))
    found = summed(trials, trial_costs(trials), [kind], 1)
    epoch = 4 * 2.0 * 1000 / trials[0].program["batch_size"]
    assert found.low == pytest.approx((10 * epoch + 12) / BEGUN)
    expected = extrapolated(curve([(5.0, 2.0), (10.0, 1.0)]), 0.3, 60)
    assert found.seconds == pytest.approx((expected * epoch + 12,))
    assert found.high == pytest.approx((60 * epoch + 12) * BEGUN)


def test_a_pilot_trains_models_that_differ_first(write_study: Write) -> None:
    study = read_study(str(write_study(STOPS)))
    trials = make_plan(study, 2).trials
    kind = next(iter(kinds_of(trials, trial_costs(trials), study.arguments).values()))
    assert sorted(model.settings["lr"] for model in kind.pilot_trial().models) == [0.05, 0.1]


def test_few_pilots_are_spread_from_the_cheapest_to_the_dearest(write_study: Write) -> None:
    study = read_study(str(write_study(STOPS)), ["width=2,8,64,512,1024"])
    trials = make_plan(study).trials
    kinds = list(kinds_of(trials, trial_costs(trials), study.arguments).values())
    chosen = spread(kinds, 3)
    ranked = spread(kinds, 100)
    assert len(ranked) == 10
    assert (chosen[0], chosen[-1], len(chosen)) == (ranked[0], ranked[-1], 3)


def calibrated(study: Study, budget: float) -> Any:
    resources = Resources(gpus_per_trial=0)
    return calibrate(make_plan(study).trials, study.arguments, resources, budget=budget, concurrency=1)


def test_a_calibrated_interval_holds_what_a_launch_takes(write_study: Write, tmp_path: Path) -> None:
    study = read_study(str(write_study(STOPS)))
    found = calibrated(study, 12.0)
    options = LaunchOptions(inline=True)
    options = replace(options, run=replace(options.run, gpus_per_trial=0))
    launch(str(write_study(STOPS)), tmp_path / "results", [], options, Console(file=StringIO()))
    results = Results.open(tmp_path / "results")
    taken = sum(sum(results.table(table)["seconds"].to_pylist()) for table in ("models", "sharpness"))
    assert found.low < found.total < found.high
    assert found.low / 3 < taken < found.high * 3  # another load of the machine may be worth a factor
    assert "pilots of 4 of 4 kinds" in found.basis


def test_calibrating_needs_the_data_and_says_so(no_data: Path, write_study: Write) -> None:
    study = read_study(str(write_study(GREYS)))
    with pytest.raises(RequestError, match=r"trains on the data, and mnist is not at .*; leave --calibrate out"):
        calibrated(study, 5.0)
    shown = CliRunner().invoke(app, ["plan", str(write_study(GREYS)), "--json", "--concurrency", "2"])
    found = json.loads(shown.stdout)
    assert (found["calibrated"], found["device_seconds_low"]) == (False, None)
    assert found["wall_seconds"] > 0


def test_a_machine_that_is_too_small_cannot_calibrate(write_study: Write) -> None:
    study = read_study(str(write_study(STOPS)))
    resources = Resources(cpus_per_trial=100_000, gpus_per_trial=0)
    with pytest.raises(RequestError, match="a trial needs 100000 CPUs and 0 GPUs, and this machine has"):
        calibrate(make_plan(study).trials, study.arguments, resources)
