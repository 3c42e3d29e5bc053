"""The engine: the losses of K trained models as functions of their weights.

Everything a measure needs comes from here: whole-set losses at displaced weights, the gradient, exact
Hessian-vector products, functions of the outputs and of their derivatives along a direction, the initial weights and
random vectors. Sums over examples and batches are float64, in a fixed order, and weigh every example alike. Nothing
here changes a weight, a buffer or a generator, and networks are always in eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vmap

from flatmin.errors import FlatminError
from flatmin.sharpness.guards import activations, check_losses, check_network
from flatmin.sharpness.losses import PerExample, cross_entropy
from flatmin.sharpness.metric import Metric, scale
from flatmin.sharpness.sampling import cut, pieces, side_by_side, take
from flatmin.stack import Batch, StackedNetwork, Streams, normal, permutation, rademacher, stream_key

LOSS_PASSES = 1.0
GRADIENT_PASSES = 2.0
PRODUCT_PASSES = 4.0
TANGENT_PASSES = 3.0
"""Costs in passes over the examples: a loss goes through the network once, a gradient there and back, reverse
over reverse there and back twice, and the outputs' derivative along a direction there, back, and there again. A kept
graph makes a product cheaper than that, never dearer."""

_ACTIVATION_BYTES = {"cpu": 4 * 2**20}
_VECTOR_BYTES = {"cpu": 2 * 2**20}
_DEVICE_BYTES = 2**28
"""What goes through at once: on a CPU what stays in its cache, which is worth 1.5x there; elsewhere
plenty."""

_SAVED_PER_ACTIVATION = 8
_LEAST_GRAPH_BYTES = 2**28
_VECTORS_PER_GROUP = 128
_VECTORS_PER_GRAPH, _COPIES = 8, 8
"""Vectors that share a graph which is built anew, and how many tensors as large as they are a caller holds."""

ExampleFunction = Callable[[Tensor, Tensor], Tensor]
"""`function(outputs, targets)` takes outputs `[n, ...]` and targets `[n, ...]` and returns `[n]` or `[n, q]`."""

TangentFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`function(outputs, tangents, targets)`, the tangents in the outputs' shape, returns `[n]`."""


