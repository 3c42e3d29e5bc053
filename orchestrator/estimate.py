"""What a plan will cost: device time and disk, from the arithmetic of its networks.

A rough figure, made before anything has run; `flatmin.orchestrator.calibrate` makes a better one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from flatmin.errors import RequestError, RequestWarning
from flatmin.orchestrator.grid import NAMES
from flatmin.orchestrator.kept_costs import KeptCosts
from flatmin.orchestrator.rates import makespan, predicted_rates, trial_seconds
from flatmin.orchestrator.study_file import Resources
from flatmin.plugins import program_arguments
from flatmin.trial import Trial

EPOCH_ROW_BYTES, MODEL_ROW_BYTES = 60, 4000
"""Parquet bytes of one evaluated epoch, and of all else that is written for a model."""


_CHECKED = frozenset({"data_noise", "label_noise", "label_smoothing"})
"""Settings of single models that a data set may refuse."""


@dataclass(frozen=True)
class Estimate:
    """The cost of trials.

    Attributes:
        seconds: Device seconds expected of each trial, in order; None where the data set is not here to look at.
        bytes: Disk bytes of all trials, or None.
        wall: Seconds by the clock, or None.
        concurrency: With so many trials at a time.
        basis: What it rests on, as the end of a sentence.
        problem: Why there is no figure, or empty.
        low, high: Between which the sum of the seconds is expected; None where nothing was measured.
    """

    seconds: tuple[float | None, ...]
    bytes: int | None
    wall: float | None
    concurrency: int
    basis: str
    problem: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def total(self) -> float | None:
        """Device seconds of all trials, or None."""
        return None if self.problem else sum(second or 0.0 for second in self.seconds)


def estimate(trials: Sequence[Trial], resources: Resources | None = None, concurrency: int | None = None) -> Estimate:
    """Estimate what trials cost if every model trains all its epochs, from counts of operations on a CPU.

    Args:
        trials: The trials.
        resources: What each of them is given.
        concurrency: Trials at a time; as many as this machine has CPUs for when None.

    Raises:
        RequestError: A trial cannot be trained: the data cannot be split like that, or a batch cannot.
    """
    costs = trial_costs(trials)
    problem = next((cost["error"] for cost in costs if "error" in cost), "")
    seconds = tuple(
        None if "error" in cost else trial_seconds(trial, cost, predicted_rates(trial, cost), all_epochs(trial))
        for trial, cost in zip(trials, costs, strict=True)
    )
    sizes = [trial_bytes(trial, cost) for trial, cost in zip(trials, costs, strict=True) if "error" not in cost]
    assumed = next((f"; {cost['assumed']}" for cost in costs if cost.get("assumed")), "")
    concurrency = concurrency or max(1, int(cpus() / (resources or Resources()).cpus_per_trial))
    return Estimate(
        seconds,
        None if problem else sum(sizes),
        None if problem else makespan([second or 0.0 for second in seconds], concurrency),
        concurrency,
        f"from counts of operations, on CPU cores, if every model trains all its epochs{assumed}",
        problem,
    )


def cpus() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def trial_costs(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return `flatmin.trainables.cost.cost` of the program of every trial; what a person should know is warned of.

    Raises:
        RequestError: A trial cannot be trained.
    """
    alike: dict[str, str] = {}  # of many thousand trials, a few kinds
    keys = [alike.setdefault(key, key) for key in map(_what_counts, trials)]
    distinct = {key: {**trial.program, "measures": trial.measures} for key, trial in zip(keys, trials, strict=True)}
    found = dict(zip(distinct, program_costs(list(distinct.values())), strict=True))
    costs = [found[key] for key in keys]
    for cost in costs:
        if "refused" in cost:
            raise RequestError(cost["refused"])
    for note in dict.fromkeys(note for cost in costs for note in cost.get("notes", ())):
        warnings.warn(note, RequestWarning, stacklevel=2)
    return costs


def _what_counts(trial: Trial) -> str:
    """Return what of a trial its cost depends on: all but the settings of single models, corruption excepted."""
    names = tuple((name, str(trial.program[name])) for name in NAMES)
    seen = {name: value for name, value in trial.program.items() if name not in _of_models(names)}
    return json.dumps([seen, trial.measures])


@cache
def _of_models(names: tuple[tuple[str, str], ...]) -> frozenset[str]:
    arguments = program_arguments(dict(names))
    return frozenset(name for name, argument in arguments.items() if argument.setting.per_model) - _CHECKED


def program_costs(programs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return `flatmin.trainables.cost.cost` of every program.

    What is kept is taken; a process that has not loaded torch has the rest computed by one of its own, and stays small.
    """
    kept = KeptCosts()
    found = [kept.read(program) for program in programs]
    new = [program for program, cost in zip(programs, found, strict=True) if cost is None]
    counted: list[dict[str, Any]] = []
    if new:
        counted = _counted_here(new) if "torch" in sys.modules else _counted_apart(new)
        kept.write(new, counted)
    rest = iter(counted)
    return [next(rest) if cost is None else cost for cost in found]


def _counted_here(programs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from flatmin.trainables.cost import cost

    return [cost(program) for program in programs]


def _counted_apart(programs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the costs of programs, computed by another process."""
    finished = subprocess.run(
        [sys.executable, "-m", "flatmin.trainables.cost"],
        input=json.dumps([dict(program) for program in programs]),
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        return [{"error": f"the network could not be looked at: {reason}"}] * len(programs)
    costs: list[dict[str, Any]] = json.loads(finished.stdout)
    return costs


def all_epochs(trial: Trial) -> list[int]:
    """Return the epochs that each model trains if none ends early."""
    return [model.settings["epochs"] for model in trial.models]


def trial_bytes(trial: Trial, cost: Mapping[str, Any]) -> int:
    """Return the disk bytes that a trial leaves."""
    rows: int = sum(model.settings["epochs"] // model.settings["eval_every"] + 1 for model in trial.models)
    return len(trial.models) * (4 * int(cost["n_params"]) + MODEL_ROW_BYTES) + rows * EPOCH_ROW_BYTES
