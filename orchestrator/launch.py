"""Launch: take the lease, write the plan, run what is missing, say what was done."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Any, Literal, get_args

from rich.console import Console

from flatmin.bucket import BucketPath, Place
from flatmin.compact import compact_many
from flatmin.errors import RequestError, ResultsError
from flatmin.labels import parse_label
from flatmin.lease import Lease
from flatmin.orchestrator.estimate import Estimate, estimate
from flatmin.orchestrator.grid import MOST_MODELS, NAMES
from flatmin.orchestrator.heal import heal, lost_weights
from flatmin.orchestrator.inline import run_inline
from flatmin.orchestrator.packing import share_of_a_gpu, with_balanced
from flatmin.orchestrator.plan import Missing, Plan, check_sets, make_plan
from flatmin.orchestrator.planned import (
    leave_weights_out,
    measured_at_end_alone,
    refused,
    train_where_weights_are_left_out,
    what_is_missing,
    write_plan,
)
from flatmin.orchestrator.progress import Display
from flatmin.orchestrator.rates import longest_first
from flatmin.orchestrator.runner import RunOptions
from flatmin.orchestrator.study import read_study
from flatmin.orchestrator.study_file import Resources
from flatmin.plugins import program_arguments
from flatmin.results import Results
from flatmin.settings import UNSET, Argument
from flatmin.trial import Execution, Job, Model, Trial


@dataclass(frozen=True)
class LaunchOptions:
    """How a study is launched.

    Attributes:
        run: What the runner needs.
        inline: Run in this process, without Ray.
        models_per_trial: The largest stack; the study's own choice when None; `balanced`: the one with which trials end
            together (`flatmin.orchestrator.packing`).
        concurrency: Trials at a time, which `balanced` needs to know; as many as this machine holds when None.
        stacks_per_gpu: Trials that share a GPU; `auto`: as many as its memory holds. In place of a share of it.
        checkpoint_seconds: Time between two checkpoints of a trial under way.
        weights: Whether the trained weights are kept, which later measures need.
        compile: Whether training passes are compiled (torch.compile).
        cuda_graphs: Whether a training pass is launched as one CUDA graph.
        channels_last: Whether images lie in memory channels last.
        micro_batch: The most examples of each model in one pass; None: a whole batch, `auto`: as many as fit.
    """

    run: RunOptions = field(default_factory=RunOptions)
    inline: bool = False
    models_per_trial: int | Literal["auto", "balanced"] | None = None
    concurrency: int | None = None
    stacks_per_gpu: int | Literal["auto"] | None = None
    checkpoint_seconds: float = 300.0
    weights: bool = True
    compile: bool = False
    cuda_graphs: bool = False
    channels_last: bool = False
    micro_batch: int | Literal["auto"] | None = None

    @property
    def execution(self) -> Execution:
        """How each trial is run, on a device that is not known yet."""
        processes = self.run.processes_per_model
        return Execution(
            threads=max(1, int(self.run.cpus_per_trial or processes) // processes),
            checkpoint_seconds=self.checkpoint_seconds,
            weights=self.weights,
            compile=self.compile,
            cuda_graphs=self.cuda_graphs,
            channels_last=self.channels_last,
            micro_batch=self.micro_batch,
            processes_per_model=processes,
        )


@dataclass(frozen=True)
class Launched:
    """What a launch has left.

    Attributes:
        results: The results directory.
        planned: Models of the plan.
        trained: Models that this launch has trained.
        measured: Models that this launch has measured from saved weights.
        remaining: Models of the plan that are not there.
        out_of_time: Whether the time budget ended it.
    """

    results: Results
    planned: int
    trained: int
    measured: int
    remaining: int
    out_of_time: bool

    @property
    def exit_code(self) -> int:
        """0: all done; 1: some models failed; 3: the time budget is spent and models remain."""
        if not self.remaining:
            return 0
        return 3 if self.out_of_time else 1


def launch(
    study: str,
    results: str | Place,
    overrides: Sequence[str] = (),
    options: LaunchOptions | None = None,
    console: Console | None = None,
    *,
    small: bool = False,
    only: Sequence[str] = (),
    at_most: int | None = MOST_MODELS,
) -> Launched:
    """Run a study, or whatever of it is missing.

    Args:
        study: A built-in study's name, or the path of a YAML file.
        results: The results directory; made if it is not there.
        overrides: `setting=value` or `setting=value,value`.
        options: How to run it.
        console: Where progress is shown; the standard error when None.
        small: Run the study's small twin.
        only: Conditions on settings, `setting=value` or `setting=value,value`: the models that meet them all.
        at_most: More models are refused, as a slip in an axis; None: any number.

    Raises:
        RequestError: The study, the directory, the resources or the execution cannot be as asked.
        LeaseLost: Another driver took the directory over meanwhile.
    """
    options = options or LaunchOptions()
    console = console or Console(stderr=True)
    checked = read_study(study, overrides, small=small, only=only, at_most=at_most)
    if options.models_per_trial == "balanced" and options.run.processes_per_model == 1:
        checked = with_balanced(checked, results, options.concurrency)
        options = replace(options, models_per_trial=None)
    plan = make_plan(checked, _largest_stack(options))
    share = share_of_a_gpu(options.run.gpus_per_trial, options.stacks_per_gpu, plan.trials, options.execution)
    options = replace(options, run=with_resources(replace(options.run, gpus_per_trial=share), checked.file.resources))
    with _disk_errors(results):
        directory = Results.create(results, checked.name)
        with Lease(directory, options.run.max_failures) as lease:
            heal(directory, console)
            if not options.weights:
                leave_weights_out(directory)
            write_plan(directory, plan, checked)
            train_where_weights_are_left_out(directory, plan)
            return _carry_out(directory, plan, options, console, lease)


def with_resources(run: RunOptions, own: Resources) -> RunOptions:
    """Return the options with what they leave open taken from the study.

    Raises:
        RequestError: Several processes share a model, and there are fewer GPUs than they are, but some.
    """
    gpus = None if own.gpus_per_trial == "auto" else own.gpus_per_trial
    gpus = gpus if run.gpus_per_trial is None else run.gpus_per_trial
    processes = run.processes_per_model
    if processes > 1 and gpus is not None and 0 < gpus < processes:
        raise RequestError(
            f"--processes-per-model {processes}: each needs a GPU of its own, and a trial has {gpus:g}; give "
            f"--gpus-per-trial {processes}, or 0 to stay on the CPU"
        )
    cpus = max(own.cpus_per_trial, processes) if run.cpus_per_trial is None else run.cpus_per_trial
    return replace(run, cpus_per_trial=cpus, gpus_per_trial=gpus)


def _largest_stack(options: LaunchOptions) -> int | Literal["auto"] | None:
    """Return the largest stack that was asked for; several processes train one model at a time.

    Raises:
        RequestError: They were asked for larger ones.
    """
    processes, largest = options.run.processes_per_model, options.models_per_trial
    if processes == 1 and largest != "balanced":
        return largest
    if largest not in (None, 1):
        raise RequestError(
            f"--models-per-trial {largest}: --processes-per-model {processes} trains one model at a time; leave one out"
        )
    return 1


def measure(
    results: str | Place,
    measures: Sequence[str],
    options: LaunchOptions | None = None,
    console: Console | None = None,
) -> Launched:
    """Compute measures of the models that are there, from their saved weights; train nothing.

    Args:
        results: The results directory of a study.
        measures: Measures as a person writes them, `lpf` or `lpf(sigma=0.002)`.
        options: How to run it.
        console: Where progress is shown; the standard error when None.

    Raises:
        RequestError: A measure does not exist; the directory cannot be used, holds no trained model, or has lost
            the weights of some.
        LeaseLost: Another driver took the directory over meanwhile.
    """
    options, console = options or LaunchOptions(), console or Console(stderr=True)
    labels = tuple(dict.fromkeys(parse_label(text).label for text in measures))
    if not labels:
        raise RequestError("name at least one measure")
    with _disk_errors(results):
        directory = Results.open(results)
        with Lease(directory, options.run.max_failures) as lease:
            lost = lost_weights(directory)
            if lost:
                left_out = directory.check_schema().get("weights") is False
                raise ResultsError(
                    f"'{directory.weights_file(lost[0])}' cannot be read ({len(lost)} such files"
                    f"{': these results were made or imported without weights' if left_out else ''}); "
                    "launch the study again, with these measures: it trains the models of these trials anew"
                )
            heal(directory, console)
            rows = directory.table("models").to_pylist()
            if not rows:
                raise ResultsError(f"'{results}' holds no trained model to measure")
            trials: dict[str, list[Model]] = {}
            for row in rows:
                trials.setdefault(row["trial_id"], []).append(Model(row["model_id"], settings_of(row)))
            check_sets(labels, [model for models in trials.values() for model in models])
            plan = Plan(
                rows[0]["study"],
                tuple(Trial(rows[0]["study"], tuple(models), labels) for models in trials.values()),
            )
            return _carry_out(directory, plan, options, console, lease)


def settings_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a model from its row of the `models` table, which has lists where these are tuples.

    Raises:
        ResultsError: Its plug-ins have got a setting since, and do not say at which value it is what it was.
    """
    names = {name: row[name] for name in NAMES}
    return names | {name: _setting_of(row, argument) for name, argument in program_arguments(names).items()}


