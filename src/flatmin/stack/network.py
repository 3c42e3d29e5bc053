"""K models of one network: parameters as one [K, d] buffer, buffers stacked beside it.

The losses of all K are one computation, differentiable by ordinary autograd: `torch.func.vmap` over a
functional call of the module, or a plain loop where that is faster. Models never mix: the gradient of
the summed losses is each model's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from flatmin.stack.streams import Streams, dropout_from

Buffers = Mapping[str, Tensor]
"""Stacked buffers by name, each `[K, ...]`."""


@dataclass(frozen=True)
class Batch:
    """Examples for K models.

    Attributes:
        x: Inputs `[K, b, *shape]`, or `[b, *shape]` when all models see the same.
        y: Classes `[K, b]`.
        shared: Whether `x` has no axis for the model.
    """

    x: Tensor
    y: Tensor
    shared: bool = False

    def select(self, index: Tensor) -> Batch:
        """Return the batch of some of the models (rows may repeat)."""
        return Batch(self.x if self.shared else self.x[index], self.y[index], self.shared)


class StackedNetwork:
    """The function that K models of one network compute, apart from their weights.

    Args:
        template: A module of that network; its weights are not used. It is copied.
        vectorize: `vmap`, `loop`, or `auto`: a loop for convolutions on a CPU, where grouped convolutions
            are slower than one at a time, and vmap elsewhere.

    Raises:
        ValueError: The module has no parameters.
    """

    def __init__(self, template: nn.Module, vectorize: Literal["auto", "vmap", "loop"] = "auto") -> None:
        self.template = copy.deepcopy(template)
        named = {name: parameter for name, parameter in self.template.named_parameters() if parameter.requires_grad}
        if not named:
            raise ValueError("the network has no parameters to train")
        self.names = list(named)
        self.shapes = [tuple(parameter.shape) for parameter in named.values()]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.n_params = sum(self.sizes)
        self.vectorize = vectorize

    @staticmethod
    def stack(modules: Sequence[nn.Module]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weights `[K, d]` and buffers of K modules of one network.

        Parameters that require no gradient are among the buffers: nothing trains, displaces or measures them.
        """
        rows = [
            torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters() if parameter.requires_grad])
            for module in modules
        ]
        per_module = [
            {name: parameter.detach() for name, parameter in module.named_parameters() if not parameter.requires_grad}
            | dict(module.named_buffers())
            for module in modules
        ]
        buffers = {name: torch.stack([own[name] for own in per_module]) for name in per_module[0]}
        return torch.stack(rows), buffers

    def views(self, params: Tensor) -> dict[str, Tensor]:
        """Return the weights `[K, d]` as named tensors `[K, *shape]`, differentiable with a single copy back."""
        pieces = torch.split(params, self.sizes, dim=1)
        return {
            name: piece.reshape(len(params), *shape)
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }

    def module(self, params: Tensor, buffers: Buffers, k: int) -> nn.Module:
        """Return model `k` as a module of its own."""
        module = copy.deepcopy(self.template)
        state = {name: view[0].clone() for name, view in self.views(params.detach()[k : k + 1]).items()}
        state.update({name: buffer[k].clone() for name, buffer in buffers.items()})
        module.load_state_dict(state)
        return module.to(device=params.device, dtype=params.dtype)

    def logits(
        self,
        params: Tensor,
        buffers: Buffers,
        batch: Batch,
        *,
        train: bool = False,
        streams: Streams | None = None,
    ) -> Tensor:
        """Return the outputs `[K, b, classes]`.

        Args:
            params: Weights `[K, d]`.
            buffers: Stacked buffers. With `train`, those that the network updates (BatchNorm's running
                statistics) are changed in place.
            batch: The examples.
            train: Whether the network is in training mode.
            streams: What dropout draws from; needed by a network with dropout in training mode.
        """
        self.template.train(train)
        tensors = {**self.views(params), **buffers}
        keys = torch.zeros(len(params), dtype=torch.int64, device=params.device) if streams is None else streams.keys

        def forward(own: dict[str, Tensor], key: Tensor, x: Tensor) -> Tensor:
            with dropout_from(key) if train and streams is not None else nullcontext():
                outputs: Tensor = functional_call(self.template, own, (x,))
            return outputs

        if self.loops(params.device):
            before = torch.get_rng_state()
            rows = torch.stack(
                [
                    forward(
                        {name: tensor[k] for name, tensor in tensors.items()},
                        keys[k],
                        batch.x if batch.shared else batch.x[k],
                    )
                    for k in range(len(params))
                ]
            )
            if not torch.equal(torch.get_rng_state(), before):
                raise RuntimeError(
                    "the network draws random numbers other than through dropout; a stack cannot repeat it"
                )
            return rows
        in_dims = (0, 0, None if batch.shared else 0)
        outputs: Tensor = vmap(forward, in_dims=in_dims, randomness="error")(tensors, keys, batch.x)
        return outputs

    def losses(
        self,
        params: Tensor,
        buffers: Buffers,
        batch: Batch,
        *,
        train: bool = False,
        streams: Streams | None = None,
    ) -> Tensor:
        """Return each model's mean cross-entropy over its batch, in nats, `[K]`; arguments as in `logits`."""
        return cross_entropy(self.logits(params, buffers, batch, train=train, streams=streams), batch.y).mean(dim=1)

    def loops(self, device: torch.device) -> bool:
        """Return whether models on a device go through the network one after another rather than side by side."""
        if self.vectorize != "auto":
            return self.vectorize == "loop"
        convolutions = any(isinstance(module, nn.modules.conv._ConvNd) for module in self.template.modules())
        return convolutions and device.type == "cpu"


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of every example in nats, `[K, b]`, in at least fp32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide.flatten(0, 1), y.flatten(), reduction="none").reshape(y.shape)
