"""Measures of the models of a stack, at their ends and under way, as rows of their outcomes.

One that cannot be taken of a network costs no other. What is refused (a `RequestError`: a path norm of a tanh network,
say) would be refused again, so it counts as done: its row has no value, has not converged, and says why in its
`settings`, `{"refused": "..."}`. What fails in another way is left out at the end of training, so that it is taken
again from the saved weights. Under way, whose weights are not saved, it is a row without a value, `{"failed": "..."}`.

A model's random vectors come from its seed and the measure alone. So they are the same at every epoch, and differences
between epochs are paired.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flatmin import plugins
from flatmin.errors import FlatminError, RequestError
from flatmin.labels import parse_label
from flatmin.sharpness import Engine, measure_all, refused, row_without_value
from flatmin.stack import stream_key
from flatmin.stack.network import Buffers
from flatmin.trainables.data import Split
from flatmin.trainables.tasks import check_measure
from flatmin.trainables.trainer import StackTrainer, buffers_of


@dataclass(frozen=True)
class Initial:
    """The initial weights of a trial's models.

    Attributes:
        params: The weights `[K, d]`.
        wrong: By position, those models whose are not what they were: why.
    """

    params: Tensor
    wrong: Mapping[int, str] = field(default_factory=dict)


def measure_under_way(trainer: StackTrainer, initial: Tensor) -> None:
    """Measure the models that are still training, if an epoch has ended after which the trial asks for it.

    Args:
        trainer: Where they stand; the rows go to its outcomes.
        initial: The initial weights of all models, `[K, d]`.
    """
    now, every = trainer.progress, trainer.trial.measure_every
    if every is None or now.step or now.epoch % every or not now.alive or not trainer.trial.measures:
        return
    epochs = [now.epoch] * len(now.alive)
    failed = _measure(trainer, now.alive, epochs, now.params, now.buffers, Initial(initial))
    for text, error in failed.items():
        row = row_without_value(parse_label(text), failed=str(error))
        for position in now.alive:
            trainer.outcomes[position].sharpness.append({"epoch": now.epoch, **row})


def measure_ended(trainer: StackTrainer, initial: Tensor) -> FlatminError | None:
    """Measure every model that has not diverged, once all have ended; where one diverged there is no minimum.

    Args:
        trainer: Their ends; the rows go to its outcomes.
        initial: The initial weights `[K, d]`.

    Returns:
        Why rows are missing, if some are.
    """
    ended = [outcome.params for outcome in trainer.outcomes if outcome.params is not None]
    rows = [outcome.row for outcome in trainer.outcomes if outcome.row is not None]
    buffers = buffers_of(trainer.outcomes, trainer.device)
    return measure_saved(trainer, rows, torch.stack(ended).to(trainer.device), buffers, Initial(initial))


def measure_saved(
    trainer: StackTrainer, rows: Sequence[Mapping[str, Any]], params: Tensor, buffers: Buffers, initial: Initial
) -> FlatminError | None:
    """Measure every model of a trial that has not diverged, at the weights it ended with.

    Args:
        trainer: The program, the data, and the outcomes that the rows go to.
        rows: The models' rows of the table `models`.
        params: Their weights `[K, d]`.
        buffers: Their stacked buffers.
        initial: Their initial weights.

    Returns:
        Why rows are missing, if some are.
    """
    kept = [k for k, row in enumerate(rows) if row["status"] != "diverged"]
    if not kept or not trainer.trial.measures:
        return None
    index = torch.tensor(kept, device=trainer.device)
    own = {name: buffer[index] for name, buffer in buffers.items()}
    failed = _measure(trainer, kept, [rows[k]["epochs_run"] for k in kept], params[index], own, initial)
    return next(iter(failed.values()), None)


def _measure(
    trainer: StackTrainer,
    positions: Sequence[int],
    epochs: Sequence[int],
    params: Tensor,
    buffers: Buffers,
    initial: Initial,
) -> dict[str, FlatminError]:
    """Add rows to the outcomes of some models, of which weights and buffers are given; return labels that failed."""
    index = torch.tensor(positions, device=trainer.device)
    wrong = [reason for k, reason in initial.wrong.items() if k in positions]
    failed: dict[str, FlatminError] = {}
    for train, population, labels in _at_hand(trainer.data.train, trainer.trial.measures):
        keys = [stream_key("measure", trainer.recipes[k].seed) for k in positions]
        try:
            engine = Engine(
                trainer.network,
                params,
                buffers,
                train.select(index).chunks(),
                torch.tensor(keys, device=trainer.device),
                initial=None if wrong else initial.params[index],
                no_initial=wrong[0] if wrong else "",
                loss=trainer.objective.of_example,
                sets={name: split.select(index).chunks() for name, split in _other_sets(trainer).items()},
                population=population,
                of_examples=trainer.of_examples.setdefault((tuple(positions), population, len(train)), {}),
            )
        except RequestError as error:
            found = refused(labels, len(positions), error)
        else:
            found = measure_all(engine, labels, keep_going=True)
        failed |= found.failed
        for row, (position, epoch) in enumerate(zip(positions, epochs, strict=True)):
            outcome = trainer.outcomes[position]
            outcome.sharpness += [{"epoch": epoch, **of_label[row]} for of_label in found.rows]
            outcome.spectra += [curve for of_label in found.points for curve in _curves(epoch, of_label[row])]
    return failed


def _curves(epoch: int, points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the points of an epoch by curve, as outcomes keep them: a run may have some for each of 1,500 epochs."""
    curves: dict[tuple[str, str], dict[str, Any]] = {}
    for point in points:
        key = (point["kind"], sys.intern(point["settings"]))
        own = curves.setdefault(
            key, dict(zip(("kind", "settings"), key, strict=True), epoch=epoch, x=[], y=[], value=[])
        )
        for name in ("x", "y", "value"):
            own[name].append(point[name])
    return list(curves.values())


def points_of(curve: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table `spectra`, without ids, of a curve as outcomes keep it."""
    of_curve = {name: curve[name] for name in ("epoch", "kind", "settings")}
    for x, y, value in zip(curve["x"], curve["y"], curve["value"], strict=True):
        yield {**of_curve, "x": x, "y": y, "value": value}


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


def check_measures(trainer: StackTrainer) -> None:
    """Refuse what could not be measured, before hours of training.

    Raises:
        RequestError: A measure is asked of a set that there is not, or needs what the task has not.
    """
    there = ["train", *_other_sets(trainer)]
    for text in trainer.trial.measures:
        check_measure(trainer.objective.task, text)
        label = parse_label(text)
        data = label.common["data"]
        if data not in there:
            raise RequestError(
                f"'{text}': there is no '{data}' set; there are: {', '.join(there)}. Give `val_size` to hold one out"
            )
        of_weights = "data" in plugins.get("measure", label.measure).refuses
        if trainer.data.train.streamed and not of_weights and (data != "train" or label.common["subset"] is None):
            raise RequestError(
                f"'{text}': the images of this data set are read from files, and a measure reads its examples hundreds "
                "of times; give it a part of the training set that fits in memory, as subset=2000"
            )
        if trainer.data.train.streamed and label.common["subset_stratified"]:
            raise RequestError(
                f"'{text}': the images of this data set are read from files, and subset_stratified=true needs the loss "
                "of all of them; leave it out, for a subset that is drawn at random"
            )
