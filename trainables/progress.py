"""Where a stack stands, and what has become of each of its models: plain data, for the checkpoint and the tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Progress:
    """Where a stack stands: all that a checkpoint holds.

    Attributes:
        alive: Positions in the trial of the models still training; the rows of every tensor here.
        params: Weights `[K, d]`.
        buffers: Stacked buffers.
        optimizer: Stacked optimizer state.
        params_before: Weights before the last step, which a model that diverged goes back to.
        buffers_before: Buffers before the last step.
        running: False for a model that has diverged in this epoch, bool `[K]`.
        epoch: Epochs done.
        step: Steps done in the current epoch.
        seconds: Each model's share of the stack's wall-clock time.
    """

    alive: list[int]
    params: Tensor
    buffers: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    params_before: Tensor
    buffers_before: dict[str, Tensor]
    running: Tensor
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0

    def select(self, index: Tensor) -> Progress:
        """Return the progress of some of the models, by row."""
        chosen = self._with(lambda tensor: tensor[index])
        return replace(chosen, alive=[self.alive[row] for row in index.tolist()])

    def to(self, device: torch.device) -> Progress:
        """Return the progress with its tensors on a device."""
        return self._with(lambda tensor: tensor.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Progress:
        def each(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(tensor) for name, tensor in tensors.items()}

        return replace(
            self,
            params=change(self.params),
            buffers=each(self.buffers),
            optimizer=each(self.optimizer),
            params_before=change(self.params_before),
            buffers_before=each(self.buffers_before),
            running=change(self.running),
        )


@dataclass
class Outcome:
    """What has become of one model so far; plain data, for the checkpoint and the tables.

    Attributes:
        epochs, sharpness: Its rows of these tables, without ids.
        spectra: Its curves, each with all its points.
        row: Its columns of the `models` table once it has ended, else None.
        params: Its weights once it has ended, `[d]`.
        buffers: Its buffers once it has ended.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    sharpness: list[dict[str, Any]] = field(default_factory=list)
    spectra: list[dict[str, Any]] = field(default_factory=list)
    row: dict[str, Any] | None = None
    params: Tensor | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
