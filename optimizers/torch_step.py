"""A step of a `TorchOptimizer` under way: weights displaced and put back, closures run, a rule's questions answered."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.errors import RequestError
from flatmin.optimizers.interface import Ask, Evaluation, State, averaged

Closure = Callable[[], Tensor]
Stepped = tuple[Tensor, Tensor, State]
Stepping = Generator[Ask, Evaluation, Stepped]


class StepUnderWay:
    """One step under way: the parameters, the weights in front of the step, and the generator of the rule.

    Attributes:
        kept: The weights in front of the step, `[1, d]`.
        touched: Which parameters have had a gradient.
        seen: Batches that have been evaluated.
        overflowed: Whether a scaled gradient was not finite.
        counts: The names of the state's tensors with one number per model.
    """

    def __init__(self, name: str, module: nn.Module | None, parameters: list[Tensor], dtype: torch.dtype) -> None:
        if not parameters:
            raise RequestError("no parameter requires a gradient")
        self.name, self.module, self.parameters, self.dtype = name, module, parameters, dtype
        self.sizes = [parameter.numel() for parameter in parameters]
        self.kept = torch.cat([parameter.detach().reshape(-1).to(dtype) for parameter in parameters])[None]
        self.touched = [False] * len(parameters)
        self.seen: set[int] = set()
        self.overflowed = False
        self._displaced = False
        self._statistics: list[Tensor] = []

    def begin(self, stepping: Stepping, state: State, counts: set[str]) -> None:
        """Take the rule's generator, and the state in front of the step."""
        self.stepping, self.state, self.counts = stepping, state, counts

    def answered(self, evaluate: Callable[[int, bool], Evaluation], shares: Sequence[float]) -> Stepped:
        """Return the step's outcome, from what `evaluate(batch, hessian)` finds at the weights of each question.

        The weights of a question about one batch are held once, as the parameters, while the batch is evaluated.
        """
        ask = next(self.stepping)
        while True:
            if len(ask.batches) == 1:
                batch, hessian = ask.batches[0], ask.hessian
                self.move_to(ask.at(batch))
                del ask
                found = evaluate(batch, hessian)
            else:
                found = averaged(ask, shares, partial(self._at_own_weights, ask, evaluate))
            # the closures are outside of this: a StopIteration of theirs is not the end of the step
            try:
                ask = self.stepping.send(found)
            except StopIteration as end:
                stepped: Stepped = end.value
                return stepped
            del found.grad

    def _at_own_weights(self, ask: Ask, evaluate: Callable[[int, bool], Evaluation], batch: int) -> Evaluation:
        self.move_to(ask.at(batch))
        return evaluate(batch, ask.hessian)

    def move_to(self, point: Tensor) -> None:
        """Set the weights to a point `[1, d]`."""
        if point is self.kept and not self._displaced:
            return
        self._displaced = True
        for parameter, piece in zip(self.parameters, torch.split(point[0], self.sizes), strict=True):
            parameter.copy_(piece.view_as(parameter))

    def restore(self) -> None:
        """Set the weights to what they were, bit for bit."""
        if self._displaced:
            self.move_to(self.kept)
            self._displaced = False

    def run(self, closure: Closure) -> Evaluation:
        """Return the loss and gradient of a closure that calls backward."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = closure()
        return Evaluation(_loss(loss), self.gradients())

    def present(self) -> Evaluation:
        """Return the gradients that somebody else's backward has left."""
        nothing = torch.full((1,), torch.nan, device=self.kept.device)
        return Evaluation(nothing, self.gradients())

    def gradients(self) -> Tensor:
        """Return the gradients `[1, d]`, zero for parameters without one."""
        return self._flatten([parameter.grad for parameter in self.parameters], "call backward on the loss first")

    def with_graph(self, closure: Closure, *, hessian: bool) -> Evaluation:
        """Return the loss and gradient of a closure that does not call backward, with Hessian-vector products."""
        for parameter in self.parameters:
            parameter.grad = None
        loss = closure()
        number = _loss(loss)
        if not loss.requires_grad or any(parameter.grad is not None for parameter in self.parameters):
            raise RequestError(f"the closure of '{self.name}' must return the loss without calling backward on it")
        grads = torch.autograd.grad(loss, self.parameters, create_graph=hessian, allow_unused=True)
        used = [(grad, p) for grad, p in zip(grads, self.parameters, strict=True) if grad is not None]
        flat = self._flatten([None if g is None else g.detach() for g in grads], "the loss depends on no parameter")

        def hvp(v: Tensor) -> Tensor:
            pieces = torch.split(v[0], self.sizes)
            curved = [
                (grad, piece.view_as(p).to(grad.dtype))
                for grad, p, piece in zip(grads, self.parameters, pieces, strict=True)
                if grad is not None and grad.requires_grad
            ]
            if not curved:
                return torch.zeros_like(v)
            with torch.enable_grad():
                products = torch.autograd.grad(
                    [grad for grad, _ in curved],
                    self.parameters,
                    [piece for _, piece in curved],
                    retain_graph=True,
                    allow_unused=True,
                )
            return torch.cat(
                [
                    torch.zeros_like(piece) if product is None else product.reshape(-1).to(self.dtype)
                    for product, piece in zip(products, pieces, strict=True)
                ]
            )[None]

        assert used
        return Evaluation(number, flat, hvp if hessian else None)

    @contextmanager
    def statistics_of(self, batch: int, bn_updates: str, *, hessian: bool) -> Iterator[None]:
        """Run a pass over a batch, letting it update running statistics only if `bn_updates` says so.

        Before Hessian-vector products nothing may be changed in place: the end of the step restores then.

        Raises:
            RequestError: They must not be updated, and there is no module to tell them by.
        """
        again = batch in self.seen
        self.seen.add(batch)
        if bn_updates == "all" or (bn_updates == "once" and not again):
            yield
            return
        self.keep_statistics()
        yield
        if not hessian:
            self.restore_statistics()

    def keep_statistics(self) -> None:
        """Remember the module's buffers.

        Raises:
            RequestError: There is no module.
        """
        if self.module is None:
            raise RequestError(
                f"'{self.name}' evaluates a batch again, and from parameters alone it cannot be told whose BatchNorm "
                "statistics to protect: give the module instead of its parameters, or as module=; or "
                "bn_updates='all', which lets every pass update them"
            )
        self._statistics = [buffer.clone() for buffer in self.module.buffers()]

    def restore_statistics(self) -> None:
        """Give the module's buffers the values that were remembered."""
        if self._statistics and self.module is not None:
            for buffer, kept in zip(self.module.buffers(), self._statistics, strict=True):
                buffer.copy_(kept)
        self._statistics = []

    def _flatten(self, grads: Sequence[Tensor | None], otherwise: str) -> Tensor:
        if all(grad is None for grad in grads):
            raise RequestError(f"no parameter has a gradient: {otherwise}")
        if any(grad is not None and grad.is_sparse for grad in grads):
            raise RequestError(f"'{self.name}' takes dense gradients; build the embedding with sparse=False")
        self.touched = [old or grad is not None for old, grad in zip(self.touched, grads, strict=True)]
        return torch.cat(
            [
                torch.zeros(parameter.numel(), dtype=self.dtype, device=parameter.device)
                if grad is None
                else grad.detach().reshape(-1).to(self.dtype)
                for parameter, grad in zip(self.parameters, grads, strict=True)
            ]
        )[None]


def _loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise RequestError(f"a closure returns the loss, a tensor of one number; this one returned {found}")
    return loss.detach().reshape(1)
