"""K models of one network: parameters as one [K, d] buffer, buffers stacked beside it.

The losses of all K are one computation, differentiable by ordinary autograd: `torch.func.vmap` over a
functional call of the module, or a plain loop where that is faster. Models never mix: the gradient of
the summed losses is each model's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.nn.parameter import is_lazy

from flatmin.errors import RequestError
from flatmin.stack.chain import Chain
from flatmin.stack.linear import weights_first
from flatmin.stack.streams import Streams, draws_from

Buffers = Mapping[str, Tensor]
"""Stacked buffers by name, each `[K, ...]`."""

_OneModel = Callable[[dict[str, Tensor], Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]

_DRAWS = (
    "the network draws random numbers other than through dropout and torch.rand_like, which no stack could repeat; "
    "write the layer with torch.rand_like of a tensor whose first axis counts examples, and train it with streams"
)
_RANDOM_IN_EVAL = (
    "the network draws random numbers in eval mode, so nothing of it can be repeated: is dropout left on? "
    "functional.dropout needs training=self.training"
)
_REFUSED = "the network does not go through torch.func.vmap (a loop over the models, vectorize='loop', may do)"


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
        vectorize: `vmap`, `loop`, or `auto`: derivatives written out for a chain of linear layers; a loop for
            convolutions on a CPU, where grouped convolutions are slower than one at a time, and for what vmap refuses;
            vmap elsewhere.
        channels_last: Whether images go into the network with their channels last in memory.

    Raises:
        RequestError: The module has parameters that get their shapes from the first batch.
        ValueError: The module has no parameters.

    Attributes:
        chain: The chain of linear layers that it is, where such are passed through as one.
    """

    def __init__(
        self, template: nn.Module, vectorize: Literal["auto", "vmap", "loop"] = "auto", *, channels_last: bool = False
    ) -> None:
        _check_built(template)
        self.template = copy.deepcopy(template)
        self._maps: dict[bool, bool] = {}
        named = {name: parameter for name, parameter in self.template.named_parameters() if parameter.requires_grad}
        if not named:
            raise ValueError("the network has no parameters to train")
        self.names, self._named = list(named), set(named)
        self.shapes = [tuple(parameter.shape) for parameter in named.values()]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.n_params = sum(self.sizes)
        self._aliases = _aliases(self.template)
        self.vectorize = vectorize
        self.channels_last = channels_last
        self.chain = Chain.of(self.template) if vectorize == "auto" else None

    @staticmethod
    def stack(modules: Sequence[nn.Module]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weights `[K, d]` and buffers of K modules of one network.

        Parameters that require no gradient are among the buffers: nothing trains, displaces or measures them.

        Raises:
            RequestError: The modules have parameters that get their shapes from the first batch.
        """
        _check_built(modules[0])
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
        module = copy.deepcopy(self.template).to(device=params.device, dtype=params.dtype)
        own = {name: view[0] for name, view in self.views(params.detach()[k : k + 1]).items()}
        own |= {name: buffer[k] for name, buffer in buffers.items()}
        with torch.no_grad():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                tensor.copy_(own[self._aliases.get(name, name)])
        return module

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
            streams: What random layers draw from (see `flatmin.stack.streams.draws_from`); needed by a network that
                has any in training mode.

        Raises:
            RequestError: The network returns something else than a tensor, or cannot be stacked: it draws random
                numbers of its own, or vmap was asked for and refuses it.
        """
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            along = self.along_chain(batch, len(params))
            if along is not None:
                chain, x = along
                return chain.forward(params, x, streams).outputs if train else chain.outputs(params, x)
        self.template.train(train)
        if self.channels_last and batch.x.dim() == (4 if batch.shared else 5):
            batch = replace(batch, x=batch.x.movedim(-3, -1).contiguous().movedim(-1, -3))
        keys = torch.zeros(len(params), dtype=torch.int64, device=params.device) if streams is None else streams.keys
        forward = self._forward(streams.first if train and streams is not None else None)
        work = self._loop if self.loops(params.device) or not self._maps.get(train, True) else self._vmap
        outputs, assigned = work(forward, {**self.views(params), **buffers}, keys, batch)
        if train:
            for name, value in assigned.items():
                buffers[name].copy_(value.detach())
        return outputs

    def along_chain(self, batch: Batch, models: int) -> tuple[Chain, Tensor] | None:
        """Return the chain that the network is and examples `[K, b, ...]` as it takes them, or None if it does not."""
        x = batch.x.expand(models, *batch.x.shape) if batch.shared else batch.x
        return None if self.chain is None or not self.chain.takes(x) else (self.chain, x)

    def _forward(self, first: int | None) -> _OneModel:
        """Return the function of one model's tensors, key and inputs: its outputs, and what it assigned to buffers.

        `self.mean = ...` in a module's forward makes a new tensor, which `functional_call` leaves in the dictionary.
        """

        def forward(own: dict[str, Tensor], key: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            own = own | {alias: own[name] for alias, name in self._aliases.items()}
            given = dict(own)
            with nullcontext() if first is None else draws_from(key, first), weights_first(x):
                # own ties what is tied: torch's way of it leaves tensors of ours in a layer that runs twice
                outputs = functional_call(self.template, own, (x,), tie_weights=False)
            if not isinstance(outputs, Tensor):
                raise RequestError(
                    f"the network returns {type(outputs).__name__}; it must return one tensor of outputs `[b, ...]`"
                )
            changed = {name: value for name, value in own.items() if value is not given[name]}
            return outputs, {name: value for name, value in changed.items() if name not in self._aliases}

        return forward

    def _loop(
        self, forward: _OneModel, tensors: dict[str, Tensor], keys: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        before = None if torch.compiler.is_compiling() else torch.get_rng_state()
        rows = {name: self._apart(name, tensor) for name, tensor in tensors.items()}
        found = [
            forward({name: own[k] for name, own in rows.items()}, keys[k], batch.x if batch.shared else batch.x[k])
            for k in range(len(keys))
        ]
        if before is not None and not torch.equal(torch.get_rng_state(), before):
            raise RequestError(_DRAWS if self.template.training else _RANDOM_IN_EVAL)
        assigned = {name: torch.stack([own[name] for _, own in found]) for name in found[0][1]}
        return torch.stack([outputs for outputs, _ in found]), assigned

    def _apart(self, name: str, tensor: Tensor) -> Sequence[Tensor] | Tensor:
        """Return what holds each model's part of a tensor `[K, ...]`.

        Weights come apart at once, for each `tensor[k]` would be zeros for all K on the way back. Buffers do not: the
        network may change its own in place, and autograd forbids that of what came apart so.
        """
        if len(tensor) == 1:
            return [tensor.squeeze(0)]
        return tensor.unbind() if name in self._named else tensor

    def _vmap(
        self, forward: _OneModel, tensors: dict[str, Tensor], keys: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take all models at once; what vmap refuses is looped over instead, unless vmap was asked for.

        Training mode and eval mode are found out apart, so that what is done in one never depends on the other.
        """
        in_dims = (0, 0, None if batch.shared else 0)
        mapped = vmap(forward, in_dims=in_dims, randomness="error")
        train = self.template.training
        if torch.compiler.is_compiling() or train in self._maps:
            return mapped(tensors, keys, batch.x)
        kept = {name: tensor.clone() for name, tensor in tensors.items() if name not in self._named}
        try:
            found: tuple[Tensor, dict[str, Tensor]] = mapped(tensors, keys, batch.x)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "random" in str(error):
                raise RequestError(_DRAWS if self.template.training else _RANDOM_IN_EVAL) from error
            if self.vectorize == "vmap":
                raise RequestError(f"{_REFUSED}: {str(error).splitlines()[0]}") from error
            with torch.no_grad():
                for name, tensor in kept.items():
                    tensors[name].copy_(tensor)
            found = self._loop(forward, tensors, keys, batch)
            self._maps[train] = False
            return found
        self._maps[train] = True
        return found

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


def _aliases(module: nn.Module) -> dict[str, str]:
    """Return the other names of tensors that several layers hold, and the name that each goes by."""
    first = {id(tensor): name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    found: dict[str, str] = {}
    for path, part in module.named_modules():
        own = [*part.named_parameters(path, False, False), *part.named_buffers(path, False, False)]
        found |= {name: first[id(tensor)] for name, tensor in own if name != first[id(tensor)]}
    return found


def _check_built(module: nn.Module) -> None:
    """Refuse a module that does not know its own shapes.

    Raises:
        RequestError: A parameter or buffer is lazy.
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            raise RequestError(
                f"'{name}' of the network is lazy: it gets its shape from the first batch, and a stack needs it "
                "before; build the layer from input_shape, or pass an example through the network where it is built"
            )


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of every example in nats, `[K, b]`, in at least fp32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide.flatten(0, 1), y.flatten(), reduction="none").reshape(y.shape)
