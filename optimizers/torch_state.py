"""The state of a `TorchOptimizer`: one tensor for all weights, of which torch sees a part per parameter."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from flatmin.optimizers.compose import Composed
from flatmin.optimizers.interface import State

Each = MutableMapping[Tensor, dict[str, Any]]
"""`torch.optim.Optimizer.state`: of every parameter, its part of every tensor."""


class FlatState:
    """The state as it was kept last, and of which parameters."""

    def __init__(self) -> None:
        self._tensors: State = {}
        self._counts: set[str] = set()
        self._parameters: list[Tensor] = []

    def load(
        self, parameters: list[Tensor], kept: Tensor, composed: Composed, each: Mapping[Tensor, Mapping[str, Any]]
    ) -> tuple[State, set[str]]:
        """Return the flat state, put together from its parts where parameters have come or gone.

        Beside it: the names of those of its tensors that have one number per model.

        Args:
            parameters: The parameters that are trained.
            kept: Their weights `[1, d]`.
            composed: What begins the state of new ones.
            each: The parts.
        """
        if len(parameters) == len(self._parameters) and all(map(_same, parameters, self._parameters)):
            return self._tensors, self._counts
        initial = composed.init(kept)
        counts = {key for key, value in initial.items() if value.shape[1] == 1}
        sizes = [parameter.numel() for parameter in parameters]
        flat = {}
        for key, value in initial.items():
            fresh = [value[0]] * len(sizes) if key in counts else torch.split(value[0], sizes)
            own = [
                each[parameter].get(key, piece).to(value).reshape(-1)
                for parameter, piece in zip(parameters, fresh, strict=True)
            ]
            if key not in counts:
                flat[key] = torch.cat(own)[None]
            elif all(torch.equal(one, own[0]) for one in own):
                flat[key] = own[0][None]
            else:
                flat[key] = torch.repeat_interleave(torch.cat(own), torch.tensor(sizes, device=value.device))[None]
        return flat, counts

    def store(self, parameters: list[Tensor], state: State, counts: set[str], each: Each) -> None:
        """Keep the flat state of parameters, and show every one its part."""
        self._tensors, self._counts, self._parameters = state, counts, parameters
        sizes = [parameter.numel() for parameter in parameters]
        for key, value in state.items():
            split = value.shape[1] == sum(sizes)
            whole = split and key not in counts
            pieces = torch.split(value[0], sizes) if split else [value[0]] * len(sizes)
            for parameter, piece in zip(parameters, pieces, strict=True):
                each[parameter][key] = piece.view_as(parameter) if whole else piece[0]


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b
