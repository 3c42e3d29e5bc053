"""A pilot: some models of a trial trained and measured for a given time, to tell what the whole trial will take.

Nothing is written, and nothing is downloaded. What is timed goes through the trainer and the measures of a study.

- Steps and evaluations are timed for one model, and for as many as the time allows; n models take what a line through
  both says. The line is then scaled, so that it gives for all that was trained what that took.
- The training losses of models that stop at some loss are noted as they fall, up to their ends.
- Measures are taken at the weights so far, of as many models and examples as the time allows, and scaled to all. Where
  it allows too few, they take their passes over the data (see docs/measures.md), each as long as an evaluation.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flatmin.stack.network import Buffers
from flatmin.trainables.evaluation import evaluate
from flatmin.trainables.job import trainer_of
from flatmin.trainables.measures import Initial, measure_saved
from flatmin.trainables.ranks import Ranks
from flatmin.trainables.trainer import StackTrainer
from flatmin.trial import Execution, Job, Trial

_ALONE, _TOGETHER = 0.1, 0.7
"""Shares of the time that go to one model, and to the stack; the rest is for the measures."""

_FEWEST = 32
"""Examples that a pass is timed on at least."""

_SAMPLING = 1.5
"""How far the passes of measures may exceed what is expected of them."""


@dataclass(frozen=True)
class Seen:
    """The training losses of a model so far.

    Attributes:
        epochs: After how many epochs they were seen.
        losses: As many.
        ended: Whether the model ended with the last of them.
    """

    epochs: tuple[float, ...]
    losses: tuple[float, ...]
    ended: bool


@dataclass(frozen=True)
class Pilot:
    """What a pilot has found.

    Attributes:
        step: Seconds of a step: fixed, and for each model.
        evaluation: Seconds of a pass over the training set that evaluates: fixed, and for each model.
        measures: Seconds of all measures of one model at one epoch.
        setup: Seconds of loading the data set and building a stack.
        seen: Of the first models of the trial, as many as were trained.
        complete: Whether these have all ended, and were measured on all examples.
        spent: Seconds that it took, setup left out.
    """

    step: tuple[float, float]
    evaluation: tuple[float, float]
    measures: float
    setup: float
    seen: tuple[Seen, ...]
    complete: bool
    spent: float


def devices() -> int:
    """Return how many GPUs torch sees."""
    return torch.cuda.device_count()


def pilot(trial: Trial, execution: Execution, seconds: float, passes: float) -> Pilot:
    """Train and measure some models of a trial, for about some seconds; longer where a step takes longer.

    Args:
        trial: The models; where there is no time for all, the first of them are taken.
        execution: How they are run.
        seconds: The time for it.
        passes: Passes over the training set that the measures of a model take, about.

    Raises:
        FlatminError: The data are not here, or what is asked for cannot be done.
    """
    begun = time.perf_counter()
    alone = _Run(_trainer(trial, execution, 1))
    setup = time.perf_counter() - begun
    begun += setup
    alone.train(seconds * _ALONE)
    size = min(len(trial.models), max(1, int(seconds * _TOGETHER / 4 / alone.step)))
    stack = alone
    if size > 1:
        started = time.perf_counter()
        stack = _Run(_trainer(trial, execution, size))
        setup += time.perf_counter() - started
        begun += time.perf_counter() - started
    stack.train(begun + seconds * (_ALONE + _TOGETHER) - time.perf_counter())
    step = _line(alone.step, stack.step, size)
    evaluation = _line(alone.evaluation, stack.evaluation, size)
    factor = stack.factor(step, evaluation)
    measures, whole = _measured(stack, begun + seconds - time.perf_counter(), passes)
    return Pilot(
        step=(factor * step[0], factor * step[1]),
        evaluation=(factor * evaluation[0], factor * evaluation[1]),
        measures=measures,
        setup=setup,
        seen=stack.seen(),
        complete=whole and not stack.trainer.progress.alive,
        spent=time.perf_counter() - begun,
    )


def _trainer(trial: Trial, execution: Execution, size: int) -> StackTrainer:
    first = replace(trial, models=trial.models[:size])
    return trainer_of(Job(first, results="", token="", execution=execution), Ranks(), download=False)


def _line(alone: float, together: float, size: int) -> tuple[float, float]:
    """Return fixed seconds and seconds of each model, from those of one model and of a stack."""
    each = together / size if size == 1 else max(0.0, min(together / size, (together - alone) / (size - 1)))
    return together - size * each, each


class _Run:
    """Trains a stack and notes what takes how long.

    Attributes:
        trainer: The stack.
        initial: The weights it began with, `[K, d]`.
        step, evaluation: Seconds of a step, and of an evaluation of the training set, of the whole stack.
    """

    def __init__(self, trainer: StackTrainer) -> None:
        self.trainer, self.initial = trainer, trainer.progress.params
        self.step = self.evaluation = 0.0
        self._seconds = 0.0
        self._steps, self._epochs = Counter[int](), Counter[int]()
        self._losses: list[tuple[int, dict[int, float]]] = []

    def train(self, seconds: float) -> None:
        """Train to the end, or for that long; at least one step."""
        until = time.perf_counter() + seconds
        single: list[float] = []
        models, last = len(self.trainer.progress.alive), time.perf_counter()
        for _ in self.trainer.train():
            _finish(self.trainer)
            now, progress = time.perf_counter(), self.trainer.progress
            self._seconds += now - last
            self._steps[models] += 1
            if progress.step == 0:
                self._epochs[models] += 1
                self._look()
            elif models == len(self.trainer.outcomes):
                single.append(now - last)
            models, last = len(progress.alive), time.perf_counter()
            if last >= until or not models:
                break
        self.evaluation = self._evaluation(seconds / 10)
        if len(single) > 1:  # the first one also warms up
            self.step = sum(single[1:]) / len(single[1:])
        else:
            evaluated = sum(self._epochs.values()) * self._passes() * self.evaluation
            self.step = max(self._seconds - evaluated, 0.1 * self._seconds) / sum(self._steps.values())

    def factor(self, step: tuple[float, float], evaluation: tuple[float, float]) -> float:
        """Return what all that was trained has taken, over what these seconds, fixed and for each model, say."""
        said = sum(count * (step[0] + models * step[1]) for models, count in self._steps.items())
        said += self._passes() * sum(
            count * (evaluation[0] + models * evaluation[1]) for models, count in self._epochs.items()
        )
        return self._seconds / said

    def seen(self) -> tuple[Seen, ...]:
        """Return the losses of each model."""
        return tuple(self._of(position) for position in range(len(self.trainer.outcomes)))

    def _of(self, position: int) -> Seen:
        row = self.trainer.outcomes[position].row
        points = [(float(epoch), found[position]) for epoch, found in self._losses if position in found]
        if row is not None:
            points.append((float(row["epochs_run"]), row["train_loss"]))
        return Seen(tuple(epoch for epoch, _ in points), tuple(loss for _, loss in points), row is not None)

    def _passes(self) -> float:
        """Return passes over as many examples as the training set has that evaluate, on average over epochs."""
        data, recipes = self.trainer.data, self.trainer.recipes
        others = (len(data.test) + (len(data.val) if data.val else 0)) / len(data.train)
        stopping = any(recipe.stop_loss > 0 for recipe in recipes)
        return (1.0 if stopping else 1 / recipes[0].eval_every) + others / recipes[0].eval_every

    def _look(self) -> None:
        """Note the losses of the models that are left, every now and then."""
        progress = self.trainer.progress
        looked = self._losses[-1][0] if self._losses else 0
        if progress.alive and progress.epoch >= 1.1 * looked and any(r.stop_loss > 0 for r in self.trainer.recipes):
            data = self.trainer.data.train.select(torch.tensor(progress.alive, device=self.trainer.device))
            scores = evaluate(self.trainer.network, progress.params, progress.buffers, data, self.trainer.objective)
            self._losses.append((progress.epoch, dict(zip(progress.alive, scores.loss.tolist(), strict=True))))

    def _evaluation(self, seconds: float) -> float:
        """Return the seconds of a pass of the whole stack, timed on as many examples as there is time for."""
        trainer, count = self.trainer, _FEWEST
        params, buffers = standing(trainer)
        while True:
            part = trainer.data.train.part(count)
            started = time.perf_counter()
            evaluate(trainer.network, params, buffers, part, trainer.objective)  # ends with the numbers on the CPU
            taken = time.perf_counter() - started
            if len(part) == len(trainer.data.train) or 4 * taken > seconds:
                return taken * len(trainer.data.train) / len(part)
            count *= 4


def standing(trainer: StackTrainer) -> tuple[Tensor, Buffers]:
    """Return the weights `[K, d]` and buffers of all models of a stack, whether they have ended or not."""
    progress = trainer.progress
    rows = {position: row for row, position in enumerate(progress.alive)}
    params, buffers = [], []
    for position, outcome in enumerate(trainer.outcomes):
        row = rows.get(position)
        ended = row is None
        own = outcome.params if ended else progress.params[row]
        assert own is not None
        params.append(own.to(trainer.device))
        buffers.append(outcome.buffers if ended else {name: value[row] for name, value in progress.buffers.items()})
    stacked = {name: torch.stack([own[name].to(trainer.device) for own in buffers]) for name in buffers[0]}
    return torch.stack(params), stacked


def _measured(run: _Run, seconds: float, passes: float) -> tuple[float, bool]:
    """Return the seconds that the measures of one model take, and whether they were taken on all examples."""
    trainer = run.trainer
    if not trainer.trial.measures:
        return 0.0, True
    size, examples = len(trainer.outcomes), len(trainer.data.train)
    of_one = passes * _SAMPLING * run.evaluation / size
    if trainer.data.train.streamed or of_one * _FEWEST / examples > seconds:
        return passes * run.evaluation / size, False
    models = max(1, min(size, int(seconds / of_one)))
    count = min(examples, max(_FEWEST, int(examples * seconds / (models * of_one))))
    trainer.data = replace(trainer.data, train=trainer.data.train.part(count))
    params, buffers = standing(trainer)
    # what has diverged is not measured, nor is what there is no time for
    rows = [{"status": "finished" if k < models else "diverged", "epochs_run": 0} for k in range(size)]
    started = time.perf_counter()
    failed = measure_saved(trainer, rows, params, buffers, Initial(run.initial))
    if failed:
        raise failed
    return (time.perf_counter() - started) / models * examples / count, count == examples


def _finish(trainer: StackTrainer) -> None:
    """Wait until a device has done what it was told."""
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