def _setting_of(row: Mapping[str, Any], argument: Argument) -> Any:
    value = row.get(argument.name)
    if value is None and (argument.name not in row or type(None) not in get_args(argument.annotation)):
        value = argument.setting.neutral
        if value is UNSET:
            raise ResultsError(
                f"model {row['model_id']} has no '{argument.name}', which its plug-ins take by now; let that setting "
                "declare the value at which a model is what it was before: Setting(neutral=...)"
            )
    return tuple(value) if isinstance(value, list) else value


def _carry_out(results: Results, plan: Plan, options: LaunchOptions, console: Console, lease: Lease) -> Launched:
    before = what_is_missing(results, plan)
    late = measured_at_end_alone(results, plan)
    if late:
        console.print(
            f"measure_every: {late} models that are there were measured at their end alone, and their earlier weights "
            "are not kept; launch into another directory to see them under way",
            style="yellow",
            highlight=False,
        )
    out_of_time = _run(results, before, options, console, lease, len(plan.models))
    results.clear_temporary()
    compact_many(results)
    after = what_is_missing(results, plan)
    for label, reason in refused(results, before).items():
        console.print(f"{label} has no value: {reason}", style="yellow", markup=False, highlight=False)
    left = sum(len(trial.models) for trial in after.train)
    return Launched(
        results=results,
        planned=len(plan.models),
        trained=sum(len(trial.models) for trial in before.train) - left,
        measured=_distinct(before.measure) - _distinct(after.measure),
        remaining=left + _distinct(after.measure),
        out_of_time=out_of_time,
    )


