"""One pass through the network, there and back: as it is written, compiled, or as one CUDA graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from os import environ
from typing import Any

import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.optimizers.interface import HessianProduct
from flatmin.stack import Batch, StackedNetwork, Streams
from flatmin.stack.chain import Chain
from flatmin.stack.curvature import AlongChain, Recorded
from flatmin.trainables.ranks import Ranks
from flatmin.trainables.tasks import Objective
from flatmin.trial import Execution

Buffers = dict[str, Tensor]
Gradient = tuple[Tensor, Tensor, Buffers]
Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]

_KEPT_GRAPHS = 8
"""Graphs of so many shapes are kept; each holds the memory of a pass."""

_WARM_UP = 3
"""Passes before a capture: libraries choose and set up what they use in the first."""


@dataclass(frozen=True)
class Part:
    """Some of the examples of a batch, with what their share of its loss depends on.

    Attributes:
        batch: The examples.
        streams: What dropout draws from.
        total: What all examples of the batch weigh together, `[K]`.
        smoothing: Each model's label smoothing, `[K]`, or None where there is none.
    """

    batch: Batch
    streams: Streams
    total: Tensor
    smoothing: Tensor | None = None

    def of_models(self, rows: slice) -> Part:
        """Return the same of some of the models."""
        batch, smoothing = self.batch, None if self.smoothing is None else self.smoothing[rows]
        x = batch.x if batch.shared else batch.x[rows]
        streams = Streams.of_keys(self.streams.keys[rows], self.streams.first)
        return Part(replace(batch, x=x, y=batch.y[rows]), streams, self.total[rows], smoothing)


class Forward:
    """The losses of K models on a part of a batch, and their gradients.

    Args:
        network: The network.
        objective: What it is trained for.
        precision: The setting.
        execution: Whether to compile and capture.
        ranks: The processes that share every batch.

    Raises:
        RequestError: There is no compiler, or no CUDA device to capture on.
    """

    def __init__(
        self, network: StackedNetwork, objective: Objective, precision: str, execution: Execution, ranks: Ranks
    ) -> None:
        self.network, self.objective, self.ranks = network, objective, ranks
        self._bf16, self._compiled = precision == "bf16", execution.compile
        self._device = execution.device
        _check(execution)
        self._run: Callable[..., tuple[Tensor, Buffers]] = self._pass
        if execution.compile:
            self._run = torch.compile(self._pass)
        self._graphs: dict[Any, _Captured] | None = {} if execution.cuda_graphs else None

    def with_product(self, params: Tensor, buffers: Buffers, part: Part) -> tuple[Gradient, HessianProduct]:
        """Return what `gradient` does, and products with the Hessians of the same losses."""
        along, moved = self._along_chain(part.batch, len(params)), buffers
        found: AlongChain | Recorded
        if along is not None:
            chain, x = along
            found = AlongChain(chain, params, x, lambda outputs: self._losses(outputs, part), part.streams)
        else:
            leaf = params.detach().requires_grad_()
            losses, moved = self._pass(leaf, buffers, _tensors(part), *_fixed(part))
            found = Recorded(losses, leaf)
        return (found.losses, found.gradient, moved), found.product

    def gradient(self, params: Tensor, buffers: Buffers, part: Part) -> Gradient:
        """Return each model's share of the loss of its batch `[K]`, its gradient `[K, d]`, and new buffers."""
        if self._graphs is None:
            return self._gradient(params, buffers, part)
        tensors, fixed = (params, buffers, _tensors(part)), _fixed(part)
        key = (fixed, *(tuple(tensor.shape) for tensor in _leaves(tensors)))
        if key not in self._graphs:
            if len(self._graphs) == _KEPT_GRAPHS:  # models have ended: most of these come no more
                self._graphs.clear()
            self._graphs[key] = _Captured(lambda at, own, given: self._gradient(at, own, _part(given, *fixed)), tensors)
        return self._graphs[key](tensors)

    def _gradient(self, params: Tensor, buffers: Buffers, part: Part) -> Gradient:
        along = self._along_chain(part.batch, len(params))
        if along is not None:
            chain, x = along
            there = chain.forward(params, x, part.streams)
            own, slopes = self.objective.slopes(there.outputs, part.batch.y, part.smoothing)
            grad, _ = chain.backward(there, slopes / part.total[:, None, None])
            return own.sum(dim=1) / part.total, grad, buffers
        if len(params) > 1 and self.network.loops(params.device) and not self._compiled:
            return self._one_by_one(params, buffers, part)
        leaf = params.detach().requires_grad_()
        losses, moved = self._run(leaf, buffers, _tensors(part), *_fixed(part))
        (grad,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), grad, {name: buffer.detach() for name, buffer in moved.items()}

    def _one_by_one(self, params: Tensor, buffers: Buffers, part: Part) -> Gradient:
        """Go there and back with one model after another, so that what a way back needs is there for one at a time."""
        grad, losses, moved = torch.empty_like(params), [], []
        for k in range(len(params)):
            row = slice(k, k + 1)
            own = {name: buffer[row] for name, buffer in buffers.items()}
            loss, grad[row], after = self._gradient(params[row], own, part.of_models(row))
            losses.append(loss)
            moved.append(after)
        return torch.cat(losses), grad, {name: torch.cat([own[name] for own in moved]) for name in buffers}

    def _along_chain(self, batch: Batch, models: int) -> tuple[Chain, Tensor] | None:
        """Return the chain that the network is and its examples, where derivatives are written out, not recorded."""
        return None if self._bf16 or self._compiled else self.network.along_chain(batch, models)

    def _losses(self, outputs: Tensor, part: Part) -> Tensor:
        return self.objective.losses(outputs, part.batch.y, part.smoothing).sum(dim=1) / part.total

    def _pass(
        self, params: Tensor, buffers: Buffers, given: Tensors, first: int, shared: bool
    ) -> tuple[Tensor, Buffers]:
        """Return losses and new buffers; a function of tensors that changes none of them, as compilers want it."""
        part = _part(given, first, shared)
        moved = {name: buffer.clone() for name, buffer in buffers.items()}
        with self._autocast(), self.ranks.batch_norm():
            outputs = self.network.logits(params, moved, part.batch, train=True, streams=part.streams)
            losses = self._losses(outputs, part)
        return losses, moved

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device, torch.bfloat16) if self._bf16 else nullcontext()


