"""What both runners share: a job's end is told to a monitor, and failures are written down."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flatmin.errors import ModelsFailed, error_line
from flatmin.results import Results, now
from flatmin.secrets import without_secrets
from flatmin.tables import LOST
from flatmin.trial import Job, Model, Trial


class Monitor(Protocol):
    """Who is told how the jobs go."""

    def advanced(self, job: Job, ended: int) -> None:
        """Take note that `ended` models of a job have ended so far."""

    def finished(self, job: Job) -> None:
        """Take note that a job is committed."""

    def failed(self, job: Job, error: str, *, final: bool) -> None:
        """Take note that an attempt failed; `final` when the job will not be tried again."""

    def said(self, text: str) -> None:
        """Pass a sentence on to the user."""


@dataclass(frozen=True)
class RunOptions:
    """How jobs are run.

    Attributes:
        max_failures: How often a job may fail and be tried again.
        time_budget: Seconds after which no work is started or gone on with, or None.
        address: The Ray cluster to join, or None for a private local one.
        cpus_per_trial: Cores of one trial; what the study says, or 1, when None.
        gpus_per_trial: Share of a GPU of one trial; what the study says, or a whole one per process where there is any,
            when None.
        processes_per_model: Processes that train a model together, each on a GPU of its own where there are any.
        hang_timeout: Seconds without a sign of life after which a trial is ended and tried again; 0: never.
    """

    max_failures: int = 3
    time_budget: float | None = None
    address: str | None = None
    cpus_per_trial: float | None = None
    gpus_per_trial: float | None = None
    processes_per_model: int = 1
    hang_timeout: float = 1800.0


def record_failure(results: Results, job: Job, error: BaseException, traceback: str, *, counts: bool = True) -> None:
    """Write a failed attempt, a row for each of its models that is not done.

    A disk that is full cannot hold the row either; the attempt is then counted by the caller alone.

    Args:
        results: Where.
        job: What failed.
        error: Why; of a `ModelsFailed`, each model's own reason is written.
        traceback: Where.
        counts: Whether it is one of the attempts that a trial has; else its number is 0.
    """
    trial = job.trial
    failed, lost = results.attempts(trial.trial_id)
    own = error.of_model if isinstance(error, ModelsFailed) else {}
    shared = (error_line(error), traceback)
    (left,) = unfinished(results, [job])
    rows = [
        {
            "model_id": model.model_id,
            "trial_id": trial.trial_id,
            "attempt": failed + 1 if counts else 0,
            "host": socket.gethostname(),
            "error": without_secrets(own.get(model.model_id, shared)[0]),
            "traceback": without_secrets(own.get(model.model_id, shared)[1]),
            "at": now(),
        }
        for model in left or trial.models
        if not own or model.model_id in own
    ]
    with contextlib.suppress(OSError):
        results.write("failures", f"{trial.trial_id}-{failed + 1 if counts else f'{LOST}{lost + 1}'}", rows)


def uncommitted(results: Results, jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs of which rows are not there; the tables decide, not what a scheduler believes."""
    return [job for job, left in zip(jobs, unfinished(results, jobs), strict=True) if left]


def unfinished(results: Results, jobs: Sequence[Job]) -> list[list[Model]]:
    """Return of each job the models that are not trained, or not measured as they should be."""
    rows = results.table("models").select(["model_id", "status"]).to_pydict()
    status = dict(zip(rows["model_id"], rows["status"], strict=True))
    measured = results.measured() if any(job.trial.measures for job in jobs) else set()

    def done(trial: Trial, model: Model) -> bool:
        if model.model_id not in status:
            return False
        diverged = status[model.model_id] == "diverged"  # where there is no minimum to measure
        return diverged or all((model.model_id, label) in measured for label in trial.measures)

    return [[model for model in job.trial.models if not done(job.trial, model)] for job in jobs]
