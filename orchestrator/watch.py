"""The watch over Tune's trials: tells the monitor, writes failures down, ends trials that hang.

Which failures count: an error that a trial raises does. The loss of its process (killed, out of the machine's memory,
its machine gone) does unless a newer checkpoint was written since the failure before, for then the trial gets on. A
machine that announces its end (SIGTERM) is no failure.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune
from ray.experimental import internal_kv

from flatmin.errors import FlatminError, error_line
from flatmin.lease import Lease
from flatmin.orchestrator.runner import Monitor, RunOptions, record_failure, uncommitted
from flatmin.results import Results
from flatmin.secrets import without_secrets
from flatmin.trainables.tune_trainable import REFUSED, REFUSED_AT, pulse_key
from flatmin.trial import Job


class Hung(Exception):
    """A trial has shown no sign of life for a set time."""


@dataclass
class _Life:
    """When a trial was last seen to get on, by which sign, and when such signs were last looked for."""

    seen: float
    beat: bytes | None = None
    looked: float = 0.0


class Watch(tune.Callback):  # type: ignore[misc]
    """What Tune calls as its trials go on.

    Args:
        results: The results directory.
        jobs: The jobs, by the index that a trial's config gives.
        monitor: Who is told.
        failures: How many failures of each trial count so far; those seen are added.
        lease: The ownership of the directory, whose loss ends the run.
        options: How the jobs are run.
    """

    def __init__(
        self,
        results: Results,
        jobs: Sequence[Job],
        monitor: Monitor,
        failures: Counter[str],
        lease: Lease,
        options: RunOptions,
    ) -> None:
        self._results, self._jobs, self._monitor = results, jobs, monitor
        self._failures, self._lease, self._options = failures, lease, options
        self._alive: dict[Any, _Life] = {}
        self._hung: set[Any] = set()
        self._checkpoints: dict[str, tuple[tuple[str, int], ...]] = {}
        self.forgiven = 0
        """How many failures did not count."""
        self.crowded = 0
        """How many trials ran when a machine's memory ran out, which ends Tune's run; 0 where it did not."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks for a restore, which is never done: the results directory is the state.
        return {}

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Begin to wait for signs of life."""
        self._alive[trial] = _Life(time.monotonic())

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        """Tell the monitor how far a trial is."""
        self._alive[trial] = _Life(time.monotonic())
        self._monitor.advanced(self._job(trial), int(result["models_ended"]))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Take note that a trial has ended: committed, or refused for good."""
        self._alive.pop(trial, None)
        result = trial.last_result
        if result.get(REFUSED):
            job = self._job(trial)
            self._failures[job.trial.trial_id] = self._options.max_failures + 1
            record_failure(self._results, job, FlatminError(result[REFUSED]), result[REFUSED_AT])
            self._monitor.failed(job, without_secrets(result[REFUSED]), final=True)
        elif result.get(tune.result.DONE):
            self._monitor.finished(self._job(trial))

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Take note of a failure after which Tune tries again."""
        error = _last_error(trial)
        if not self._failed(trial, error, may_end=False) and not _preempted(error):
            trial.run_metadata.num_failures -= 1  # Tune has counted it

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """Take note of a failure after which Tune does not try again."""
        self._failed(trial, _last_error(trial), may_end=True)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        """Stop if the lease is lost; end trials that hang."""
        self._lease.raise_if_lost()
        if self._options.hang_timeout:
            self._end_what_hangs()

    def ended_early(self, error: BaseException) -> None:
        """Take note that Tune has given the whole run up: a machine's memory ran out, or something broke."""
        running = [self._job(trial) for trial in self._alive]
        memory = isinstance(error.__cause__ or error, ray.exceptions.OutOfMemoryError)
        self.crowded = len(running) if memory else 0
        for job in uncommitted(self._results, running or self._jobs):
            counts = self.crowded < 2 and not self._got_on(job)
            self._failures[job.trial.trial_id] += counts
            self.forgiven += not counts
            record_failure(self._results, job, error.__cause__ or error, "", counts=counts)

    def _failed(self, trial: Any, error: BaseException, *, may_end: bool) -> bool:
        """Write a failure down; return whether it counts."""
        self._alive.pop(trial, None)
        job = self._job(trial)
        got_on = self._got_on(job)
        lost = isinstance(error, ray.exceptions.RayActorError)
        counts = not _preempted(error) and not (lost and got_on)
        trace = str(error)
        if trial in self._hung:
            self._hung.discard(trial)
            error, counts = Hung(f"no sign of life for {self._options.hang_timeout:g} s (--hang-timeout)"), True
        error = getattr(error, "cause", None) or error
        self._failures[job.trial.trial_id] += counts
        self.forgiven += not counts
        final = may_end and self._failures[job.trial.trial_id] > self._options.max_failures
        record_failure(self._results, job, error, trace, counts=counts)
        self._monitor.failed(job, without_secrets(error_line(error)), final=final)
        return counts

    def _got_on(self, job: Job) -> bool:
        """Return whether there is a newer checkpoint of a job than at its failure before."""
        stamps = []
        for file in self._results.state_files(job.trial.trial_id):
            with contextlib.suppress(OSError):
                stamps.append((file.name, file.stat().st_mtime_ns))
        before = self._checkpoints.get(job.trial.trial_id, ())
        self._checkpoints[job.trial.trial_id] = tuple(stamps)
        return bool(set(stamps).difference(before))

    def _end_what_hangs(self) -> None:
        now, timeout = time.monotonic(), self._options.hang_timeout
        for trial, life in self._alive.items():
            if now - max(life.seen, life.looked) < timeout / 4:
                continue
            beat = internal_kv._internal_kv_get(pulse_key(self._job(trial)))
            actor = trial.temporary_state.ray_actor
            if beat != life.beat:
                life.seen, life.beat = now, beat
            elif now - life.seen >= timeout and actor is not None:
                self._hung.add(trial)
                ray.kill(actor)
            life.looked = now

    def _job(self, trial: Any) -> Job:
        return self._jobs[int(trial.config["job"])]


def _preempted(error: BaseException) -> bool:
    return bool(getattr(error, "preempted", False))


def _last_error(trial: Any) -> BaseException:
    """Return what ended a Tune trial's last attempt; read where Tune writes it, before it is copied on."""
    if trial.pickled_error_file and Path(trial.pickled_error_file).exists():
        error: BaseException = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        return error
    text = Path(trial.error_file).read_text() if trial.error_file and Path(trial.error_file).exists() else ""
    return RuntimeError(text.strip() or "the worker ended without a word")
