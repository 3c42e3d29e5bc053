"""Packing: stacks of a size that keeps all devices busy to the end, and as many of them on a GPU as its memory holds.

A stack costs less per model the larger it is, and of few large stacks the last ones run while other devices idle. So of
several largest sizes that one is taken whose estimated makespan is the least, trials started the longest first. The
estimate is that of `flatmin.orchestrator.estimate`, from counts of operations on a CPU. On GPUs, where a stack gains
more, it has not been measured; its stacks are too small there rather than too large.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import yaml

from flatmin.bucket import Place
from flatmin.errors import RequestError
from flatmin.orchestrator.estimate import all_epochs, trial_costs
from flatmin.orchestrator.plan import LARGEST_AUTO_STACK, make_plan, program_key
from flatmin.orchestrator.rates import Rates, makespan, predicted_rates, trial_seconds
from flatmin.orchestrator.study import Study
from flatmin.results import Results
from flatmin.trial import Execution, Trial

SIZES = (LARGEST_AUTO_STACK, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
"""The largest stacks that are tried."""

ENOUGH = 20
"""Trials for each device after which smaller ones gain nothing: the last ones are a twentieth of the whole."""

USED = 0.9
"""The share of a device's memory that stacks may take together; the rest is for what a probe has not seen."""

MOST_ON_A_GPU = 16
"""Stacks that share a GPU at most: each is a process with a core and a data set of its own."""


def balanced(
    study: Study,
    at_a_time: int,
    rates: Callable[[Trial, Mapping[str, Any]], Rates] = predicted_rates,
    costs_of: Callable[[Sequence[Trial]], Sequence[Mapping[str, Any]]] = trial_costs,
) -> int:
    """Return the largest stack with which a study is done first; of equals, the larger one.

    Args:
        study: The study.
        at_a_time: Trials that run at a time.
        rates: How long the parts of a trial take.
        costs_of: What the programs of trials cost.

    Raises:
        RequestError: A trial cannot be trained.
    """
    whole = make_plan(study, SIZES[0]).trials
    costs = dict(zip((_kind(trial, study) for trial in whole), costs_of(whole), strict=True))
    if any("error" in cost for cost in costs.values()):
        return SIZES[0]
    best, least = SIZES[0], float("inf")
    for largest in SIZES:
        trials = make_plan(study, largest).trials
        seconds = []
        for trial in trials:
            cost = costs[_kind(trial, study)]
            seconds.append(trial_seconds(trial, cost, rates(trial, cost), all_epochs(trial)))
        if (found := makespan(seconds, at_a_time)) < least:
            best, least = largest, found
        if len(trials) >= ENOUGH * at_a_time:
            break
    return best


def balanced_over(study: Study, at_a_time: int | None = None) -> int:
    """Return the same for a number of trials at a time that may be left open: as many as this machine holds.

    Raises:
        RequestError: A trial cannot be trained, or this machine has not what one needs.
    """
    from flatmin.orchestrator.calibrate import capacity  # which starts a process to look for GPUs

    return balanced(study, at_a_time or capacity(study.file.resources)[0])


def with_balanced(study: Study, results: str | Place, at_a_time: int | None) -> Study:
    """Return a study whose own largest stack is the balanced one; the one it was launched with, if it was before.

    The partition must not change with the machine on which a launch goes on: trials under way have their checkpoints.

    Args:
        study: The study.
        results: Where its results are, or will be.
        at_a_time: Trials that run at a time; as many as this machine holds when None.

    Raises:
        RequestError: A trial cannot be trained, or this machine has not what one needs.
    """
    file = Results(results).study_file
    before = yaml.safe_load(file.read_text()) if file.exists() else {}
    largest = before.get("resources", {}).get("models_per_trial")
    if not isinstance(largest, int):
        largest = balanced_over(study, at_a_time)
    resources = study.file.resources.model_copy(update={"models_per_trial": largest})
    return replace(study, file=study.file.model_copy(update={"resources": resources}))


def share_of_a_gpu(
    given: float | None, stacks: int | Literal["auto"] | None, trials: Sequence[Trial], execution: Execution
) -> float | None:
    """Return the share of a GPU that one trial is given; None where that is left open.

    Args:
        given: The share that was asked for.
        stacks: How many stacks are to share a GPU; `auto`: as many as its memory holds.
        trials: The plan's stacks.
        execution: How they are run.

    Raises:
        RequestError: Both were asked for; or a probe has failed, or not one stack fits.
    """
    if stacks is None:
        return given
    if given is not None:
        raise RequestError(f"--stacks-per-gpu and --gpus-per-trial {given:g} say the same; leave one out")
    return 1 / (stacks_per_gpu(trials, execution) if stacks == "auto" else stacks)


def _kind(trial: Trial, study: Study) -> object:
    return trial.measures, program_key(trial.models[0], study.arguments)


def stacks_per_gpu(
    trials: Sequence[Trial], execution: Execution, *, device_bytes: int | None = None, device: str = "cuda"
) -> int:
    """Return how many stacks of a plan fit into a GPU's memory together, by probes of those that take most.

    Args:
        trials: The plan's stacks.
        execution: How they are run.
        device_bytes: The memory of a device, where it is not this machine's GPU.
        device: What they are probed on.

    Raises:
        RequestError: A trial cannot be trained, there is no such device here, or it cannot hold one stack.
    """
    costs = trial_costs(trials)
    held = [len(trial.models) * cost.get("n_params", 0) for trial, cost in zip(trials, costs, strict=True)]
    passed = [
        len(trial.models) * trial.program["batch_size"] * cost.get("flops", 0)
        for trial, cost in zip(trials, costs, strict=True)
    ]
    chosen = {max(range(len(trials)), key=sizes.__getitem__) for sizes in (held, passed)}
    probes = [_probed(trials[number], execution, device) for number in sorted(chosen)]
    taken = max(size for size, _ in probes)
    total = device_bytes or probes[0][1]
    if total is None:
        raise RequestError("--stacks-per-gpu auto: torch sees no GPU here; give a number")
    return fitting(taken, total)


def fitting(taken: int, total: int) -> int:
    """Return how many stacks of so many bytes a device holds.

    Raises:
        RequestError: Not one.

    >>> fitting(10, 100), fitting(44, 100), fitting(1, 10_000)
    (9, 2, 16)
    """
    if taken > total:
        raise RequestError(
            f"--stacks-per-gpu auto: a stack takes {taken / 1e9:.1f} GB, and the device has {total / 1e9:.1f} GB; "
            "give a smaller --models-per-trial, or --micro-batch auto"
        )
    return max(1, min(MOST_ON_A_GPU, int(USED * total / taken)))


def _probed(trial: Trial, execution: Execution, device: str) -> tuple[int, int | None]:
    """Probe a stack in a fresh process, whose memory is all its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_footprint, trial, replace(execution, device=device)).result()


def _footprint(trial: Trial, execution: Execution) -> tuple[int, int | None]:
    import torch

    if execution.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("--stacks-per-gpu auto: torch sees no GPU here; give a number")
    from flatmin.trainables.footprint import footprint

    return footprint(trial, execution)
