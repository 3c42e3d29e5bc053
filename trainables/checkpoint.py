"""Checkpoints of a trial under way, and the weights of a committed one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flatmin.bucket import local_copy
from flatmin.errors import ResultsError
from flatmin.files import patiently, write_atomically
from flatmin.results import Results
from flatmin.stack import StackedNetwork
from flatmin.trainables.progress import Outcome, Progress
from flatmin.trainables.trainer import StackTrainer
from flatmin.trial import Trial


class Checkpoints:
    """The last two checkpoints of a trial under way: the whole stack, its flags and its step.

    Each is copied between two steps and written by a thread while training goes on, in place of the older of the two: a
    kill while one is written leaves the other, and one that turns out to be torn is passed over for the other.

    Args:
        results: Where they lie.
        trainer: What they are of.
        before: Called in the thread before a checkpoint is written; raises where it must not be.
    """

    def __init__(self, results: Results, trainer: StackTrainer, before: Callable[[], None] | None = None) -> None:
        self._results, self._trainer, self._before = results, trainer, before
        self._files = results.state_files(trainer.trial.trial_id)
        self._older = 0
        self._taken: tuple[int, int] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def restore(self) -> bool:
        """Go on from the newest that can be read; return whether there was one.

        One that is damaged, or holds its models in other places, is removed.
        """
        found = sorted((count, place) for place in (0, 1) if (count := self._count(place)) is not None)
        for _, place in reversed(found):
            state = self._read(place)
            if state is None:
                continue
            try:
                outcomes = [Outcome(**outcome) for outcome in state["outcomes"]]
                self._trainer.restore(Progress(**state["progress"]), outcomes)
            except (KeyError, TypeError, ValueError):
                self._results.remove(self._files[place])
                continue
            self._older = 1 - place
            return True
        return False

    def save(self) -> None:
        """Copy where the stack stands, and begin to write it, unless that was done at this step.

        Raises:
            OSError: The one before could not be written.
            LeaseLost: Another driver owns the results now.
        """
        self.wait()
        trainer = self._trainer
        at = (trainer.progress.epoch, trainer.progress.step)
        if at == self._taken:
            return
        self._taken = at
        state = {
            "model_ids": [model.model_id for model in trainer.trial.models],
            "progress": {f.name: _copied(getattr(trainer.progress, f.name)) for f in dataclasses.fields(Progress)},
            "outcomes": [{name: _copied(value) for name, value in vars(each).items()} for each in trainer.outcomes],
        }
        self._writing = self._thread.submit(self._write, state)

    @property
    def ready(self) -> bool:
        """Whether none is being written; what went wrong in the thread is raised here.

        Raises:
            OSError: The last one could not be written.
            LeaseLost: Another driver owns the results now.
        """
        if self._writing is None:
            return True
        if not self._writing.done():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Wait until the last one is written.

        Raises:
            OSError: It could not be written.
            LeaseLost: Another driver owns the results now.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """End the thread, when it has written what it has begun."""
        self._thread.shutdown()

    def remove(self) -> None:
        """Remove both, once one that is being written is there."""
        self.close()
        for file in self._files:
            self._results.remove(file)

    def _write(self, state: dict[str, Any]) -> None:
        if self._before:
            self._before()
        file = self._files[self._older]
        patiently(lambda: write_atomically(file, lambda there: torch.save(state, there)))
        self._older = 1 - self._older

    def _count(self, place: int) -> tuple[int, int] | None:
        """Return the epoch and step of a checkpoint, its tensors left on the disk where they can be."""
        state = self._read(place, mmap=True)
        return None if state is None else (int(state["progress"]["epoch"]), int(state["progress"]["step"]))

    def _read(self, place: int, *, mmap: bool = False) -> dict[str, Any] | None:
        """Return what a checkpoint of these models holds; one of others, or one that cannot be read, is removed."""
        file = self._files[place]
        if not file.exists():
            return None
        try:
            with local_copy(file) as copy:
                state: dict[str, Any] = torch.load(copy, map_location="cpu", weights_only=True, mmap=mmap)
            if not {"epoch", "step"} <= state["progress"].keys():
                raise ValueError("not a checkpoint")
            if state["model_ids"] != [model.model_id for model in self._trainer.trial.models]:
                raise ValueError("other models, or in another order")
        except Exception:  # torch.load raises whatever the damaged bytes lead it to
            self._results.remove(file)
            return None
        return state


def _copied(value: Any) -> Any:
    """Return a copy on the CPU that training does not change: of tensors, lists, and tables of them."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: _copied(of_name) for name, of_name in value.items()}
    return list(value) if isinstance(value, list) else value


def save_weights(
    results: Results, trial: Trial, network: StackedNetwork, outcomes: Sequence[Outcome], initial: Tensor
) -> None:
    """Write every model's weights and buffers as `<model_id>/<name>`.

    The file's metadata holds a hash of each model's initial weights, which can be made again from the seed.
    """
    tensors: dict[str, Tensor] = {}
    hashes = {}
    for model, outcome, start in zip(trial.models, outcomes, initial, strict=True):
        assert outcome.params is not None
        for name, view in network.views(outcome.params[None]).items():
            tensors[f"{model.model_id}/{name}"] = view[0].contiguous()
        tensors.update({f"{model.model_id}/{name}": buffer for name, buffer in outcome.buffers.items()})
        hashes[model.model_id] = weights_hash(start)
    metadata = {"init_hash": json.dumps(hashes)}
    write_atomically(results.weights_file(trial.trial_id), lambda file: save_file(tensors, file, metadata=metadata))


def load_weights(
    results: Results, trial: Trial, network: StackedNetwork, buffer_names: Sequence[str], device: torch.device
) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """Return the weights `[K, d]`, stacked buffers and initial-weight hashes of a committed trial's models.

    Raises:
        ResultsError: The file is missing or damaged, or lacks one of the models.
    """
    file = results.weights_file(trial.trial_id)
    try:
        with local_copy(file) as copy, safe_open(copy, framework="pt", device=str(device)) as saved:
            hashes = json.loads(saved.metadata()["init_hash"])
            rows, buffers = [], []
            for model in trial.models:
                own = [saved.get_tensor(f"{model.model_id}/{name}").reshape(-1) for name in network.names]
                rows.append(torch.cat(own))
                buffers.append({name: saved.get_tensor(f"{model.model_id}/{name}") for name in buffer_names})
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ResultsError(f"the weights in '{file}' cannot be used: {error}") from None
    stacked = {name: torch.stack([own[name] for own in buffers]) for name in buffer_names}
    return torch.stack(rows), stacked, [hashes[model.model_id] for model in trial.models]


def weights_hash(params: Tensor) -> str:
    """Return a hash of one model's weights `[d]`."""
    return hashlib.sha256(params.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
