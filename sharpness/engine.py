"""The engine: the losses of K trained models as functions of their weights.

Everything a measure needs comes from here: whole-set losses at displaced weights, the gradient, exact
Hessian-vector products, functions of the outputs and of their derivatives along a direction, the initial weights and
random vectors. Sums over examples and batches are float64, in a fixed order, and weigh every example alike. Nothing
here changes a weight, a buffer or a generator, and networks are always in eval mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.sharpness.guards import activations, check_losses, check_network, second_derivatives
from flatmin.sharpness.losses import PerExample, cross_entropy
from flatmin.sharpness.metric import Metric, scale
from flatmin.sharpness.models import Models
from flatmin.sharpness.sampling import cut, take
from flatmin.stack import Batch, StackedNetwork

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
_TRIED = 32
"""Examples that a loss is tried on."""

_VECTORS_PER_GRAPH, _COPIES = 8, 8
"""Vectors that share a graph which is built anew, and how many tensors as large as they are a caller holds."""

ExampleFunction = Callable[[Tensor, Tensor], Tensor]
"""`function(outputs, targets)` takes outputs `[n, ...]` and targets `[n, ...]` and returns `[n]` or `[n, q]`."""

TangentFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`function(outputs, tangents, targets)`, the tangents in the outputs' shape, returns `[n]`."""


class Engine(Models):
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
        population: How many examples there are, where the batches are a sample of them; all by default.

    Raises:
        ValueError: No examples, or shapes that do not fit together.
        RequestError: The network or the loss cannot be measured: it is random in eval mode, does not depend on
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
        population: int | None = None,
    ) -> None:
        super().__init__(
            network,
            params,
            buffers,
            batches,
            keys,
            initial=initial,
            no_initial=no_initial,
            sets=sets,
            memory=memory,
            population=population,
        )
        self.loss = loss
        check_network(network.template)
        self._check()
        batch = self.batches[0]
        x = batch.x if batch.shared else batch.x[0]
        self._per_example = activations(network.template, x) * self.params.element_size()
        self._begin()

    def with_loss(self, loss: PerExample) -> Engine:
        """Return an engine of the same models with another loss."""
        other = copy.copy(self)
        other.loss = loss
        other._check()
        other._begin()
        return other

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
                with second_derivatives():
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
                    with second_derivatives():
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

    def _begin(self) -> None:
        """Plan how the examples go through the network, with nothing made yet."""
        super()._begin()
        most = max(1, int(max(self.memory, _LEAST_GRAPH_BYTES) // (self._per_example * _SAVED_PER_ACTIVATION)))
        self.batches = [part for batch in self.batches for part in cut(batch, most)]
        largest = max(batch.y.shape[1] for batch in self.batches)
        room = _ACTIVATION_BYTES.get(self.device.type, _DEVICE_BYTES)
        self._rows = max(1, int(room // (largest * self._per_example)))
        """How many models go through the network at once."""
        everything = len(self) * self.n_examples * self._per_example * _SAVED_PER_ACTIVATION
        self._keeps_graphs = everything <= self.memory
        self._graphs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def _check(self) -> None:
        first = torch.zeros(1, dtype=torch.int64, device=self.device)

        def losses(at: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            outputs = self._outputs(at, first, batch)
            return outputs, self._losses(outputs, batch.y)

        check_losses(losses, self.params[:1], self._some().select(first))

    def _some(self) -> Batch:
        """Return a few examples, two at least where batches can be that large."""
        one, *others = self.batches[:2]
        if one.y.shape[1] == 1 and others and one.x.shape == others[0].x.shape:
            pair = torch.arange(2, device=self.device).expand(len(self), -1)
            return take([one, *others], pair, alike=True)
        return cut(max(self.batches, key=lambda batch: min(2, batch.y.shape[1])), _TRIED)[0]

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
            raise RequestError(
                f"the loss must give one number per example: [{targets.shape[0] * targets.shape[1]}], not "
                f"{list(losses.shape)}; see flatmin.sharpness.losses.per_example"
            )
        if losses.is_complex():
            raise RequestError("the loss is complex, and a minimum is of a real one")
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
