"""The Ray Tune runner: one Tune trial per job, workers reused, Tune's chatter kept off the terminal.

What has been done is read from the results directory, never from Tune: a fit may end early (the memory
monitor aborts it, say), and is then started again with what is missing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, tune

from flatmin.bucket import BucketPath
from flatmin.errors import RequestError
from flatmin.lease import Lease
from flatmin.orchestrator.runner import Monitor, RunOptions, error_line, record_failure, uncommitted
from flatmin.results import Results
from flatmin.trainables.tune_trainable import REFUSED, REFUSED_AT, TuneTrainable
from flatmin.trial import Job

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # five files per trial that nobody reads
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt is ours to handle
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a trial without a GPU sees none
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
}

_SHARE, _ROUNDS = 1000, 50
"""Trials that Tune is given at a time: so many, or so many for each that can run. Tune keeps some 50 KB of every trial
it was given, finished or not, in the driver; the next share is given when the last one is done. Waiting for the last of
a share costs half a trial on average, of 50."""


def run_on_ray(results: Results, jobs: Sequence[Job], options: RunOptions, monitor: Monitor, lease: Lease) -> bool:
    """Run jobs as Ray Tune trials; return whether the time budget was spent.

    Raises:
        RequestError: The cluster cannot be reached, or this machine has not what one trial asks for.
        LeaseLost: Another driver has taken the results over.
    """
    deadline = None if options.time_budget is None else time.monotonic() + options.time_budget
    with _cluster(options.address), _quiet(results):
        available = ray.cluster_resources()
        resources = trial_resources(options, available)
        lack = shortage(resources, available)
        if lack and options.address is None:
            raise RequestError(lack)
        if lack:
            monitor.said(f"{lack} now; trials wait until it has grown")
        device = "cuda" if resources["gpu"] > 0 else "cpu"
        execution = replace(jobs[0].execution, device=device)
        execution.check_device()
        jobs = [replace(job, execution=execution) for job in jobs]
        failures: Counter[str] = Counter()
        left, stalled = list(jobs), 0
        share = max(_SHARE, _ROUNDS * slots(resources, available))
        while left and stalled <= options.max_failures:
            budget = None if deadline is None else deadline - time.monotonic()
            if budget is not None and budget <= 0:
                return True
            now, later = left[:share], left[share:]
            watch = _Watch(results, now, monitor, failures, lease, options.max_failures)
            _fit(now, resources, budget, options, watch)
            lease.raise_if_lost()
            before = len(left)
            left = [job for job in uncommitted(results, now) if failures[job.trial.trial_id] <= options.max_failures]
            left += later
            stalled = 0 if len(left) < before else stalled + 1
        return bool(left) and deadline is not None and time.monotonic() >= deadline


def trial_resources(options: RunOptions, available: Mapping[str, float]) -> dict[str, float]:
    """Return the CPUs and GPUs of one trial on a cluster that has these."""
    processes, there = float(options.processes_per_model), available.get("GPU", 0.0)
    one_each = min(1.0, there) if processes == 1 else processes if there > 0 else 0.0
    gpus = one_each if options.gpus_per_trial is None else options.gpus_per_trial
    return {"cpu": options.cpus_per_trial or processes, "gpu": gpus}


def slots(resources: Mapping[str, float], available: Mapping[str, float]) -> int:
    """Return how many trials a cluster that has these runs at a time."""
    return max(1, int(min(available.get(name.upper(), 0.0) / given for name, given in resources.items() if given)))


def shortage(resources: Mapping[str, float], available: Mapping[str, float]) -> str:
    """Return what a cluster lacks for one trial, as a sentence; empty when it lacks nothing."""
    for name in ("cpu", "gpu"):
        there = available.get(name.upper(), 0.0)
        if resources[name] > there:
            return f"--{name}s-per-trial {resources[name]:g}: the cluster has {there:g} {name.upper()}s"
    return ""


def _fit(
    jobs: Sequence[Job], resources: dict[str, float], budget: float | None, options: RunOptions, watch: _Watch
) -> None:
    trainable = tune.with_resources(tune.with_parameters(TuneTrainable, jobs=list(jobs)), resources)
    storage = tempfile.mkdtemp(prefix="flatmin-tune-")
    tuner = tune.Tuner(
        trainable,
        param_space={"job": tune.grid_search(list(range(len(jobs))))},
        tune_config=tune.TuneConfig(reuse_actors=True, time_budget_s=budget),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=storage,
            failure_config=tune.FailureConfig(max_failures=options.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[watch],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except (RuntimeError, ray.exceptions.RayError) as error:
        # Tune gives the whole fit up when one worker runs out of memory; what is missing is tried again.
        logging.getLogger(__name__).warning("the fit ended early: %s", error)
        watch.ended_early(error)
    finally:
        shutil.rmtree(storage, ignore_errors=True)


class _Watch(tune.Callback):  # type: ignore[misc]
    """Tells the monitor how trials go, and writes their failures down."""

    def __init__(
        self,
        results: Results,
        jobs: Sequence[Job],
        monitor: Monitor,
        failures: Counter[str],
        lease: Lease,
        most: int,
    ) -> None:
        self._results, self._jobs = results, jobs
        self._monitor, self._failures, self._lease, self._most = monitor, failures, lease, most

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks for a restore, which is never done: the results directory is the state.
        return {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        self._monitor.advanced(self._job(trial), int(result["models_ended"]))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result = trial.last_result
        if result.get(REFUSED):
            job = self._job(trial)
            self._failures[job.trial.trial_id] = self._most + 1
            record_failure(self._results, job, result[REFUSED], result[REFUSED_AT])
            self._monitor.failed(job, result[REFUSED], final=True)
        elif result.get(tune.result.DONE):
            self._monitor.finished(self._job(trial))

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._failed(trial, final=False)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._failed(trial, final=True)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self._lease.raise_if_lost()

    def ended_early(self, error: BaseException) -> None:
        for job in uncommitted(self._results, self._jobs):
            self._failures[job.trial.trial_id] += 1
            record_failure(self._results, job, error_line(error), "")

    def _failed(self, trial: Any, *, final: bool) -> None:
        job = self._job(trial)
        error = _last_error(trial)
        line = error_line(getattr(error, "cause", None) or error)
        self._failures[job.trial.trial_id] += 1
        record_failure(self._results, job, line, str(error))
        self._monitor.failed(job, line, final=final)

    def _job(self, trial: Any) -> Job:
        return self._jobs[int(trial.config["job"])]


def _last_error(trial: Any) -> BaseException:
    """Return what ended a Tune trial's last attempt; read where Tune writes it, before it is copied on."""
    if trial.pickled_error_file and Path(trial.pickled_error_file).exists():
        error: BaseException = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
        return error
    text = Path(trial.error_file).read_text() if trial.error_file and Path(trial.error_file).exists() else ""
    return RuntimeError(text.strip() or "the worker ended without a word")


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Join a cluster, or run a private one; leave it at the end."""
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    private = address is None
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on_terminate = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or "local",
            num_cpus=cpus if private else None,
            include_dashboard=False if private else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RequestError(f"--address {address}: no Ray cluster there: {error_line(error)}") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # ray.init sets its own, which ends the process at once
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _quiet(results: Results) -> Iterator[None]:
    """Send what Tune prints to `logs/ray.log` of the results directory."""
    if isinstance(results.path, BucketPath):
        with tempfile.TemporaryDirectory(prefix="flatmin-") as folder:
            log = Path(folder) / "ray.log"
            try:
                with _quiet_to(log):
                    yield
            finally:
                with contextlib.suppress(OSError):  # a log is not worth the end of a launch
                    (results.path / "logs" / "ray.log").write_bytes(log)
        return
    log = results.path / "logs" / "ray.log"
    log.parent.mkdir(exist_ok=True)
    with _quiet_to(log):
        yield


@contextlib.contextmanager
def _quiet_to(log: Path) -> Iterator[None]:
    handler = logging.FileHandler(log)
    loggers = [logging.getLogger("ray"), logging.getLogger(__name__)]
    before = [(logger, logger.propagate, list(logger.handlers)) for logger in loggers]
    for logger in loggers:
        logger.propagate, logger.handlers = False, [handler]
    try:
        with open(log, "a", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
            yield
    finally:
        for logger, propagate, handlers in before:
            logger.propagate, logger.handlers = propagate, handlers
        handler.close()
