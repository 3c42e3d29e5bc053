"""The passes through the network of one training step: what answers a gradient rule's questions.

A batch that is too large for the memory goes through in pieces, and several processes take a share of it each; losses,
gradients and Hessian-vector products are sums over them, so they are those of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from flatmin.errors import RequestError
from flatmin.optimizers.interface import Ask, Evaluation, HessianProduct, averaged
from flatmin.stack import Batch, StackedNetwork, Streams
from flatmin.trainables.data import Split
from flatmin.trainables.forward import Forward, Part
from flatmin.trial import Execution

_SIDE_BY_SIDE_BYTES = 2**28
"""Weights of micro-batches that may share one pass; larger ones go through one after another."""

Answer = TypeVar("Answer")


@dataclass
class MicroBatch:
    """The most examples of each model that one pass takes.

    Attributes:
        size: So many; None: a whole batch.
        adapts: Whether it shrinks where memory runs out.
    """

    size: int | None = None
    adapts: bool = False

    @staticmethod
    def of(execution: Execution, network: StackedNetwork) -> MicroBatch:
        """Return what a trial has asked for.

        Raises:
            RequestError: The network has layers to which a part of a batch is not what the whole is.
        """
        asked = execution.micro_batch
        layers = [path for path, module in network.template.named_modules() if _mixes_examples(module)]
        if isinstance(asked, int) and layers:
            raise RequestError(
                f"--micro-batch {asked}: the layer '{layers[0]}' normalises by the examples of a batch, so parts of it "
                "would give other results; lower batch_size, which is a setting, or leave --micro-batch out"
            )
        return MicroBatch(None if asked == "auto" else asked, asked == "auto" and not layers)

    def shrink(self, batch: int) -> bool:
        """Take less after memory ran out on batches of so many examples; return whether there is less to take."""
        if not self.adapts or self.size == 1:
            return False
        self.size = batch if self.size is None else math.ceil(min(self.size, batch) / 2)
        return True


class Passes:
    """The batches of one step of K models, and what the passes over them leave behind.

    Args:
        forward: What goes through the network.
        split: The training set.
        batches: The examples of each of the step's batches, `[K, b]`.
        buffers: Stacked buffers in front of the step; left as they are.
        bn_updates: Which passes update them: `once`, `all` or `none` (see the setting).
        streams: Maps a batch to what dropout draws from, the same in every pass over it.
        smoothing: Each model's label smoothing, `[K]`, or None where there is none.
        micro_batch: How much goes through at once; everything by default.

    Attributes:
        buffers: The buffers as the passes so far have left them.
    """

    def __init__(
        self,
        forward: Forward,
        split: Split,
        batches: list[Tensor],
        buffers: dict[str, Tensor],
        bn_updates: str,
        streams: Callable[[int], Streams],
        smoothing: Tensor | None = None,
        micro_batch: MicroBatch | None = None,
    ) -> None:
        self.forward, self.split, self.batches, self.buffers = forward, split, batches, buffers
        self.bn_updates, self.streams, self.smoothing = bn_updates, streams, smoothing
        self.micro_batch = micro_batch or MicroBatch()
        self._shares = [float(batch.shape[1]) for batch in batches]
        self._seen: set[int] = set()

    def answer(self, ask: Ask) -> Evaluation:
        """Return the mean losses and gradients over the batches that a rule asks for."""
        buffers, seen = self.buffers, set(self._seen)

        def again() -> Evaluation:
            self.buffers, self._seen = buffers, set(seen)
            if len(ask.batches) > 1 and not ask.hessian and self._fit_side_by_side(ask):
                return self._evaluate_side_by_side(ask)
            return averaged(ask, self._shares, lambda batch: self._evaluate(ask, batch))

        return self._within_memory(again)

    def _within_memory(self, work: Callable[[], Answer]) -> Answer:
        """Return what some work returns, done in smaller pieces where memory runs out and that was asked for."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if not self.micro_batch.shrink(max(batch.shape[1] for batch in self.batches)):
                    raise

    def _evaluate(self, ask: Ask, batch: int) -> Evaluation:
        at, before = ask.at(batch).detach(), self.buffers
        pieces, moves, total = self._pieces(batch), self._moves(batch), self._total(batch)
        kept: list[HessianProduct] = []
        losses = grad = None
        for piece in pieces:
            part = self._part(batch, piece, total)
            if ask.hessian and len(pieces) == 1:
                (losses, grad, moved), product = self.forward.with_product(at, self.buffers, part)
                kept.append(product)
            else:
                own, own_grad, moved = self.forward.gradient(at, self.buffers, part)
                losses = own if losses is None else losses + own
                grad = own_grad if grad is None else grad.add_(own_grad)
            self.buffers = moved if moves else before
        assert losses is not None and grad is not None

        def hvp(v: Tensor) -> Tensor:
            pieces = self._pieces(batch)  # there are more of them once a product has run out of memory
            if len(pieces) > 1:
                kept.clear()
            if kept:
                return kept[0](v)
            result = torch.zeros_like(v)
            for piece in pieces:  # made anew for every product: all graphs together are what does not fit
                _, product = self.forward.with_product(at, before, self._part(batch, piece, total))
                result += product(v)
            return result

        ranks = self.forward.ranks
        found = Evaluation(ranks.sum(losses), ranks.sum(grad))
        if ask.hessian:
            found.hvp = lambda v: ranks.sum(self._within_memory(lambda: hvp(v)))
        return found

    def _pieces(self, batch: int) -> list[tuple[int, int]]:
        """Return where the parts of this process's share of a batch start and stop."""
        start, stop = self.forward.ranks.share(self.batches[batch].shape[1])
        size = max(1, stop - start) if self.micro_batch.size is None else self.micro_batch.size
        return [(first, min(first + size, stop)) for first in range(start, max(stop, start + 1), size)]

    def _part(self, batch: int, piece: tuple[int, int], total: Tensor) -> Part:
        start, stop = piece
        examples = self.split.gather(self.batches[batch][:, start:stop])
        return Part(examples, self.streams(batch).starting_at(start), total, self.smoothing)

    def _total(self, batch: int) -> Tensor:
        """Return what all examples of a batch weigh together, `[K]`."""
        order, objective = self.batches[batch], self.forward.objective
        if objective.class_weights is None:
            return torch.full((len(order),), float(order.shape[1]), device=order.device)
        models = torch.arange(len(order), device=order.device)[:, None]
        weights = objective.weights(self.split.y[models, order])
        assert weights is not None
        return weights.sum(dim=1)

    def _fit_side_by_side(self, ask: Ask) -> bool:
        """Whether batches can share one pass: of one size, stacked, and with statistics that can be put in order."""
        network = self.forward.network
        first = self.batches[ask.batches[0]]
        alike = len({self.batches[batch].shape for batch in ask.batches}) == 1
        room = 4 * network.n_params * len(first) * len(ask.batches) <= _SIDE_BY_SIDE_BYTES
        whole = self.micro_batch.size is None and self.forward.ranks.size == 1
        return (
            alike and room and whole and not network.loops(first.device) and set(self.buffers) <= set(self._momenta())
        )

    def _evaluate_side_by_side(self, ask: Ask) -> Evaluation:
        """Evaluate several batches, each at its own weights, as one stack of all of them."""
        count = len(ask.batches)
        at = torch.cat([ask.at(batch) for batch in ask.batches])
        parts = [self._part(batch, (0, self.batches[batch].shape[1]), self._total(batch)) for batch in ask.batches]
        whole = Part(
            Batch(torch.cat([part.batch.x for part in parts]), torch.cat([part.batch.y for part in parts])),
            Streams.joined([part.streams for part in parts]),
            count * torch.cat([part.total for part in parts]),
            None if self.smoothing is None else self.smoothing.repeat(count),
        )
        buffers = {name: buffer.repeat(count, *[1] * (buffer.dim() - 1)) for name, buffer in self.buffers.items()}
        losses, grad, moved = self.forward.gradient(at, buffers, whole)
        moving = [place for place, batch in enumerate(ask.batches) if self._moves(batch)]
        self.buffers = {
            name: self._in_order(name, momentum, moved[name].reshape(count, *self.buffers[name].shape), moving)
            for name, momentum in self._momenta().items()
        }
        k = len(losses) // count
        return Evaluation(losses.reshape(count, k).sum(dim=0), grad.reshape(count, k, -1).sum(dim=0))

    def _in_order(self, name: str, momentum: float, after: Tensor, moving: list[int]) -> Tensor:
        """Return a buffer that several passes have each moved a copy of, `[count, K, ...]`, as if one after another."""
        start = now = self.buffers[name]
        for place in moving:
            # each batch moved a copy of the start; in order, it also pulls back what the ones before had changed
            pull = momentum * (now - start) if now.is_floating_point() else torch.zeros_like(now)
            now = now + (after[place] - start) - pull
        return now

    def _moves(self, batch: int) -> bool:
        """Return whether the pass over a batch that comes next updates the running statistics."""
        moves = self.bn_updates == "all" or (self.bn_updates == "once" and batch not in self._seen)
        self._seen.add(batch)
        return moves

    def _momenta(self) -> dict[str, float]:
        """Return the momentum of every running statistic that is an exponential mean, by the name of its buffer."""
        return {
            f"{path}.{name}" if path else name: module.momentum
            for path, module in self.forward.network.template.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is not None
            for name, _ in module.named_buffers(recurse=False)
        }


def _mixes_examples(module: nn.Module) -> bool:
    """Return whether a layer normalises by the batch, or keeps statistics of it."""
    normalises = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return normalises or (isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats)
