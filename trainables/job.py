"""A job from start to commit: train a stack, or take it from its weights, measure it, write its rows."""

from __future__ import annotations

import json
import os
import platform
import resource
import socket
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatmin.files import data_root, patiently
from flatmin.lease import check
from flatmin.plugins import get, program_arguments
from flatmin.results import Results, now
from flatmin.settings import Argument, digest
from flatmin.stack.arithmetic import prepare_arithmetic
from flatmin.trainables.checkpoint import Checkpoints, load_weights, save_weights, weights_hash
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.downloads import downloads_allowed
from flatmin.trainables.measures import (
    Initial,
    check_measures,
    measure_ended,
    measure_saved,
    measure_under_way,
    points_of,
)
from flatmin.trainables.parts import Attempt, Part, out_of_memory
from flatmin.trainables.ranks import Ranks
from flatmin.trainables.stand_ins import stand_in_root
from flatmin.trainables.together import others
from flatmin.trainables.trainer import StackTrainer, network_builder
from flatmin.trial import Job, Model, Trial, missing_of


def run(job: Job) -> Generator[int]:
    """Carry a job out, yielding now and then the number of models that have ended; the last yield follows the commit.

    A stack that does not fit in the memory is taken in halves (`flatmin.trainables.parts`).

    Raises:
        LeaseLost: Another driver owns the results now; nothing was committed.
        ModelsFailed: Some of several models have failed, and the others are committed.
        FlatminError: The data or the weights cannot be used; or a measure failed, and all else is committed.
    """
    results = Results(job.results)
    failed, lost = results.attempts(job.trial.trial_id)

    def work(part: Part) -> Generator[int]:
        own = replace(job, trial=part.trial)
        if part.trial.committed_as:
            own = replace(own, execution=replace(job.execution, processes_per_model=1))
            yield from _measure_saved(own, results, trainer_of(own, Ranks()))
            return
        trainer = trainer_of(own, Ranks(0, job.execution.processes_per_model))
        how = {"retries": failed + lost, "halvings": part.halvings, "halved_for": part.reason}
        measured = yield from _train(own, results, trainer, how)
        if not measured:  # the memory that they took in training is freed before their measures are tried alone
            del trainer
            yield from attempt.carry_out(Part(replace(part.trial, committed_as=part.trial.trial_id)))

    attempt = Attempt(work, lambda trial: _is_there(results, trial), apart=failed >= job.apart_after)
    left = _left(results, job.trial, failed + lost)
    ended = len(job.trial.models) - sum(len(trial.models) for trial in left)
    if not left:
        yield ended
    for trial in left:
        for of_trial in attempt.run(trial):
            yield ended + of_trial
        ended += len(trial.models)


def _is_there(results: Results, trial: Trial) -> bool:
    return not trial.committed_as and results.holds("models", trial.trial_id)


def _left(results: Results, trial: Trial, attempts: int) -> list[Trial]:
    """Return what of a trial is left to do: an attempt that failed may have committed some of it."""
    if not attempts and not _is_there(results, trial):
        return [trial]
    measured = results.measured()
    if trial.committed_as:
        done = [all((model.model_id, label) in measured for label in trial.measures) for model in trial.models]
        left = tuple(model for model, is_done in zip(trial.models, done, strict=True) if not is_done)
        return [replace(trial, models=left)] if left else []
    ids = {model.model_id for model in trial.models}
    columns = results.table("models").select(["model_id", "trial_id", "status"]).to_pylist()
    rows = {row["model_id"]: (row["trial_id"], row["status"]) for row in columns if row["model_id"] in ids}
    train, measure = missing_of([trial], rows, measured)
    return train + measure


