"""A simulation of how a study of 2,916 models keeps 8, 64 and 512 GPUs busy: lower bound, us, and the published way.

    python benchmarks/schedule.py [--study lpf-sharpness] [--gpus 8,64,512] [--seed 0]

**Real** are the study, its partition into stacks (`auto`, and `balanced` over the GPUs), the arithmetic of each
network, what a stack costs that shrinks as its models end, the passes that measures take, and the order in which a
launch starts trials: the longest first, by an estimate in which every model trains all its epochs.

**Stated, not measured**, are seconds: a GPU does `ACHIEVED` operations a second on these networks, and a pass through a
layer takes `LAUNCHES` seconds for its kernels to be launched, once for a whole stack. So is when models stop: after
`EPOCHS` epochs, lognormal with `SPREAD` within the logarithm, a share of `NEVER` not at all; the order knows nothing of
that.

The **published** way is a process per model and a model per GPU, in the order of the grid, 9,000 GPU-hours in all:
`PUBLISHED`, shared out among the models by their arithmetic and their epochs.

The lower bound of a set of trials is that of any schedule: their sum over the number of GPUs, or the longest of them.
The ratio is that of the makespan to the least such bound of the stack sizes shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from _figures import show
from rich.table import Table

from flatmin.orchestrator.estimate import all_epochs, trial_costs
from flatmin.orchestrator.packing import balanced
from flatmin.orchestrator.plan import LARGEST_AUTO_STACK, make_plan, program_key
from flatmin.orchestrator.rates import Line, Rates, list_schedule, longest_first, trial_passes, trial_seconds
from flatmin.orchestrator.study import Study, read_study
from flatmin.trial import Trial

ACHIEVED, LAUNCHES = 1e14, 1e-4
"""Operations per second of a GPU, an eighth of what its matrix products reach; seconds of a layer's forward pass."""

SETUP = 10.0
"""Seconds in which a worker builds a stack and writes its rows."""

EPOCHS, SPREAD, NEVER = 50.0, 0.6, 0.03
"""When models reach the stopping loss: a mean of 60 epochs among those that do."""

Costs = Callable[[Sequence[Trial]], list[dict[str, Any]]]

PUBLISHED = 9000 * 3600.0
"""GPU-seconds of the published study, measures included."""


@dataclass(frozen=True)
class Simulated:
    """A schedule.

    Attributes:
        trials: How many there were.
        seconds: What they take together.
        makespan: When the last one ended.
        bound: When it can end at the earliest.
        utilisation: The share of the GPUs' time until then in which they worked.
    """

    trials: int
    seconds: float
    makespan: float
    bound: float
    utilisation: float


def simulate(seconds: Sequence[float], order: Sequence[int], gpus: int) -> Simulated:
    """Return what comes of trials that are started in an order, each on the GPU that is free first."""
    ends = list_schedule([seconds[number] for number in order], gpus)
    last, total = max(ends), sum(seconds)
    return Simulated(len(seconds), total, last, max(total / gpus, max(seconds)), total / (gpus * last))


def stated_rates(trial: Trial, cost: Mapping[str, Any]) -> Rates:
    """Return the rates of a GPU: kernels are launched once for a stack, arithmetic is done for every model."""
    launches, operations = LAUNCHES * cost["layers"], cost["flops"] / ACHIEVED
    examples, passes = trial.program["batch_size"], cost["train_size"] / 512
    return Rates(
        step=Line(3 * launches, 3 * examples * operations),
        evaluation=Line(passes * launches, cost["train_size"] * operations),
        measures=trial_passes(trial, cost) * (passes * launches + cost["train_size"] * operations),
    )


def epochs_of(study: Study, seed: int) -> dict[str, float]:
    """Return after how many epochs each model stops, at most all of its own."""
    numbers = np.random.default_rng(seed)
    drawn = EPOCHS * np.exp(SPREAD * numbers.standard_normal(len(study.models)))
    never = numbers.random(len(study.models)) < NEVER
    return {
        model.model_id: float(model.settings["epochs"] if stays else min(max(1.0, end), model.settings["epochs"]))
        for model, end, stays in zip(study.models, drawn, never, strict=True)
    }


def remembered(study: Study) -> Costs:
    """Return what gives the costs of a study's trials, which are counted once."""
    trials = make_plan(study).trials
    found = {
        program_key(t.models[0], study.arguments): cost for t, cost in zip(trials, trial_costs(trials), strict=True)
    }
    return lambda trials: [found[program_key(trial.models[0], study.arguments)] for trial in trials]


def ours(
    study: Study, costs: Costs, largest: int | str, ends: Mapping[str, float], gpus: int, *, measured: bool
) -> Simulated:
    """Return the schedule of a launch."""
    if not measured:
        study = replace(study, measures_of=dict.fromkeys(study.measures_of, ()))
    size = balanced(study, gpus, stated_rates, costs) if largest == "balanced" else int(largest)
    trials = make_plan(study, size).trials
    expected, taken = [], []
    for trial, cost in zip(trials, costs(trials), strict=True):
        rates = stated_rates(trial, cost)
        expected.append(trial_seconds(trial, cost, rates, all_epochs(trial)))
        taken.append(SETUP + trial_seconds(trial, cost, rates, [ends[model.model_id] for model in trial.models]))
    return simulate(taken, longest_first(expected), gpus)


def published(study: Study, costs: Costs, ends: Mapping[str, float], gpus: int) -> Simulated:
    """Return the schedule of one process per model, in grid order."""
    alone = {trial.models[0].model_id: trial for trial in make_plan(study, 1).trials}
    trials = [alone[model.model_id] for model in study.models]
    work = [ends[t.models[0].model_id] * cost["flops"] for t, cost in zip(trials, costs(trials), strict=True)]
    return simulate([PUBLISHED * share / sum(work) for share in work], range(len(work)), gpus)


def main() -> None:
    """Simulate each number of GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="lpf-sharpness")
    parser.add_argument("--gpus", default="8,64,512")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    study = read_study(given.study)
    ends, costs = epochs_of(study, given.seed), remembered(study)
    table = Table(
        "GPUs", "what", "stacks", "trials", "GPU-hours", "makespan, h", "lower bound, h", "ratio", "utilisation"
    )
    table.title = f"Simulated: {len(ends)} models on {given.gpus} GPUs"
    for gpus in map(int, given.gpus.split(",")):
        ways = {"published": {"one model each": published(study, costs, ends, gpus)}}
        for name, measured in (("training", False), ("training and measures", True)):
            ways[name] = {
                stacks: ours(study, costs, largest, ends, gpus, measured=measured)
                for stacks, largest in (("auto", LARGEST_AUTO_STACK), ("balanced", "balanced"), ("one model each", 1))
            }
        for name, found in ways.items():
            least = min(one.bound for one in found.values())
            for stacks, one in found.items():
                hours = (f"{second / 3600:.2f}" for second in (one.seconds, one.makespan, one.bound))
                ratio = f"{one.makespan / least:.2f}"
                table.add_row(str(gpus), name, stacks, str(one.trials), *hours, ratio, f"{one.utilisation:.0%}")
    mean = sum(ends.values()) / len(ends)
    about = (
        f"simulated: {len(ends)} models, mean {mean:.0f} epochs; stated {ACHIEVED:.0e} operations/s and {LAUNCHES:.0e} "
        f"s a layer; seed {given.seed}"
    )
    show(table, "schedule", ("flatmin-sweep",), about=about)


if __name__ == "__main__":
    main()
