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
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatmin.errors import FlatminError, RequestError
from flatmin.labels import parse_label
from flatmin.lease import check
from flatmin.plugins import get, program_arguments
from flatmin.results import Results, now
from flatmin.settings import Argument, digest
from flatmin.sharpness import Engine, Measured
from flatmin.stack import stream_key
from flatmin.stack.network import Buffers
from flatmin.trainables.checkpoint import load_weights, restore_state, save_state, save_weights, weights_hash
from flatmin.trainables.data import Split
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.downloads import downloads_allowed
from flatmin.trainables.measures import take
from flatmin.trainables.ranks import Ranks
from flatmin.trainables.tasks import check_measure
from flatmin.trainables.together import others
from flatmin.trainables.trainer import StackTrainer, buffers_of, network_builder
from flatmin.trial import Job, Model, Trial


def run(job: Job) -> Generator[int]:
    """Carry a job out, yielding now and then the number of models that have ended; the last yield follows the commit.

    Raises:
        LeaseLost: Another driver owns the results now; nothing was committed.
        FlatminError: The data or the weights cannot be used; or a measure failed, and all else is committed.
    """
    results = Results(Path(job.results))
    job = replace(job, trial=_left(results, job.trial))
    if job.trial.committed_as:
        job = replace(job, execution=replace(job.execution, processes_per_model=1))
        yield from _measure_saved(job, results, trainer_of(job, Ranks()))
    else:
        yield from _train(job, results, trainer_of(job, Ranks(0, job.execution.processes_per_model)))


def _left(results: Results, trial: Trial) -> Trial:
    """Return what of a trial is left to do: an attempt that failed in a measure has committed all else."""
    if trial.committed_as or not results.table_file("models", trial.trial_id).exists():
        return trial
    rows = results.table("sharpness").select(["trial_id", "label"]).to_pylist()
    done = {row["label"] for row in rows if row["trial_id"] == trial.trial_id}
    left = tuple(label for label in trial.measures if label not in done)
    return replace(trial, measures=left, committed_as=trial.trial_id)


def trainer_of(job: Job, ranks: Ranks) -> StackTrainer:
    """Return what trains a job's models, in one of the processes that do, and prepare this one for their arithmetic.

    Raises:
        FlatminError: The data, or what is asked for, cannot be used.
    """
    torch.set_num_threads(job.execution.threads)
    tf32 = job.trial.program["precision"] == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # convolutions would use it by default
    with downloads_allowed():
        dataset = load_dataset(plugin_settings("dataset", job.trial.program))
    build = network_builder(job.trial.program, dataset.input_shape, dataset.classes)
    trainer = StackTrainer(job.trial, dataset, build, job.execution, ranks)
    _check_measures(job.trial, trainer)
    return trainer