def trainer_of(job: Job, ranks: Ranks, *, download: bool = True) -> StackTrainer:
    """Return what trains a job's models, in one of the processes that do, and prepare this one for their arithmetic.

    Args:
        job: The models.
        ranks: The processes that train them together.
        download: Whether data that are not there may be downloaded.

    Raises:
        FlatminError: The data, or what is asked for, cannot be used.
    """
    torch.set_num_threads(job.execution.threads)
    prepare_arithmetic()
    tf32 = job.trial.program["precision"] == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # convolutions would use it by default
    with downloads_allowed() if download else nullcontext():
        program = job.trial.program
        dataset = load_dataset(plugin_settings("dataset", program), stand_in=program["stand_in"])
    build = network_builder(job.trial.program, dataset.input_shape, dataset.classes)
    trainer = StackTrainer(job.trial, dataset, build, job.execution, ranks)
    check_measures(trainer)
    return trainer


def plugin_settings(kind: str, program: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the name of a program's plug-in of a kind and the settings it takes, hashable."""
    plugin = get(kind, str(program[kind]))
    return ((kind, plugin.name), *((name, program[name]) for name in plugin.arguments))


def load_dataset(settings: tuple[tuple[str, Any], ...], *, stand_in: bool = False) -> Dataset:
    """Return a data set; the last one stays loaded, for a worker trains many stacks of the same.

    Args:
        settings: The data set's name and the settings it takes; see `plugin_settings`.
        stand_in: Whether small generated files are read in its place.

    Raises:
        FlatminError: It is not there, or damaged; or has no stand-in.
    """
    name = str(dict(settings)["dataset"])
    return _loaded(settings, stand_in_root(get("dataset", name), data_root()) if stand_in else data_root())


@lru_cache(maxsize=1)
def _loaded(settings: tuple[tuple[str, Any], ...], root: Path) -> Dataset:
    (_, name), *arguments = settings
    dataset: Dataset = get("dataset", name).load()(root, **dict(arguments))
    return dataset


def _train(job: Job, results: Results, trainer: StackTrainer, how: Mapping[str, Any]) -> Generator[int, None, bool]:
    """Train and measure a stack and commit it; return whether the memory was enough to measure it."""
    started_at = now()
    initial = trainer.progress.params
    checkpoints = Checkpoints(results, trainer, lambda: check(results, job.token))
    resumed = checkpoints.restore()
    saved = time.monotonic()
    try:
        with others(job, resumed=resumed):
            for progress in trainer.train():
                measure_under_way(trainer, initial)
                due = time.monotonic() - saved >= job.execution.checkpoint_seconds
                if checkpoints.ready and due and progress.alive:
                    checkpoints.save()
                    saved = time.monotonic()
                try:
                    yield len(trainer.outcomes) - len(progress.alive)
                except GeneratorExit:  # told to stop between two steps: lose none of them
                    checkpoints.save()
                    checkpoints.wait()
                    raise
    finally:
        checkpoints.close()
    execution = _execution(job, trainer, {**how, "resumed": resumed})
    rows = [_models_row(job.trial, model, started_at, execution) for model in job.trial.models]
    for row, outcome in zip(rows, trainer.outcomes, strict=True):
        assert outcome.row is not None
        row.update(outcome.row)
    enough = True
    try:
        failed = measure_ended(trainer, initial)
    except Exception as error:
        if not out_of_memory(error) or not job.execution.weights:
            raise
        enough, failed = False, None
    patiently(lambda: _commit(job, results, trainer, initial, rows))
    checkpoints.remove()
    if failed:
        raise failed
    yield len(rows)
    return enough


def _commit(
    job: Job,
    results: Results,
    trainer: StackTrainer,
    initial: Tensor,
    rows: Sequence[dict[str, Any]],
) -> None:
    trial_id = job.trial.trial_id
    check(results, job.token)
    if job.execution.weights:
        save_weights(results, job.trial, trainer.network, trainer.outcomes, initial)
    results.write("epochs", trial_id, _rows(trainer, "epochs"))
    _write_measured(results, trial_id, trainer)
    check(results, job.token)
    results.write("models", trial_id, rows, _arguments(job.trial))


def _measure_saved(job: Job, results: Results, trainer: StackTrainer) -> Generator[int]:
    committed = results.table("models").to_pylist()
    by_id = {row["model_id"]: row for row in committed}
    rows = [by_id[model.model_id] for model in job.trial.models]
    params, buffers, hashes = load_weights(
        results, job.trial, trainer.network, list(trainer.progress.buffers), trainer.device
    )
    yield 0
    initial = trainer.progress.params
    failed = measure_saved(trainer, rows, params, buffers, Initial(initial, _differing(job.trial, initial, hashes)))
    check(results, job.token)
    of_models = [model.model_id for model in job.trial.models]
    name = f"{job.trial.trial_id}-{digest([*sorted(job.trial.measures), *sorted(of_models)])}"
    patiently(lambda: _write_measured(results, name, trainer))
    if failed:
        raise failed
    yield len(rows)


def _differing(trial: Trial, params: Tensor, hashes: Sequence[str]) -> dict[int, str]:
    """Return the models whose initial weights, made again from the seed, are not those of the hash."""
    return {
        k: f"and those of {model.model_id}, made again from its seed, are not those it was trained from (their hash "
        "differs: another version of torch or of the network); train it again to measure it"
        for k, (model, saved) in enumerate(zip(trial.models, hashes, strict=True))
        if weights_hash(params[k]) != saved
    }


def _write_measured(results: Results, name: str, trainer: StackTrainer) -> None:
    """Write curves first: the rows of `sharpness` say that a measure is done."""
    curves = _rows(trainer, "spectra")
    if curves:
        ids = ("model_id", "trial_id")
        points = ({**{k: curve[k] for k in ids}, **point} for curve in curves for point in points_of(curve))
        results.write("spectra", name, points)
    if trainer.trial.measures:
        results.write("sharpness", name, _rows(trainer, "sharpness"))


def _rows(trainer: StackTrainer, table: str) -> list[dict[str, Any]]:
    """Return what the outcomes of a trial's models hold for a table, with their ids; of `spectra`, whole curves."""
    trial = trainer.trial
    return [
        {"model_id": model.model_id, "trial_id": trial.trial_id, **row}
        for model, outcome in zip(trial.models, trainer.outcomes, strict=True)
        for row in getattr(outcome, table)
    ]


def _models_row(trial: Trial, model: Model, started_at: datetime, execution: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_id": model.model_id,
        "trial_id": trial.trial_id,
        "study": trial.study,
        **model.settings,
        "device": execution["device_name"],
        "host": socket.gethostname(),
        "started_at": started_at,
        "execution": json.dumps(execution, sort_keys=True),
    }


def _execution(job: Job, trainer: StackTrainer, how: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a trial was run, for the `execution` column; `how`: what became of it on the way."""
    asked, cuda = job.execution, job.execution.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "pid": os.getpid(),
        "stack_size": len(job.trial.models),
        "device": asked.device,
        "device_name": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": asked.threads,
        "vectorize": "loop" if trainer.network.loops(trainer.device) else "vmap",
        "compile": asked.compile,
        "cuda_graphs": asked.cuda_graphs,
        "channels_last": asked.channels_last,
        "micro_batch": trainer.micro_batch.size,
        "processes_per_model": asked.processes_per_model,
        "data": "streamed" if trainer.data.train.streamed else "resident",
        **how,
        "memory_bytes": int(peak),
        "versions": versions(),
        "commit": commit(),
    }


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return the versions that a number may depend on."""
    packages = ("flatmin-sweep", "torch", "numpy", "scipy")
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@lru_cache(maxsize=1)
def commit() -> str | None:
    """Return the commit of the checkout that this package is imported from, or None outside one."""
    head = Path(__file__).resolve().parents[1] / ".git" / "HEAD"
    try:
        text = head.read_text().strip()
        if not text.startswith("ref: "):
            return text
        return (head.parent / text.removeprefix("ref: ")).read_text().strip()
    except OSError:
        return None


def _arguments(trial: Trial) -> dict[str, Argument]:
    return program_arguments({name: str(trial.program[name]) for name in ("dataset", "network", "optimizer")})
