"""Checkpoints of a trial under way, and the weights of a committed one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flatmin.bucket import local_copy
from flatmin.errors import ResultsError
from flatmin.files import write_atomically
from flatmin.results import Results
from flatmin.stack import StackedNetwork
from flatmin.trainables.progress import Outcome, Progress
from flatmin.trainables.trainer import StackTrainer
from flatmin.trial import Trial


def save_state(results: Results, trainer: StackTrainer) -> None:
    """Write the whole stack, its flags and its step, in place of the checkpoint before."""
    state = {
        "model_ids": [model.model_id for model in trainer.trial.models],
        "progress": {f.name: getattr(trainer.progress, f.name) for f in dataclasses.fields(Progress)},
        "outcomes": [vars(outcome) for outcome in trainer.outcomes],
    }
    write_atomically(results.state_file(trainer.trial.trial_id), lambda file: torch.save(state, file))


def restore_state(results: Results, trainer: StackTrainer) -> bool:
    """Go on from the trial's checkpoint; return whether there was one that could be read.

    One that is damaged, or holds its models in other places, is removed: the trial starts again.
    """
    file = results.state_file(trainer.trial.trial_id)
    if not file.exists():
        return False
    try:
        with local_copy(file) as copy:
            state: dict[str, Any] = torch.load(copy, map_location="cpu", weights_only=True)
        if state["model_ids"] != [model.model_id for model in trainer.trial.models]:
            raise ValueError("other models, or in another order")
        outcomes = [Outcome(**outcome) for outcome in state["outcomes"]]
        trainer.restore(Progress(**state["progress"]), outcomes)
    except Exception:  # torch.load raises whatever the damaged bytes lead it to
        results.remove(file)
        return False
    return True


def save_weights(results: Results, trainer: StackTrainer, initial: Tensor) -> None:
    """Write every model's weights and buffers as `<model_id>/<name>`.

    The file's metadata holds a hash of each model's initial weights, which can be made again from the seed.
    """
    tensors: dict[str, Tensor] = {}
    hashes = {}
    for model, outcome, start in zip(trainer.trial.models, trainer.outcomes, initial, strict=True):
        assert outcome.params is not None
        for name, view in trainer.network.views(outcome.params[None]).items():
            tensors[f"{model.model_id}/{name}"] = view[0].contiguous()
        tensors.update({f"{model.model_id}/{name}": buffer for name, buffer in outcome.buffers.items()})
        hashes[model.model_id] = weights_hash(start)
    metadata = {"init_hash": json.dumps(hashes)}
    write_atomically(
        results.weights_file(trainer.trial.trial_id), lambda file: save_file(tensors, file, metadata=metadata)
    )


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
