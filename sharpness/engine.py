"""The engine: the training losses of K trained models as functions of their weights.

Everything a measure needs comes from here: whole-set losses at displaced weights, the gradient, exact
Hessian-vector products and random vectors. Sums over examples and batches are float64, in a fixed order, and
weigh every example alike. Nothing here changes a weight, a buffer or a generator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import vmap

from flatmin.sharpness.metric import Metric, scale
from flatmin.stack import Batch, StackedNetwork, Streams, normal, rademacher, stream_key
from flatmin.stack.network import cross_entropy

LOSS_PASSES = 1.0
GRADIENT_PASSES = 2.0
PRODUCT_PASSES = 4.0
"""Costs in passes over the training set: a loss goes through the network once, a gradient there and back, and
reverse over reverse there and back twice. A kept graph makes a product cheaper than that, never dearer."""

_ACTIVATION_BYTES = {"cpu": 4 * 2**20}
_VECTOR_BYTES = {"cpu": 2 * 2**20}
_DEVICE_BYTES = 2**28
"""What goes through at once: on a CPU what stays in its cache, which is worth 1.5x there; elsewhere
plenty."""

_SAVED_PER_ACTIVATION = 8


class Engine:
    """K models of one network, seen as K functions from weights to the mean training loss.

    Args:
        network: The network they share.
        params: Trained weights `[K, d]`; never changed. Weights of less than fp32 are widened to it.
        buffers: Stacked buffers, each `[K, ...]`; never changed.
        batches: The training set as trained, cut in any way: fixed chunks without augmentation, and
            whose order is the order of the sums. It is read many times.
        keys: Each model's random stream for measures, int64 `[K]`.
        memory: Bytes that kept graphs and a Krylov basis may take, each.

    Raises:
        ValueError: No examples, or shapes that do not fit together.
    """

    def __init__(
        self,
        network: StackedNetwork,
        params: Tensor,
        buffers: Mapping[str, Tensor],
        batches: Sequence[Batch],
        keys: Tensor,
        *,
        memory: int = 2**31,
    ) -> None:
        if params.dim() != 2 or params.shape[1] != network.n_params:
            raise ValueError(f"weights must be [K, {network.n_params}], got {tuple(params.shape)}")
        if keys.shape != params.shape[:1] or keys.dtype != torch.int64:
            raise ValueError(f"keys must be int64 [{len(params)}], got {keys.dtype} {tuple(keys.shape)}")
        self.n_examples = sum(batch.y.shape[1] for batch in batches)
        if self.n_examples == 0:
            raise ValueError("there are no examples to measure on")
        if any(len(batch.y) != len(params) for batch in batches):
            raise ValueError(f"every batch must hold labels of all {len(params)} models")
        self.network = network
        self.params = _widen(params.detach())
        self.buffers = {name: _widen(buffer) for name, buffer in buffers.items()}
        self.batches = [Batch(_widen(batch.x), batch.y, batch.shared) for batch in batches]
        self.keys = keys.to(params.device)
        self.memory = memory
        self._rows, self._keeps_graphs = self._plan()
        self._graphs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._shared: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.params)

    @property
    def n_params(self) -> int:
        """Weights of one model, d."""
        return self.network.n_params

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.params.device

    def select(self, index: Tensor) -> Engine:
        """Return an engine of some of the models, int64 `[n]`; each keeps its random stream."""
        buffers = {name: buffer[index] for name, buffer in self.buffers.items()}
        batches = [batch.select(index) for batch in self.batches]
        return Engine(self.network, self.params[index], buffers, batches, self.keys[index], memory=self.memory)

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what an earlier measure of this engine has made under a key, making it if none has."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def scale(self, metric: Metric) -> Tensor:
        """Return the metric's diagonal D at the trained weights, float64 `[K, d]`."""
        made: Tensor = self.shared(("scale", metric), lambda: scale(self.network, self.params, metric))
        return made

    @torch.no_grad()
    def losses(self, params: Tensor | None = None, active: Tensor | None = None) -> Tensor:
        """Return the mean training loss of every model in nats, float64 `[K]`.

        Args:
            params: Weights `[K, d]`; the trained ones by default.
            active: bool `[K]`, the models to evaluate; the rest get NaN.
        """
        points = self.params if params is None else params.to(self.params.dtype)
        result = self._undefined(len(self))
        for index in torch.split(self._chosen(active), self._rows):
            result[index] = self._mean_loss(points[index], index)
        return result

    @torch.no_grad()
    def losses_at(self, displacements: Tensor, active: Tensor | None = None) -> Tensor:
        """Return the mean training losses at displaced weights w + displacement, float64 `[S, K]`.

        Args:
            displacements: `[S, K, d]`, S displacements of every model.
            active: bool `[K]`, the models to evaluate; the rest get NaN.
        """
        models = self._chosen(active)
        result = self._undefined(len(displacements), len(self))
        at_once = max(1, self._rows // max(1, len(models)))
        for index in torch.split(models, self._rows):
            for first in range(0, len(displacements), at_once):
                moves = displacements[first : first + at_once, index]
                points = (self.params[index] + moves.double()).to(self.params.dtype)
                losses = self._mean_loss(points.flatten(0, 1), index.repeat(len(moves)))
                result[first : first + at_once, index] = losses.reshape(len(moves), len(index))
        return result

    def gradient(self) -> Tensor:
        """Return the gradient of every model's mean training loss at its weights, float64 `[K, d]`."""
        made: Tensor = self.shared("gradient", self._gradient)
        return made

    def hvp(self, v: Tensor, active: Tensor | None = None) -> Tensor:
        """Return the Hessian of every model's mean training loss times a vector, float64 `[K, d]`.

        Args:
            v: One vector per model, `[K, d]`.
            active: bool `[K]`, the models whose products are needed; the rest get anything finite.
        """
        return self.hvps(v.unsqueeze(0), active)[0]

    def hvps(self, vectors: Tensor, active: Tensor | None = None) -> Tensor:
        """Return Hessian-vector products for S vectors per model, float64 `[S, K, d]`.

        Exact, reverse over reverse: differences of gradients would be wrong at the kinks of ReLU networks at
        any step. Batches are the outer loop, so that a graph that cannot be kept is built once for all S.

        Args:
            vectors: `[S, K, d]`.
            active: bool `[K]`, the models whose products are needed; the rest get anything finite.
        """
        narrow = vectors.to(self.params.dtype)
        result = torch.zeros(vectors.shape, dtype=torch.float64, device=self.device)
        for first in self._starts(active):
            rows = slice(first, first + self._rows)
            for number in range(len(self.batches)):
                at, grad = self._graph(first, number)
                if not grad.requires_grad:
                    continue
                for s in range(len(vectors)):
                    (product,) = torch.autograd.grad(grad, at, narrow[s, rows], retain_graph=True)
                    result[s, rows] += product
        return result

    def vectors(self, kind: Literal["normal", "rademacher"], stream: str, first: int, count: int) -> Tensor:
        """Return random vectors, float64 `[count, K, d]`: numbers `first`, `first + 1`, ... of a stream.

        A vector is a function of the model's key, the stream's name and its number alone. Measures that name
        the same stream share their vectors, so their values are paired.
        """
        source = normal if kind == "normal" else rademacher
        tag = self.keys ^ stream_key(stream)
        keys = torch.cat([Streams(tag, step).keys for step in range(first, first + count)])
        drawn: Tensor = vmap(lambda key: source(key, (self.n_params,)))(keys)
        return drawn.reshape(count, len(self), self.n_params)

    def portions(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Cut `count` vectors per model, from number `first` on, into (first, count) that fit in memory."""
        room = _VECTOR_BYTES.get(self.device.type, _DEVICE_BYTES)
        most = max(1, room // (8 * len(self) * self.n_params))
        for start in range(first, first + count, most):
            yield start, min(most, first + count - start)

    def _plan(self) -> tuple[int, bool]:
        """Return how many models go through the network at once, and whether all graphs fit in memory."""
        per_example = self._activations() * self.params.element_size()
        largest = max(batch.y.shape[1] for batch in self.batches)
        room = _ACTIVATION_BYTES.get(self.device.type, _DEVICE_BYTES)
        everything = len(self) * self.n_examples * per_example * _SAVED_PER_ACTIVATION
        return max(1, int(room // (largest * per_example))), everything <= self.memory

    def _activations(self) -> int:
        """Return how many numbers the modules of the network put out for one example."""
        module, count = copy.deepcopy(self.network.template).eval(), 0

        def add(_module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal count
            count += output.numel() if isinstance(output, Tensor) else 0

        for part in module.modules():
            if not list(part.children()):
                part.register_forward_hook(add)
        first = self.batches[0]
        x, weight = (first.x if first.shared else first.x[0])[:1], next(module.parameters())
        with torch.no_grad():
            module(x.to(weight.device, weight.dtype) if x.is_floating_point() else x.to(weight.device))
        return max(1, count)

    def _chosen(self, active: Tensor | None) -> Tensor:
        every = torch.arange(len(self), device=self.device)
        return every if active is None else every[active.to(self.device)]

    def _starts(self, active: Tensor | None) -> Iterator[int]:
        """Yield the first model of each group that holds an active one; groups are fixed, as graphs are."""
        for first in range(0, len(self), self._rows):
            if active is None or bool(active[first : first + self._rows].any()):
                yield first

    def _undefined(self, *shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=torch.float64, device=self.device)

    def _sum_of_losses(self, points: Tensor, index: Tensor, batch: Batch) -> Tensor:
        own = batch.select(index)
        buffers = {name: buffer[index] for name, buffer in self.buffers.items()}
        return cross_entropy(self.network.logits(points, buffers, own), own.y).double().sum(dim=1)

    def _mean_loss(self, points: Tensor, index: Tensor) -> Tensor:
        total = torch.zeros(len(index), dtype=torch.float64, device=self.device)
        for batch in self.batches:
            total += self._sum_of_losses(points, index, batch)
        return total / self.n_examples

    def _graph(self, first: int, number: int) -> tuple[Tensor, Tensor]:
        """Return weights and the differentiable gradient there: of one group of models, one batch's share."""
        if (first, number) in self._graphs:
            return self._graphs[first, number]
        with torch.enable_grad():
            at = self.params[first : first + self._rows].clone().requires_grad_()
            index = torch.arange(first, first + len(at), device=self.device)
            losses = self._sum_of_losses(at, index, self.batches[number]) / self.n_examples
            (grad,) = torch.autograd.grad(losses.sum(), at, create_graph=True)
        if self._keeps_graphs:
            self._graphs[first, number] = (at, grad)
        return at, grad

    def _gradient(self) -> Tensor:
        result = torch.zeros(self.params.shape, dtype=torch.float64, device=self.device)
        for first in self._starts(None):
            for number in range(len(self.batches)):
                result[first : first + self._rows] += self._graph(first, number)[1].detach()
        return result


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