class Engine:
    """K models of one network, seen as K functions from weights to the mean loss over a set of examples.

    Args:
        network: The network they share.
        params: Trained weights `[K, d]`; never changed. Weights of less than fp32 are widened to it.
        buffers: Stacked buffers, each `[K, ...]`; never changed.
        batches: The training set as trained, cut in any way: fixed chunks without augmentation, and
            whose order is the order of the sums. It is read many times.
        keys: Each model's random stream for measures, int64 `[K]`.
        initial: The weights that training started from, `[K, d]`, if they are known.
        no_initial: Why they are not known: what an error says after "the initial weights are needed, ".
        loss: The loss of single examples.
        sets: Other sets of examples by name (`val`, `test`), for measures that are asked of them.
        memory: Bytes that kept graphs and a Krylov basis may take, each.

    Raises:
        ValueError: No examples, or shapes that do not fit together.
        FlatminError: The network or the loss cannot be measured: it is random in eval mode, does not depend on
            the weights, mixes examples, or lies on another device than they do.
    """

    def __init__(
        self,
        network: StackedNetwork,
        params: Tensor,
        buffers: Mapping[str, Tensor],
        batches: Sequence[Batch],
        keys: Tensor,
        *,
        initial: Tensor | None = None,
        no_initial: str = "and were not given",
        loss: PerExample = cross_entropy,
        sets: Mapping[str, Sequence[Batch]] | None = None,
        memory: int = 2**31,
    ) -> None:
        if params.dim() != 2 or params.shape[1] != network.n_params:
            raise ValueError(f"weights must be [K, {network.n_params}], got {tuple(params.shape)}")
        if initial is not None and initial.shape != params.shape:
            raise ValueError(f"initial weights must be {list(params.shape)}, got {tuple(initial.shape)}")
        if keys.shape != params.shape[:1] or keys.dtype != torch.int64:
            raise ValueError(f"keys must be int64 [{len(params)}], got {keys.dtype} {tuple(keys.shape)}")
        self.network = network
        self.params = _widen(params.detach())
        self.buffers = {name: _widen(buffer) for name, buffer in buffers.items()}
        self.keys = keys.to(params.device)
        self.loss = loss
        self.memory = memory
        self._initial = None if initial is None else _widen(initial.detach())
        self._no_initial = no_initial
        self._sets = dict(sets or {})
        self._take_on(batches)
        self.population = self.n_examples
        """Examples in the whole set, of which a subset has `n_examples`."""
        self._check()
        x = batches[0].x if batches[0].shared else batches[0].x[0]
        self._per_example = activations(network.template, x) * self.params.element_size()
        self._begin()

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

    @property
    def is_subset(self) -> bool:
        """Whether the examples are a part of the set, drawn at random."""
        return self.n_examples < self.population

    def select(self, index: Tensor) -> Engine:
        """Return an engine of some of the models, int64 `[n]`; each keeps its random stream."""
        chosen = self._of_rows(index, [batch.select(index) for batch in self.batches])
        chosen._sets = {name: [batch.select(index) for batch in own] for name, own in self._sets.items()}
        return chosen

    def on(self, name: str) -> Engine:
        """Return an engine of the same models on another set of examples; `train` is this one's.

        Raises:
            FlatminError: There is no such set.
        """
        if name == "train":
            return self
        if name not in self._sets:
            raise FlatminError(
                f"there is no '{name}' set to measure on; there are: {', '.join(['train', *self._sets])}"
            )
        other = copy.copy(self)
        other._take_on(self._sets[name])
        other.population = other.n_examples
        other._begin()
        return other

    def with_loss(self, loss: PerExample) -> Engine:
        """Return an engine of the same models with another loss."""
        other = copy.copy(self)
        other.loss = loss
        other._check()
        other._begin()
        return other

    def sample(self, count: int) -> Engine:
        """Return an engine on `count` of the examples, or this one when there are no more.

        They are drawn without replacement by a stream of the model's key, so that every measure of a model sees the
        same ones, and a larger sample holds a smaller one.
        """
        if count >= self.n_examples:
            return self
        tag = stream_key("subset")
        orders = {key: permutation(key ^ tag, self.n_examples)[:count] for key in set(self.keys.tolist())}
        index = torch.stack([orders[key] for key in self.keys.tolist()]).to(self.device)
        size = max(batch.y.shape[1] for batch in self.batches)
        other = copy.copy(self)
        other._take_on([take(self.batches, part, alike=len(orders) == 1) for part in torch.split(index, size, dim=1)])
        other._begin()
        return other

    def groups(self, count: int, wanted: range | None = None) -> Iterator[Engine]:
        """Yield engines on disjoint groups of the examples, `count` groups in all, each of n // count examples.

        An engine holds g groups as g K models, model k of group j in row j K + k: as many at once as their
        Krylov spaces fit in memory.

        Args:
            count: How many groups there are.
            wanted: The consecutive groups that are asked for; all of them by default.
        """
        size, every = self.n_examples // count, torch.arange(len(self), device=self.device)
        numbers = torch.arange(count * size, device=self.device).reshape(count, 1, size).expand(-1, len(self), -1)
        chosen = numbers if wanted is None else numbers[wanted.start : wanted.stop]
        for first, number in pieces(len(chosen), self.memory // (8 * len(self) * self.n_params * _VECTORS_PER_GROUP)):
            each = [take(self.batches, index, alike=True) for index in chosen[first : first + number]]
            yield self._of_rows(every.repeat(number), [side_by_side(each)])

    def initial_weights(self) -> Tensor:
        """Return the weights that training started from, `[K, d]`.

        Raises:
            FlatminError: They are not known.
        """
        if self._initial is None:
            raise FlatminError(f"the initial weights are needed, {self._no_initial}")
        return self._initial

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
        """Return the mean loss of every model (in nats, if it is a cross-entropy), float64 `[K]`.

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
        """Return the mean losses at displaced weights w + displacement, float64 `[S, K]`.

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
        """Return the gradient of every model's mean loss at its weights, float64 `[K, d]`."""
        made: Tensor = self.shared("gradient", self._gradient)
        return made

    def gradient_at(self, displacement: Tensor) -> tuple[Tensor, Tensor]:
        """Return every model's mean loss at w + displacement and its gradient there, float64 `[K]` and `[K, d]`.

        Costs a gradient. Nothing is kept, so that a climb of many steps needs no more memory than one.

        Args:
            displacement: `[K, d]`.
        """
        total = torch.zeros(len(self), dtype=torch.float64, device=self.device)
        result = torch.zeros(self.params.shape, dtype=torch.float64, device=self.device)
        for index in torch.split(self._chosen(None), self._rows):
            at = (self.params[index] + displacement[index].double()).to(self.params.dtype)
            for batch in self.batches:
                with torch.enable_grad():
                    at.requires_grad_()
                    losses = self._sum_of_losses(at, index, batch)
                    (grad,) = torch.autograd.grad(losses.sum(), at)
                total[index] += losses.detach()
                result[index] += grad
        return total / self.n_examples, result / self.n_examples

    def hvp(self, v: Tensor, active: Tensor | None = None) -> Tensor:
        """Return the Hessian of every model's mean loss times a vector, float64 `[K, d]`.

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

    @torch.no_grad()
    def per_example(
        self, function: ExampleFunction, params: Tensor | None = None, active: Tensor | None = None
    ) -> Tensor:
        """Return a function of every example's outputs, float64 `[K, n]` or `[K, n, q]`, in the examples' order.

        Costs a loss. Its mean over the examples is the functional of the set; quantiles are as cheap.

        Args:
            function: Of outputs `[b, ...]` and targets `[b, ...]`; `engine.loss` is one.
            params: Weights `[K, d]`; the trained ones by default.
            active: bool `[K]`, the models to evaluate; the rest get NaN.
        """
        points = self.params if params is None else params.to(self.params.dtype)
        groups = torch.split(self._chosen(active), self._rows)
        parts = [
            [self._function_of(function, points[index], index, batch) for batch in self.batches] for index in groups
        ]
        rows = [torch.cat(part, dim=1) for part in parts]
        result = self._undefined(len(self), self.n_examples, *(rows[0].shape[2:] if rows else ()))
        for index, row in zip(groups, rows, strict=True):
            result[index] = row
        return result

    def per_example_along(self, vectors: Tensor, function: TangentFunction, active: Tensor | None = None) -> Tensor:
        """Return a function of every example's outputs and their derivative J v along a direction, `[S, K, n]`.

        J v is exact: the derivative with respect to u of (J^T u) . v, by two reverse passes, of which the first
        is shared by all S. So v^T F v of a Fisher matrix F is a mean over examples without any example's gradient.

        Args:
            vectors: Directions `[S, K, d]` in the weights.
            function: Of outputs, tangents and targets, each `[b, ...]`.
            active: bool `[K]`, the models to evaluate; the rest get NaN.
        """
        narrow = vectors.to(self.params.dtype)
        result = self._undefined(len(vectors), len(self), self.n_examples)
        for index in torch.split(self._chosen(active), self._rows):
            start = 0
            for batch in self.batches:
                own = batch.select(index)
                stop = start + own.y.shape[1]
                outputs, pulled, u = self._pullback(index, own)
                for s in range(len(vectors)):
                    (tangents,) = torch.autograd.grad(pulled, u, narrow[s, index], retain_graph=True)
                    flat = (part.flatten(0, 1) for part in (outputs, tangents, own.y))
                    result[s, index, start:stop] = function(*flat).detach().double().reshape(own.y.shape[:2])
                start = stop
        return result

    def slopes(self, vectors: Tensor, active: Tensor | None = None) -> Tensor:
        """Return the derivative of every example's loss along directions, g_i . v, float64 `[S, K, n]`.

        Args:
            vectors: Directions `[S, K, d]` in the weights.
            active: bool `[K]`, the models to evaluate; the rest get NaN.
        """

        def slope(outputs: Tensor, tangents: Tensor, targets: Tensor) -> Tensor:
            with torch.enable_grad():
                at = outputs.detach().requires_grad_()
                (grad,) = torch.autograd.grad(self.loss(at, targets).sum(), at)
            return (grad * tangents).flatten(1).sum(dim=1)

        return self.per_example_along(vectors, slope, active)

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
        """Cut `count` vectors per model, from number `first` on, into (first, count) that fit in memory.

        Where graphs are not kept, several go together even if they leave the cache: they share a graph in `hvps`.
        """
        room, size = _VECTOR_BYTES.get(self.device.type, _DEVICE_BYTES), 8 * len(self) * self.n_params
        most = max(1, room // size)
        if not self._keeps_graphs:
            most = max(most, min(_VECTORS_PER_GRAPH, self.memory // (_COPIES * size)))
        for start in range(first, first + count, most):
            yield start, min(most, first + count - start)

    def _of_rows(self, index: Tensor, batches: Sequence[Batch]) -> Engine:
        """Return an engine of models `index`, which may repeat, on examples of their own."""
        other = copy.copy(self)
        other.params, other.keys = self.params[index], self.keys[index]
        other.buffers = {name: buffer[index] for name, buffer in self.buffers.items()}
        other._initial = None if self._initial is None else self._initial[index]
        other._sets = {}
        other._take_on(batches)
        other._begin()
        return other

    def _take_on(self, batches: Sequence[Batch]) -> None:
        """Take the examples, widened.

        Raises:
            ValueError: There are none, or not of every model.
            FlatminError: They are on another device than the weights.
        """
        self.n_examples = sum(batch.y.shape[1] for batch in batches)
        if self.n_examples == 0:
            raise ValueError("there are no examples to measure on")
        if any(len(batch.y) != len(self.params) for batch in batches):
            raise ValueError(f"every batch must hold labels of all {len(self.params)} models")
        for tensor in [tensor for batch in batches for tensor in (batch.x, batch.y)]:
            if tensor.device != self.device:
                raise FlatminError(
                    f"examples are on the device '{tensor.device}' and the weights on '{self.device}'; move one of them"
                )
        self.batches = [Batch(_widen(batch.x), batch.y, batch.shared) for batch in batches]

    def _begin(self) -> None:
        """Plan how the examples go through the network, with nothing made yet."""
        most = max(1, int(max(self.memory, _LEAST_GRAPH_BYTES) // (self._per_example * _SAVED_PER_ACTIVATION)))
        self.batches = [part for batch in self.batches for part in cut(batch, most)]
        largest = max(batch.y.shape[1] for batch in self.batches)
        room = _ACTIVATION_BYTES.get(self.device.type, _DEVICE_BYTES)
        self._rows = max(1, int(room // (largest * self._per_example)))
        """How many models go through the network at once."""
        everything = len(self) * self.n_examples * self._per_example * _SAVED_PER_ACTIVATION
        self._keeps_graphs = everything <= self.memory
        self._graphs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._shared: dict[Any, Any] = {}

    def _check(self) -> None:
        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        (batch, *_) = cut(self.batches[0].select(first), 2)

        def losses(at: Tensor) -> tuple[Tensor, Tensor]:
            outputs = self._outputs(at, first, batch)
            return outputs, self._losses(outputs, batch.y)

        check_network(self.network.template)
        check_losses(losses, self.params[:1])

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

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every example, `[K, b]`."""
        losses = self.loss(outputs.flatten(0, 1), targets.flatten(0, 1))
        if losses.shape != (targets.shape[0] * targets.shape[1],):
            raise FlatminError(
                f"the loss must give one number per example: [{targets.shape[0] * targets.shape[1]}], not "
                f"{list(losses.shape)}; see flatmin.sharpness.losses.per_example"
            )
        return losses.reshape(targets.shape[:2])

    def _sum_of_losses(self, points: Tensor, index: Tensor, batch: Batch) -> Tensor:
        own = batch.select(index)
        return self._losses(self._outputs(points, index, own), own.y).double().sum(dim=1)

    def _outputs(self, points: Tensor, index: Tensor, own: Batch) -> Tensor:
        """Return the outputs `[k, b, ...]` of models `index` at some weights, on examples of theirs."""
        return self.network.logits(points, {name: buffer[index] for name, buffer in self.buffers.items()}, own)

    def _function_of(self, function: ExampleFunction, points: Tensor, index: Tensor, batch: Batch) -> Tensor:
        own = batch.select(index)
        values = function(self._outputs(points, index, own).flatten(0, 1), own.y.flatten(0, 1))
        return values.double().reshape(*own.y.shape[:2], *values.shape[1:])

    def _pullback(self, index: Tensor, own: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs, J^T u of them as a function of u, and u, which is zero."""
        with torch.enable_grad():
            at = self.params[index].clone().requires_grad_()
            outputs = self._outputs(at, index, own)
            u = torch.zeros_like(outputs, requires_grad=True)
            (pulled,) = torch.autograd.grad(outputs, at, u, create_graph=True)
        return outputs.detach(), pulled, u

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
