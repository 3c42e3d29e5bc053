"""Evaluations of K models: losses, functions of single examples' outputs, and their derivatives along a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.pulse import beat
from flatmin.sharpness.guards import second_derivatives
from flatmin.sharpness.jackknife import replicates
from flatmin.sharpness.losses import PerExample
from flatmin.sharpness.models import Models
from flatmin.stack import Batch

ExampleFunction = Callable[[Tensor, Tensor], Tensor]
"""`function(outputs, targets)` takes outputs `[n, ...]` and targets `[n, ...]` and returns `[n]` or `[n, q]`."""

TangentFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`function(outputs, tangents, targets)`, the tangents in the outputs' shape, returns `[n]`."""


class Evaluations(Models):
    """What goes through the network once, or there and back: a part of `flatmin.sharpness.Engine`."""

    loss: PerExample
    shares: Tensor
    """The share of the examples that lies in each part of a subset, float64 `[P]`."""
    stratum_shares: Tensor
    """The share of the examples that lies in each stratum, float64 `[P]`."""
    _rows: int
    _members: list[Tensor]
    _of_stratum: list[list[Batch]]
    _rows_of_stratum: int

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

    @torch.no_grad()
    def losses_of_strata(self, displacements: Tensor, strata: Sequence[int], active: Tensor | None = None) -> Tensor:
        """Return mean losses at displaced weights, each over one stratum of the examples alone, float64 `[S, K]`.

        A loss of every stratum costs what one of all examples does.

        Args:
            displacements: `[S, K, d]`.
            strata: The number of each one's stratum.
            active: bool `[K]`, the models to evaluate; the rest get NaN.
        """
        result = self._undefined(len(displacements), len(self))
        for index in torch.split(self._chosen(active), self._rows_of_stratum):
            for s, stratum in enumerate(strata):
                points = (self.params[index] + displacements[s, index].double()).to(self.params.dtype)
                total = torch.zeros(len(index), dtype=torch.float64, device=self.device)
                for batch in self._of_stratum[stratum]:
                    total += self._sum_of_losses(points, index, batch)
                result[s, index] = total / sum(batch.y.shape[1] for batch in self._of_stratum[stratum])
        return result

    @torch.no_grad()
    def means(self, values: Tensor) -> Tensor:
        """Return the mean of every example's values `[..., n]` over all and over all but each part, `[1 + P, ...]`."""
        if not self.parts:
            return values.mean(dim=-1)[None]
        members = torch.cat(self._members, dim=1)
        return replicates(torch.einsum("pn,...n->p...", members, values) / self.n_examples, self.shares)

    @torch.no_grad()
    def replicates_at(self, displacements: Tensor, active: Tensor | None = None) -> Tensor:
        """Return the mean losses at displaced weights, float64 `[S, 1 + P, K]`: see `replicates`.

        Costs what `losses_at` costs. Of a whole set there is only row 0.

        Args:
            displacements: `[S, K, d]`, S displacements of every model.
            active: bool `[K]`, the models to evaluate; the rest get NaN.
        """
        if not self.parts:
            return self.losses_at(displacements, active)[:, None]
        models = self._chosen(active)
        result = self._undefined(len(displacements), 1 + self.parts, len(self))
        at_once = max(1, self._rows // max(1, len(models)))
        for index in torch.split(models, self._rows):
            for first in range(0, len(displacements), at_once):
                moves = displacements[first : first + at_once, index]
                points = (self.params[index] + moves.double()).to(self.params.dtype).flatten(0, 1)
                many = index.repeat(len(moves))
                sums = torch.zeros(self.parts, len(many), dtype=torch.float64, device=self.device)
                for batch, members in zip(self.batches, self._members, strict=True):
                    sums += members @ self._losses_of(points, many, batch).T
                made = replicates(sums / self.n_examples, self.shares)
                result[first : first + at_once, :, index] = made.reshape(-1, len(moves), len(index)).transpose(0, 1)
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

    def _chosen(self, active: Tensor | None) -> Tensor:
        every = torch.arange(len(self), device=self.device)
        return every if active is None else every[active.to(self.device)]

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

    def _losses_of(self, points: Tensor, index: Tensor, batch: Batch) -> Tensor:
        own = batch.select(index)
        return self._losses(self._outputs(points, index, own), own.y).double()

    def _sum_of_losses(self, points: Tensor, index: Tensor, batch: Batch) -> Tensor:
        return self._losses_of(points, index, batch).sum(dim=1)

    def _outputs(self, points: Tensor, index: Tensor, own: Batch) -> Tensor:
        """Return the outputs `[k, b, ...]` of models `index` at some weights, on examples of theirs."""
        beat()
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
