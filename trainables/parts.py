"""A trial in halves: where a stack is too large for the memory, or where one model's failure would cost the others.

A half is a trial of its own, with its own id, and is committed by itself. A stack that runs out of memory is halved at
once. One that fails in another way is tried whole once more, for what fails once may not fail again; from then on it
is halved until the models that fail stand alone. What was committed stays, whatever becomes of the rest.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from flatmin.errors import COMES_AGAIN, FlatminError, LeaseLost, ModelsFailed, error_line
from flatmin.trial import Trial

MOST_ALONE = 8
"""Models that are seen to fail alone, none of the others succeeding, before the fault is taken to be the program's."""


@dataclass(frozen=True)
class Part:
    """A trial, or what its halving has made of it.

    Attributes:
        trial: The models.
        halvings: How often the stack was halved.
        reason: Why: it did not fit in `memory`, or there was a `failure`; None where it was not.
    """

    trial: Trial
    halvings: int = 0
    reason: Literal["memory", "failure"] | None = None

    def halves(self, reason: Literal["memory", "failure"]) -> tuple[Part, Part]:
        """Return its models in two parts."""
        models = self.trial.models
        middle = len(models) // 2
        first, second = (replace(self.trial, models=half) for half in (models[:middle], models[middle:]))
        return Part(first, self.halvings + 1, reason), Part(second, self.halvings + 1, reason)


@dataclass
class Attempt:
    """An attempt at a trial, whole or in parts.

    Attributes:
        work: Carries a part out, yielding how many of its models have ended.
        committed: Whether a part's models are committed, so that its halves need not be.
        apart: Whether models that fail are sought out.
        failed: The models that have failed alone, by id: the error in one line, and its traceback.
        succeeded: Whether a part of several was carried out.
    """

    work: Callable[[Part], Generator[int]]
    committed: Callable[[Trial], bool]
    apart: bool
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)
    succeeded: bool = False

    def run(self, trial: Trial) -> Generator[int]:
        """Carry a trial out, in parts where need be, yielding how many models have ended.

        Raises:
            ModelsFailed: Some models have failed; the others are committed.
        """
        yield from self.carry_out(Part(trial))
        if self.failed:
            raise ModelsFailed(self.failed)

    def carry_out(self, part: Part) -> Generator[int]:
        """Carry a part out, and note in `failed` which of its models have failed alone."""
        models = part.trial.models
        try:
            yield from _surviving(self.work(part))
            self.succeeded = True
            return
        except Exception as error:  # a plug-in may raise anything
            reason = self._why_halve(error)
            line, trace = error_line(error), traceback.format_exc()
            if reason == "memory" and len(models) == 1:
                line += "; one model alone does not fit: give --micro-batch auto, or fewer trials at a time"
            if not part.halvings and (len(models) == 1 or self.committed(part.trial)):
                if reason == "memory":
                    raise FlatminError(line) from error
                raise
            if reason is None:
                raise
        # Only now are the frames gone that held the attempt's tensors.
        if len(models) == 1 or self.committed(part.trial) or self._hopeless():
            self.failed |= {model.model_id: (line, trace) for model in models}
            return
        _free_memory()
        ended = 0
        names = f"the {len(models)} models of trial {part.trial.trial_id}"
        print(f"{names} are taken in two parts: {line}", file=sys.stderr)
        for half in part.halves(reason):
            for of_half in self.carry_out(half):
                yield ended + of_half
            ended += len(half.trial.models)

    def _why_halve(self, error: Exception) -> Literal["memory", "failure"] | None:
        if out_of_memory(error):
            return "memory"
        again = isinstance(error, (LeaseLost, OSError, *COMES_AGAIN))
        return "failure" if self.apart and not again else None

    def _hopeless(self) -> bool:
        return len(self.failed) >= MOST_ALONE and not self.succeeded


def _surviving(work: Generator[int]) -> Generator[int]:
    """Go on with some work; a plug-in that would end this process fails like one that raises.

    Raises:
        FlatminError: It would have.
    """
    try:
        yield from work
    except SystemExit as error:  # no Exception: it would end a worker without a word, and --inline as if all were done
        raise FlatminError(f"SystemExit: {error}; a plug-in has called sys.exit") from error


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or what has caused it, is a lack of memory: of a device, or of this machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # what torch says of a CPU
        return True
    return error.__cause__ is not None and out_of_memory(error.__cause__)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