class _Captured:
    """A function of tensors as a CUDA graph: launched at once, which is what small networks spend their time on."""

    def __init__(self, function: Callable[..., Gradient], tensors: tuple[Any, ...]) -> None:
        self._inputs = _map(torch.clone, tensors)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, tensors: tuple[Any, ...]) -> Gradient:
        for own, given in zip(_leaves(self._inputs), _leaves(tensors), strict=True):
            own.copy_(given)
        self._graph.replay()
        outputs: Gradient = _map(torch.clone, self._outputs)
        return outputs


def _check(execution: Execution) -> None:
    execution.check_device()
    compilers = [environ["CXX"]] if "CXX" in environ else ["g++", "clang++", "c++"]
    if execution.compile and not any(map(shutil.which, compilers)):
        raise RequestError(
            f"--compile: torch.compile needs a C++ compiler, and there is none ({', '.join(compilers)}); install g++, "
            "name one in CXX, or leave --compile out"
        )


def _tensors(part: Part) -> Tensors:
    return part.batch.x, part.batch.y, part.streams.keys, part.total, part.smoothing


def _fixed(part: Part) -> tuple[int, bool]:
    """Return what of a part is the same in all its passes, and part of what is compiled or captured."""
    return part.streams.first, part.batch.shared


def _part(given: Tensors, first: int, shared: bool) -> Part:
    """Return the part that these are the tensors of, and what is fixed."""
    x, y, keys, total, smoothing = given
    return Part(Batch(x, y, shared), Streams.of_keys(keys, first), total, smoothing)


def _leaves(tree: Any) -> list[Tensor]:
    leaves: list[Tensor] = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if leaf is not None]


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, function, tree)