def _distinct(trials: Sequence[Trial]) -> int:
    return len({model.model_id for trial in trials for model in trial.models})


def _run(results: Results, todo: Missing, options: LaunchOptions, console: Console, lease: Lease, planned: int) -> bool:
    trials = [*todo.train, *todo.measure]
    if not trials:
        return False
    left = sum(len(trial.models) for trial in todo.train)
    execution = options.execution
    if options.inline:
        execution = replace(execution, device=_inline_device(options.run))
        execution.check_device()

    def jobs(cost: Estimate) -> list[Job]:
        check_space(results, cost.bytes)
        apart_after, order = min(1, options.run.max_failures), longest_first(cost.seconds)
        return [Job(trials[i], str(results.path), lease.token, execution, apart_after) for i in order]

    with Display(console, planned, planned - left) as display:
        if options.inline:
            return run_inline(results, jobs(estimate(trials)), options.run, display)
        from flatmin.orchestrator.tune import run_on_ray  # ray is loaded when it is used

        cost = _beside(lambda: estimate(trials))  # counted by another process while Ray starts
        return run_on_ray(results, lambda: jobs(cost.result()), options.run, display, lease)


def _beside(work: Callable[[], Estimate]) -> Future[Estimate]:
    """Do some work in a thread that nothing has to wait for, an interrupt least of all."""
    future: Future[Estimate] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _inline_device(run: RunOptions) -> str:
    import torch

    if run.gpus_per_trial and not torch.cuda.is_available():
        raise RequestError(f"--gpus-per-trial {run.gpus_per_trial:g}: torch sees no GPU here")
    return "cuda" if run.gpus_per_trial != 0 and torch.cuda.is_available() else "cpu"


def check_space(results: Results, needed: int | None) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        ResultsError: The estimate exceeds the free space.
    """
    if isinstance(results.path, BucketPath):
        return
    free = shutil.disk_usage(results.path).free
    if needed is not None and needed > free:
        raise ResultsError(
            f"'{results.path}' has {free / 1e6:.1f} MB free and this needs about {needed / 1e6:.1f} MB; "
            "free some, or choose another --results directory"
        )


@contextmanager
def _disk_errors(path: str | Place) -> Iterator[None]:
    """Turn a disk that will not be written into a message; what is committed stays."""
    try:
        yield
    except OSError as error:
        if "://" in str(path):
            raise ResultsError(
                f"'{path}': {error.strerror or error}; what was finished is kept, launch again"
            ) from None
        if error.errno not in {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT}:
            raise
        raise ResultsError(
            f"'{path}' cannot be written: {error.strerror}; what was finished is kept, launch again once that is mended"
        ) from None
