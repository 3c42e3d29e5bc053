"""The passes through the network of one training step: what answers a gradient rule's questions."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.optimizers.interface import Ask, Evaluation, averaged
from flatmin.stack import Batch, StackedNetwork, Streams
from flatmin.trainables.data import Split

_SIDE_BY_SIDE_BYTES = 2**28
"""Weights of micro-batches that may share one pass; larger ones go through one after another."""


class Passes:
    """The batches of one step of K models, and what the passes over them leave behind.

    Args:
        network: The network.
        split: The training set.
        batches: The examples of each of the step's batches, `[K, b]`.
        buffers: Stacked buffers in front of the step; left as they are.
        bn_updates: Which passes update them: `once`, `all` or `none` (see the setting).
        streams: Maps a batch to what dropout draws from, the same in every pass over it.
        autocast: Makes the context in which losses are computed.

    Attributes:
        buffers: The buffers as the passes so far have left them.
    """

    def __init__(
        self,
        network: StackedNetwork,
        split: Split,
        batches: list[Tensor],
        buffers: dict[str, Tensor],
        bn_updates: str,
        streams: Callable[[int], Streams],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.network, self.split, self.batches = network, split, batches
        self.buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        self.bn_updates, self.streams, self.autocast = bn_updates, streams, autocast
        self._shares = [float(batch.shape[1]) for batch in batches]
        self._seen: set[int] = set()

    def answer(self, ask: Ask) -> Evaluation:
        """Return the mean losses and gradients over the batches that a rule asks for."""
        if len(ask.batches) > 1 and not ask.hessian and self._fit_side_by_side(ask):
            return self._evaluate_side_by_side(ask)
        return averaged(ask, self._shares, lambda batch: self._evaluate(ask, batch))

    def _evaluate(self, ask: Ask, batch: int) -> Evaluation:
        leaf = ask.at(batch).detach().requires_grad_()
        examples = self.split.gather(self.batches[batch])
        copies = {name: buffer.clone() for name, buffer in self.buffers.items()}
        buffers = self.buffers if self._moves(batch) else copies
        with self.autocast():
            losses = self.network.losses(leaf, buffers, examples, train=True, streams=self.streams(batch))
        (grad,) = torch.autograd.grad(losses.sum(), leaf, create_graph=ask.hessian)
        if not ask.hessian:
            return Evaluation(losses.detach(), grad)

        def hvp(v: Tensor) -> Tensor:
            if not grad.requires_grad:
                return torch.zeros_like(v)
            product: Tensor = torch.autograd.grad(grad, leaf, v, retain_graph=True)[0]
            return product

        return Evaluation(losses.detach(), grad.detach(), hvp)

    def _fit_side_by_side(self, ask: Ask) -> bool:
        """Whether batches can share one pass: of one size, stacked, and with statistics that can be put in order."""
        first = self.batches[ask.batches[0]]
        alike = len({self.batches[batch].shape for batch in ask.batches}) == 1
        room = 4 * self.network.n_params * len(first) * len(ask.batches) <= _SIDE_BY_SIDE_BYTES
        return alike and room and not self.network.loops(first.device) and set(self.buffers) <= set(self._momenta())

    def _evaluate_side_by_side(self, ask: Ask) -> Evaluation:
        """Evaluate several batches, each at its own weights, as one stack of all of them."""
        count = len(ask.batches)
        leaf = torch.cat([ask.at(batch) for batch in ask.batches]).detach().requires_grad_()
        gathered = [self.split.gather(self.batches[batch]) for batch in ask.batches]
        examples = Batch(torch.cat([own.x for own in gathered]), torch.cat([own.y for own in gathered]))
        streams = Streams.joined([self.streams(batch) for batch in ask.batches])
        buffers = {name: buffer.repeat(count, *[1] * (buffer.dim() - 1)) for name, buffer in self.buffers.items()}
        with self.autocast():
            losses = self.network.losses(leaf, buffers, examples, train=True, streams=streams)
        (grad,) = torch.autograd.grad(losses.sum() / count, leaf)
        moving = [place for place, batch in enumerate(ask.batches) if self._moves(batch)]
        for name, momentum in self._momenta().items():
            start, after = self.buffers[name], buffers[name].reshape(count, *self.buffers[name].shape)
            for place in moving:
                # each batch moved a copy of the start; in order, it also pulls back what the ones before had changed
                before = self.buffers[name]
                pull = momentum * (before - start) if before.is_floating_point() else torch.zeros_like(before)
                self.buffers[name] = before + (after[place] - start) - pull
        mean = losses.detach().reshape(count, -1).mean(dim=0)
        return Evaluation(mean, grad.reshape(count, len(mean), -1).sum(dim=0))

    def _moves(self, batch: int) -> bool:
        """Return whether the pass over a batch that comes next updates the running statistics."""
        moves = self.bn_updates == "all" or (self.bn_updates == "once" and batch not in self._seen)
        self._seen.add(batch)
        return moves

    def _momenta(self) -> dict[str, float]:
        """Return the momentum of every running statistic that is an exponential mean, by the name of its buffer."""
        return {
            f"{path}.{name}" if path else name: module.momentum
            for path, module in self.network.template.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is not None
            for name, _ in module.named_buffers(recurse=False)
        }
