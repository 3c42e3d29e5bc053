"""The engine: the losses of K trained models as functions of their weights.

Everything a measure needs comes from here: whole-set losses at displaced weights, the gradient, exact
Hessian-vector products, functions of the outputs and of their derivatives along a direction, the initial weights and
random vectors. Sums over examples and batches are float64, in a fixed order, and weigh every example alike. Nothing
here changes a weight, a buffer or a generator, and networks are always in eval mode.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.pulse import beat
from flatmin.sharpness.evaluations import Evaluations
from flatmin.sharpness.guards import check_losses, check_network, second_derivatives, work
from flatmin.sharpness.jackknife import replicates
from flatmin.sharpness.losses import PerExample, cross_entropy
from flatmin.sharpness.metric import Metric, scale
from flatmin.sharpness.sampling import cut, cut_at, edges, membership, take
from flatmin.stack import Batch, StackedNetwork
from flatmin.stack.curvature import AlongChain, Recorded

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


class Engine(Evaluations):
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
        of_examples: What an earlier engine of the same examples has made of them, which this one adds to.

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
        of_examples: dict[Any, Any] | None = None,
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
        self._of_examples = {} if of_examples is None else of_examples
        self.loss = loss
        check_network(network.template)
        self._check()
        batch = self.batches[0]
        x = batch.x if batch.shared else batch.x[0]
        numbers, self._uses_per_example = work(network.template, x)
        self._per_example = numbers * self.params.element_size()
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
        return self._products(vectors, active, [0] * self._whole, 1, torch.float64)[0]

    def products_by_part(self, vectors: Tensor, active: Tensor | None = None) -> Tensor:
        """Return what each part of the examples adds to `hvps`, in the precision of the weights, `[P, S, K, d]`.

        Args:
            vectors: `[S, K, d]`.
            active: bool `[K]`, the models whose products are needed; the rest get anything finite.
        """
        return self._products(vectors, active, self._part_of_graphed, self.parts, self.params.dtype)

    @property
    def trace_passes(self) -> float:
        """What `trace` costs; infinite of a network that is no chain (`flatmin.stack.chain`)."""
        chain = self.network.chain
        if chain is None or not all(chain.takes(batch.x[None] if batch.shared else batch.x) for batch in self.batches):
            return math.inf
        return GRADIENT_PASSES * (1 + chain.n_outputs)  # each output and its curvature go back through the network

    def trace(self, d: Tensor) -> Tensor:
        """Return the exact traces of D H D of chains.

        A single weight enters the outputs linearly, so that the diagonal of H follows from the losses' second
        derivatives by the outputs.

        Args:
            d: D, `[K, d]`.

        Returns:
            Of all examples and, of a subset, of all but each part, float64 `[1 + P, K]`.
        """
        parts = torch.zeros(max(1, self.parts), len(self), dtype=torch.float64, device=self.device)
        for first in self._starts(None):
            rows = slice(first, first + self._rows)
            for number, part in enumerate(self._part_of_graphed[: self._whole]):
                graph = self._graph(first, number)
                assert isinstance(graph, AlongChain)
                with second_derivatives():
                    parts[part, rows] += (d[rows].square() * graph.diagonal()).sum(dim=1)
        return replicates(parts, self.shares) if self.parts else parts

    def products_of_stratum(self, vectors: Tensor, stratum: int, active: Tensor | None = None) -> Tensor:
        """Return what one stratum of the examples adds to `hvps`, float64 `[S, K, d]`, for its share of their cost.

        Args:
            vectors: `[S, K, d]`.
            stratum: Its number, below `strata`.
            active: bool `[K]`, the models whose products are needed; the rest get anything finite.
        """
        first = 0 if self.parts else self._whole
        slots = [None] * first + [0 if part == stratum else None for part in self._part_of_graphed[first:]]
        return self._products(vectors, active, slots, 1, torch.float64)[0]

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
        self._graphed, self._part_of_graphed = cut_at(self.batches, edges(self.n_examples, max(1, self.parts)))
        """The batches that have a graph each, and the part of the examples that each lies in."""
        self._whole = len(self._graphed)
        """How many of them are all examples; behind them are those of strata, where these are no parts."""
        if self.parts:
            self._members = membership(self.batches, self.parts)
            self.shares = torch.cat(self._members, dim=1).sum(dim=1) / self.n_examples
        self._begin_strata(room)
        everything = len(self) * self.n_examples * self._per_example * _SAVED_PER_ACTIVATION
        self._keeps_graphs = everything <= self.memory
        self._keeps_graphs_of_strata = 2 * everything <= self.memory
        self._graphs: dict[tuple[int, int], Recorded | AlongChain] = {}

    def _begin_strata(self, room: int) -> None:
        """Cut the examples where strata begin; so much fits in at once."""
        if self.strata:
            pieces, numbers = cut_at(self.batches, edges(self.n_examples, self.strata))
            if not self.parts:  # smaller graphs cost more, which products with all examples need not pay
                self._graphed, self._part_of_graphed = self._graphed + pieces, self._part_of_graphed + numbers
            self._of_stratum = [[] for _ in range(self.strata)]
            for piece, number in zip(pieces, numbers, strict=True):
                self._of_stratum[number].append(piece)
            sizes = torch.tensor([sum(batch.y.shape[1] for batch in own) for own in self._of_stratum])
            self.stratum_shares = (sizes.double() / self.n_examples).to(self.device)
            largest = max(batch.y.shape[1] for batch in pieces)
            self._rows_of_stratum = max(1, int(room // (largest * self._per_example)))

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

    def _starts(self, active: Tensor | None) -> Iterator[int]:
        """Yield the first model of each group that holds an active one; groups are fixed, as graphs are."""
        for first in range(0, len(self), self._rows):
            if active is None or bool(active[first : first + self._rows].any()):
                yield first

    def _products(
        self, vectors: Tensor, active: Tensor | None, slots: Sequence[int | None], count: int, dtype: torch.dtype
    ) -> Tensor:
        """Return sums of products `[count, S, K, d]`, each over the graphed batches with its number in `slots`.

        Batches without a number are left out.
        """
        narrow = vectors.to(self.params.dtype)
        result = torch.zeros(count, *vectors.shape, dtype=dtype, device=self.device)
        for first in self._starts(active):
            rows = slice(first, first + self._rows)
            for number, slot in enumerate(slots):
                if slot is None:
                    continue
                graph = self._graph(first, number)
                with second_derivatives():
                    for s in range(len(vectors)):
                        beat()
                        result[slot, s, rows] += graph.product(narrow[s, rows])
        return result

    def _graph(self, first: int, number: int) -> Recorded | AlongChain:
        """Return the derivatives of one group of models, one batch's share."""
        if (first, number) in self._graphs:
            return self._graphs[first, number]
        at = self.params[first : first + self._rows]
        index = torch.arange(first, first + len(at), device=self.device)
        batch = self._graphed[number].select(index)
        made: Recorded | AlongChain
        along = self.network.along_chain(batch, len(at))
        if along is None:
            with torch.enable_grad():
                at = at.clone().requires_grad_()
                outputs = self._outputs(at, index, batch)
                made = Recorded(self._share_of_losses(outputs, batch.y), at)
        else:
            beat()
            chain, x = along
            made = AlongChain(chain, at, x, lambda outputs: self._share_of_losses(outputs, batch.y))
        if self._keeps_graphs if number < self._whole else self._keeps_graphs_of_strata:
            self._graphs[first, number] = made
        return made

    def _share_of_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._losses(outputs, targets).double().sum(dim=1) / self.n_examples

    def _gradient(self) -> Tensor:
        result = torch.zeros(self.params.shape, dtype=torch.float64, device=self.device)
        for first in self._starts(None):
            for number in range(self._whole):
                result[first : first + self._rows] += self._graph(first, number).gradient
        return result
