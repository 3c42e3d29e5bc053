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
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ray
from ray import tune
from ray._private import ray_constants
from ray.tune.execution import class_cache

from flatmin.bucket import BucketPath
from flatmin.compact import compact_many
from flatmin.errors import RequestError, error_line
from flatmin.lease import Lease
from flatmin.orchestrator.runner import Monitor, RunOptions, uncommitted
from flatmin.orchestrator.watch import Watch
from flatmin.results import Results
from flatmin.secrets import without_secrets
from flatmin.trainables.tune_trainable import TuneTrainable
from flatmin.trial import Job

_STARTS = 3
"""How often a private cluster is started: Ray gives its processes 30 s, which on a busy machine may not do."""

_KNOCK_SECONDS = 10.0

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # five files per trial that nobody reads
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt is ours to handle
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a trial without a GPU sees none
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
    "PL_DISABLE_FORK": "1",  # ray#28197; what Tune would hand on to its trials, here inherited by them
}

_SHARE, _ROUNDS = 1000, 50
"""Trials that Tune is given at a time: so many, or so many for each that can run. Tune keeps some 50 KB of every trial
it was given, finished or not, in the driver; the next share is given when the last one is done. Waiting for the last of
a share costs half a trial on average, of 50. Small files are merged in between, so that a resume has few to open."""


def run_on_ray(
    results: Results, planned: Callable[[], Sequence[Job]], options: RunOptions, monitor: Monitor, lease: Lease
) -> bool:
    """Run jobs as Ray Tune trials; return whether the time budget was spent.

    Args:
        results: The results directory.
        planned: Returns the jobs, in order; called once Ray is there.
        options: How they are run.
        monitor: What is told of them.
        lease: The right to write.

    Raises:
        RequestError: The cluster cannot be reached, or this machine has not what one trial asks for.
        LeaseLost: Another driver has taken the results over.
    """
    if options.address == "local":  # Ray's word for a cluster of one's own, which would listen on all interfaces
        options = replace(options, address=None)
    deadline = None if options.time_budget is None else time.monotonic() + options.time_budget
    with _cluster(options.address) as dashboard, _quiet(results):
        jobs = planned()
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
        if dashboard:
            monitor.said(f"Ray's dashboard: http://{dashboard}")
        failures: Counter[str] = Counter()
        left, stalled, most = list(jobs), 0, None
        share = max(_SHARE, _ROUNDS * slots(resources, available))
        while left and stalled <= options.max_failures:
            budget = None if deadline is None else deadline - time.monotonic()
            if budget is not None and budget <= 0:
                return True
            now, later = left[:share], left[share:]
            watch = Watch(results, now, monitor, failures, lease, options)
            _fit(now, resources, budget, options, watch, most)
            lease.raise_if_lost()
            if watch.crowded:
                most = max(1, watch.crowded // 2)
                monitor.said(
                    f"the memory of a machine ran out with {watch.crowded} trials at a time; {most} from now on"
                )
            before = len(left)
            left = [job for job in uncommitted(results, now) if failures[job.trial.trial_id] <= options.max_failures]
            left += later
            if later:
                compact_many(results)
            stalled = 0 if len(left) < before or watch.forgiven else stalled + 1
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
    jobs: Sequence[Job],
    resources: dict[str, float],
    budget: float | None,
    options: RunOptions,
    watch: Watch,
    most: int | None,
) -> None:
    """Run jobs as trials of one experiment, `most` of them at a time where that is given."""
    parameters = tune.with_parameters(TuneTrainable, jobs=list(jobs), hang_timeout=options.hang_timeout)
    trainable = tune.with_resources(parameters, resources)
    storage = tempfile.mkdtemp(prefix="flatmin-tune-")
    tuner = tune.Tuner(
        trainable,
        param_space={"job": tune.grid_search(list(range(len(jobs))))},
        tune_config=tune.TuneConfig(reuse_actors=True, time_budget_s=budget, max_concurrent_trials=most),
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


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[str]:
    """Join a cluster, or run a private one, and leave it at the end; give its dashboard's address, if it has one."""
    private = address is None
    on_terminate = signal.getsignal(signal.SIGTERM)
    with _environment(), _loopback() if private else contextlib.nullcontext():
        dashboard = _start(address)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # ray.init sets its own, which ends the process at once
        try:
            with _in_processes_at_hand() if private else contextlib.nullcontext():
                yield dashboard
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Tell Ray and Tune, and the processes that they start, what has no option, unless the user has told them."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def _in_processes_at_hand() -> Iterator[None]:
    """Let the trials of a private cluster run in processes that Ray has ready, a second sooner; undone at the end.

    Tune hands variables on to its trials as an environment of their own, for which Ray starts Python twice more. Those
    that this process has too, a private cluster's processes have inherited, and they are taken from what it hands on;
    others (AWS_SECRET_ACCESS_KEY where it is set) still cost the second.
    """
    handed_on: dict[str, str] = getattr(class_cache, "DEFAULT_ENV_VARS", {})  # Tune's own; there is no option for it
    defaults, chdir = dict(handed_on), os.environ["RAY_CHDIR_TO_TRIAL_DIR"]
    try:
        for name in [name for name, value in defaults.items() if os.environ.get(name) == value]:
            del handed_on[name]
        del os.environ["RAY_CHDIR_TO_TRIAL_DIR"]
        yield
    finally:
        handed_on.update(defaults)
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = chdir


def _start(address: str | None) -> str:
    """Join a cluster or start a private one; return the address of its dashboard, empty where it has none."""
    private = address is None
    if address is not None:
        _knock(address)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    said = ""
    for _ in range(_STARTS if private else 1):
        try:
            context = ray.init(
                address=address or "local",
                num_cpus=cpus if private else None,
                include_dashboard=False if private else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return context.dashboard_url or ""
        except Exception as error:  # of several kinds, a plain one among them
            said = error_line(error)
            ray.shutdown()
    if private:
        raise RequestError(f"Ray did not start on this machine; --inline does without: {said}")
    raise RequestError(f"--address {address}: no Ray cluster there: {said}")


def _knock(address: str) -> None:
    """Refuse an address where nobody listens; Ray itself would try for minutes, and fill the terminal meanwhile.

    Raises:
        RequestError: Nobody does.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or error
        raise RequestError(f"--address {address}: no Ray cluster there: {said}") from None


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Let a private cluster listen on the loopback interface alone, as Ray does by itself on macOS and Windows.

    On Linux it listens on all interfaces, whatever address it is given.
    """
    before = os.environ.get(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, where ray is imported already
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        os.environ.pop(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
        if before[0] is not None:
            os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = before[0]


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


class _Discreet(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


@contextlib.contextmanager
def _quiet_to(log: Path) -> Iterator[None]:
    handler = logging.FileHandler(log)
    handler.setFormatter(_Discreet())
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
