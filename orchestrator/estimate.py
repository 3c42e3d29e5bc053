"""What a plan will cost: device time and disk, from the arithmetic of its networks.

A rough figure, made before anything has run: the constants below were read off one laptop-class core.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flatmin.errors import RequestError, RequestWarning
from flatmin.trial import Trial

STEP_SECONDS = 1.2e-3
"""Time of a gradient that no arithmetic explains: launching operations, gathering the batch."""

FLOPS = 8e9
"""Floating-point operations per second of one core on small matrices."""

PASSES_PER_MEASURE = 150
"""Passes over the data, in forward passes, that a measure takes on average."""

EPOCH_ROW_BYTES, MODEL_ROW_BYTES = 60, 4000
"""Parquet bytes of one evaluated epoch, and of all else that is written for a model."""


@dataclass(frozen=True)
class Estimate:
    """The cost of trials.

    Attributes:
        seconds: Device seconds of each trial, in order; None where the data set is not here to look at.
        bytes: Disk bytes of all trials, or None.
        problem: Why there is no figure, or empty.
    """

    seconds: tuple[float | None, ...]
    bytes: int | None
    problem: str = ""


def estimate(trials: Sequence[Trial]) -> Estimate:
    """Estimate what trials cost.

    Raises:
        RequestError: A trial cannot be trained: the data cannot be split like that, or a batch cannot.
    """
    costs = program_costs([{**trial.program, "measures": trial.measures} for trial in trials])
    for cost in costs:
        if "refused" in cost:
            raise RequestError(cost["refused"])
    problem = next((cost["error"] for cost in costs if "error" in cost), "")
    seconds = tuple(
        None if "error" in cost else trial_seconds(trial, cost) for trial, cost in zip(trials, costs, strict=True)
    )
    sizes = [trial_bytes(trial, cost) for trial, cost in zip(trials, costs, strict=True) if "error" not in cost]
    for note in dict.fromkeys(note for cost in costs for note in cost.get("notes", ())):
        warnings.warn(note, RequestWarning, stacklevel=2)
    return Estimate(seconds, sum(sizes) if not problem else None, problem)


def program_costs(programs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return `flatmin.trainables.cost.cost` of every program.

    A process that has not loaded torch has it computed by one of its own, and stays small.
    """
    if "torch" in sys.modules:
        from flatmin.trainables.cost import cost

        return [cost(program) for program in programs]
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


def trial_seconds(trial: Trial, cost: Mapping[str, Any]) -> float:
    """Return the device seconds of a trial whose network costs that much."""
    epochs = max(model.settings["epochs"] for model in trial.models)
    steps = epochs * math.ceil(cost["train_size"] / trial.program["batch_size"]) * cost["gradients"]
    work = len(trial.models) * cost["flops"]
    evaluations = epochs / trial.program["eval_every"] * (cost["train_size"] + cost["test_size"])
    examples = 3 * epochs * cost["train_size"] * cost["gradients"] + evaluations
    measuring = PASSES_PER_MEASURE * len(trial.measures) * cost["train_size"]
    seconds: float = steps * STEP_SECONDS + work * (examples + measuring) / FLOPS
    return seconds


def trial_bytes(trial: Trial, cost: Mapping[str, Any]) -> int:
    """Return the disk bytes that a trial leaves."""
    rows: int = sum(model.settings["epochs"] // model.settings["eval_every"] + 1 for model in trial.models)
    return len(trial.models) * (4 * int(cost["n_params"]) + MODEL_ROW_BYTES) + rows * EPOCH_ROW_BYTES
