"""What both runners share: a job's end is told to a monitor, and failures are written down."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flatmin.errors import FlatminError
from flatmin.results import Results, now
from flatmin.trial import Job


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
    """

    max_failures: int = 3
    time_budget: float | None = None
    address: str | None = None
    cpus_per_trial: float | None = None
    gpus_per_trial: float | None = None
    processes_per_model: int = 1


def record_failure(results: Results, job: Job, error: str, traceback: str) -> int:
    """Write the row of a failed attempt; return how many there are now.

    A disk that is full cannot hold the row either; the attempt is then counted by the caller alone.
    """
    trial = job.trial
    attempt = results.attempts(trial.trial_id) + 1
    rows = [
        {
            "model_id": model.model_id,
            "trial_id": trial.trial_id,
            "attempt": attempt,
            "host": socket.gethostname(),
            "error": error,
            "traceback": traceback,
            "at": now(),
        }
        for model in trial.models
    ]
    try:
        results.write("failures", f"{trial.trial_id}-{attempt}", rows)
    except OSError:
        return attempt
    return attempt


def error_line(error: BaseException) -> str:
    """Return what an error says: its message where it is one for people, else its type and its message's last line."""
    text = str(error).strip()
    if isinstance(error, FlatminError):
        return text
    return f"{type(error).__name__}: {text.splitlines()[-1]}" if text else type(error).__name__


def uncommitted(results: Results, jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs whose rows are not there; the tables decide, not what a scheduler believes."""
    trained = set(results.table("models")["trial_id"].to_pylist())
    sharpness = results.table("sharpness") if any(job.trial.committed_as for job in jobs) else None
    pairs = [] if sharpness is None else [sharpness["model_id"].to_pylist(), sharpness["label"].to_pylist()]
    measured = set(zip(*pairs, strict=True))
    left = []
    for job in jobs:
        if job.trial.committed_as:
            done = all(
                (model.model_id, label) in measured for model in job.trial.models for label in job.trial.measures
            )
        else:
            done = job.trial.trial_id in trained
        if not done:
            left.append(job)
    return left