def plugin_settings(kind: str, program: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the name of a program's plug-in of a kind and the settings it takes, hashable."""
    plugin = get(kind, str(program[kind]))
    return ((kind, plugin.name), *((name, program[name]) for name in plugin.arguments))


@lru_cache(maxsize=1)
def load_dataset(settings: tuple[tuple[str, Any], ...]) -> Dataset:
    """Return a data set; the last one stays loaded, for a worker trains many stacks of the same."""
    (_, name), *arguments = settings
    dataset: Dataset = get("dataset", name).load()(data_root(), **dict(arguments))
    return dataset


def data_root() -> Path:
    """Return where data sets lie: `FLATMIN_DATA`, or a folder of the user's cache."""
    return Path(os.environ.get("FLATMIN_DATA") or Path.home() / ".cache" / "flatmin").expanduser()


def _train(job: Job, results: Results, trainer: StackTrainer) -> Generator[int]:
    started_at = now()
    initial = trainer.progress.params
    resumed = restore_state(results, trainer)
    saved = time.monotonic()
    with others(job, resumed=resumed):
        for progress in trainer.train():
            if progress.alive and time.monotonic() - saved >= job.execution.checkpoint_seconds:
                check(results, job.token)
                save_state(results, trainer)
                saved = time.monotonic()
            try:
                yield len(trainer.outcomes) - len(progress.alive)
            except GeneratorExit:  # told to stop between two steps: lose none of them
                check(results, job.token)
                save_state(results, trainer)
                raise
    execution = _execution(job, trainer, results.attempts(job.trial.trial_id), resumed)
    rows = [_models_row(job.trial, model, started_at, execution) for model in job.trial.models]
    for row, outcome in zip(rows, trainer.outcomes, strict=True):
        assert outcome.row is not None
        row.update(outcome.row)
    measured = _measure(job.trial, trainer, rows, initial)
    _commit(job, results, trainer, initial, rows, measured)
    measured.raise_if_failed()
    yield len(rows)


def _commit(
    job: Job,
    results: Results,
    trainer: StackTrainer,
    initial: Tensor,
    rows: Sequence[dict[str, Any]],
    measured: _Measured,
) -> None:
    trial_id = job.trial.trial_id
    check(results, job.token)
    save_weights(results, trainer, initial)
    epochs = [
        {"model_id": model.model_id, "trial_id": trial_id, **epoch}
        for model, outcome in zip(job.trial.models, trainer.outcomes, strict=True)
        for epoch in outcome.epochs
    ]
    results.write("epochs", trial_id, epochs)
    _write_measured(results, trial_id, measured)
    check(results, job.token)
    results.write("models", trial_id, rows, _arguments(job.trial))
    results.remove(results.state_file(trial_id))


def _measure_saved(job: Job, results: Results, trainer: StackTrainer) -> Generator[int]:
    committed = results.table("models").to_pylist()
    by_id = {row["model_id"]: row for row in committed}
    rows = [by_id[model.model_id] for model in job.trial.models]
    params, buffers, hashes = load_weights(
        results, job.trial, trainer.network, list(trainer.progress.buffers), trainer.device
    )
    yield 0
    initial = _Initial(trainer.progress.params, _differing(job.trial, trainer.progress.params, hashes))
    measured = _measure_weights(job.trial, trainer, rows, params, buffers, initial)
    check(results, job.token)
    _write_measured(results, f"{job.trial.trial_id}-{digest(sorted(job.trial.measures))}", measured)
    measured.raise_if_failed()
    yield len(rows)


@dataclass(frozen=True)
class _Measured:
    """Rows of the tables `sharpness` and `spectra`, and why some are missing, if they are."""

    sharpness: Sequence[dict[str, Any]] = ()
    spectra: Sequence[dict[str, Any]] = ()
    failed: FlatminError | None = None

    def raise_if_failed(self) -> None:
        """Raise what a measure failed with, once the rest is written."""
        if self.failed is not None:
            raise self.failed


@dataclass(frozen=True)
class _Initial:
    """The initial weights `[K, d]`, and by position those models whose are not what they were: why."""

    params: Tensor
    wrong: Mapping[int, str]


def _differing(trial: Trial, params: Tensor, hashes: Sequence[str]) -> dict[int, str]:
    """Return the models whose initial weights, made again from the seed, are not those of the hash."""
    return {
        k: f"and those of {model.model_id}, made again from its seed, are not those it was trained from (their hash "
        "differs: another version of torch or of the network); train it again to measure it"
        for k, (model, saved) in enumerate(zip(trial.models, hashes, strict=True))
        if weights_hash(params[k]) != saved
    }


def _write_measured(results: Results, name: str, measured: _Measured) -> None:
    """Write curves first: the rows of `sharpness` say that a measure is done."""
    if measured.spectra:
        results.write("spectra", name, measured.spectra)
    results.write("sharpness", name, measured.sharpness)


def _measure(trial: Trial, trainer: StackTrainer, rows: Sequence[Mapping[str, Any]], initial: Tensor) -> _Measured:
    params = torch.stack([outcome.params for outcome in trainer.outcomes if outcome.params is not None])
    buffers = buffers_of(trainer.outcomes, trainer.device)
    return _measure_weights(trial, trainer, rows, params.to(trainer.device), buffers, _Initial(initial, {}))


def _measure_weights(
    trial: Trial,
    trainer: StackTrainer,
    rows: Sequence[Mapping[str, Any]],
    params: Tensor,
    buffers: Buffers,
    initial: _Initial,
) -> _Measured:
    """Measure every model that has not diverged; where a model diverged there is no minimum to measure."""
    kept = [k for k, row in enumerate(rows) if row["status"] != "diverged"]
    if not kept or not trial.measures:
        return _Measured()
    index = torch.tensor(kept, device=trainer.device)
    wrong = [reason for k, reason in initial.wrong.items() if k in kept]
    measured, failed = Measured([], []), None
    for train, population, measures in _at_hand(trainer.data.train, trial.measures):
        make = partial(
            Engine,
            trainer.network,
            params[index],
            {name: buffer[index] for name, buffer in buffers.items()},
            train.select(index).chunks(),
            torch.tensor([stream_key("measure", trainer.recipes[k].seed) for k in kept], device=trainer.device),
            initial=None if wrong else initial.params[index],
            no_initial=wrong[0] if wrong else "",
            loss=trainer.objective.of_example,
            sets={name: split.select(index).chunks() for name, split in _other_sets(trainer).items()},
            population=population,
        )
        taken = take(make, len(kept), measures)
        measured = Measured([*measured.rows, *taken.measured.rows], [*measured.points, *taken.measured.points])
        failed = taken.failed or failed
    keys = [
        {"model_id": trial.models[k].model_id, "trial_id": trial.trial_id, "epoch": rows[k]["epochs_run"]} for k in kept
    ]
    return _Measured(
        [{**key, **row} for of_label in measured.rows for key, row in zip(keys, of_label, strict=True)],
        [
            {**key, **point}
            for of_label in measured.points
            for key, points in zip(keys, of_label, strict=True)
            for point in points
        ],
        failed,
    )


def _at_hand(train: Split, measures: Sequence[str]) -> list[tuple[Split, int, list[str]]]:
    """Return the examples that measures need at hand, of how many they stand for, and those measures.

    That is the training set, or of a streamed one what `subset` asks for; one example for measures that look at none.
    """
    if not train.streamed:
        return [(train, len(train), list(measures))]
    sizes = {text: parse_label(text).common["subset"] for text in measures}
    return [
        (train.part(size or 1), len(train) if size else 1, [text for text in measures if sizes[text] == size])
        for size in dict.fromkeys(sizes.values())
    ]


def _other_sets(trainer: StackTrainer) -> dict[str, Split]:
    """Return the sets beside the training set that a measure can be asked of."""
    sets = {"val": trainer.data.val, "test": trainer.data.test}
    return {name: split for name, split in sets.items() if split is not None}


def _check_measures(trial: Trial, trainer: StackTrainer) -> None:
    """Refuse what could not be measured, before hours of training.

    Raises:
        RequestError: A measure is asked of a set that there is not, or needs what the task has not.
    """
    there = ["train", *_other_sets(trainer)]
    for text in trial.measures:
        check_measure(trainer.objective.task, text)
        label = parse_label(text)
        data = label.common["data"]
        if data not in there:
            raise RequestError(
                f"'{text}': there is no '{data}' set; there are: {', '.join(there)}. Give `val_size` to hold one out"
            )
        of_weights = "data" in get("measure", label.measure).refuses
        if trainer.data.train.streamed and not of_weights and (data != "train" or label.common["subset"] is None):
            raise RequestError(
                f"'{text}': the images of this data set are read from files, and a measure reads its examples hundreds "
                "of times; give it a part of the training set that fits in memory, as subset=2000"
            )


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


def _execution(job: Job, trainer: StackTrainer, attempt: int, resumed: bool) -> dict[str, Any]:
    """Return how a trial was run, for the `execution` column."""
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
        "retries": attempt,
        "resumed": resumed,
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
