"""What a base update and a gradient rule are, and how a rule asks for losses and gradients.

A rule is a generator: it asks for the gradient at some weights, is sent the answer, asks again or returns. So the
same lines serve the stacked trainer, which answers for K models at once, and `TorchOptimizer`, which answers
through a closure, or through the gradients that somebody's loop has left between `first_step` and `second_step`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from flatmin.stack import Streams, normal, rademacher, uniform

Returned = TypeVar("Returned")

State = Mapping[str, Tensor]
"""Tensors whose first axis is the model, so that a stack can be split, shrunk, frozen and saved by rows: `[K, d]`, or
`[K, 1]` for one number per model."""

HessianProduct = Callable[[Tensor], Tensor]
"""Maps vectors `[K, d]` to Hessian-vector products `[K, d]`, at the weights and examples of a gradient."""


@dataclass
class Evaluation:
    """Losses and gradients of K models.

    Attributes:
        losses: `[K]`.
        grad: `[K, d]`. Released when the rule asks its next question, so that a second pass through the network does
            not hold the gradient of the first: a rule that needs it for longer binds it to a name.
        hvp: Products with the Hessian of the same function, where the question asked for them.
    """

    losses: Tensor
    grad: Tensor
    hvp: HessianProduct | None = None


@dataclass(frozen=True)
class Ask:
    """A rule's question: the mean loss and gradient over some of the step's batches.

    Attributes:
        at: Maps the number of a batch to the weights `[K, d]` at which it is evaluated.
        batches: The numbers of the batches. Each weighs as many examples as it has.
        hessian: Whether Hessian-vector products are needed too.
    """

    at: Callable[[int], Tensor]
    batches: Sequence[int] = (0,)
    hessian: bool = False


def at(params: Tensor, *, batch: int = 0, hessian: bool = False) -> Ask:
    """Return the question for one batch at given weights `[K, d]`."""
    return Ask(lambda _: params, (batch,), hessian)


@dataclass(frozen=True)
class Step:
    """What a rule and a base know of the step they take, beside weights and gradients.

    Attributes:
        count: Steps done before this one.
        total: Steps of the whole training, `[K, 1]` or a number; None where nobody knows.
        lr_factor: The schedule's factor of the learning rate, `[K, 1]` or a number.
        batches: Batches that this step has; the last step of an epoch may have fewer than the rule takes.
        hessian: Whether the base needs Hessian-vector products in this step.
        streams: The random streams of this step.
        shapes: The shapes of the parameters that the columns of the weights `[K, d]` hold, in order.
        dtype: The type of random vectors.
    """

    count: int
    total: Tensor | float | None
    lr_factor: Tensor | float
    batches: int
    hessian: bool
    streams: Streams
    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype = torch.float32

    def normal(self, stream: str, number: int = 0) -> Tensor:
        """Return standard normal vectors `[K, d]`, the numbered draw of a stream in this step."""
        return self._draw(normal, stream, number)

    def uniform(self, stream: str, number: int = 0) -> Tensor:
        """Return vectors `[K, d]` uniform on [0, 1)."""
        return self._draw(uniform, stream, number)

    def rademacher(self, stream: str, number: int = 0) -> Tensor:
        """Return vectors `[K, d]` of -1 and 1."""
        return self._draw(rademacher, stream, number)

    def _draw(self, source: Callable[..., Tensor], stream: str, number: int) -> Tensor:
        keys = self.streams.keys_of(stream, number)
        size = (sum(torch.Size(shape).numel() for shape in self.shapes),)
        if len(keys) == 1:
            return source(keys[0], size, dtype=self.dtype)[None]
        drawn: Tensor = vmap(lambda key: source(key, size, dtype=self.dtype))(keys)
        return drawn


Gradient = Generator[Ask, Evaluation, tuple[Evaluation, State]]
"""A rule at work: it yields questions and returns the gradient that the base will use, with the rule's new state.
The losses it returns are those at the first weights it asked for."""


class Rule(ABC):
    """A gradient rule: at which weights and on which batches the gradient is taken.

    Attributes:
        splits: Whether a step's batches are micro-batches, which share `batch_size` examples; else each has that many.
        passes: How many gradients are taken on each example of a step.
    """

    splits: ClassVar[bool] = False
    passes: ClassVar[int] = 1

    @property
    def batches(self) -> int:
        """The batches that a step takes."""
        return 1

    def init(self, params: Tensor) -> State:
        """Return the state before the first step for weights `[K, d]`."""
        return {}

    @abstractmethod
    def gradient(self, params: Tensor, state: State, step: Step) -> Gradient:
        """Ask for what is needed and return the gradient that the base will use; arguments are left as they are.

        The last question passes `step.hessian` on, and what it returns carries the products that it was answered with.

        Args:
            params: Weights `[K, d]`, in front of the step.
            state: The state from `init` or from the step before.
            step: The rest.
        """


class FirstOrderRule(Rule):
    """A rule whose gradient is of a function that has no Hessian-vector products: no second-order base goes with it."""


class Base(Protocol):
    """A base update: what is done with a gradient."""

    def init(self, params: Tensor) -> State:
        """Return the state before the first step for weights `[K, d]`."""

    def update(self, params: Tensor, found: Evaluation, state: State, step: Step) -> tuple[Tensor, State]:
        """Return new weights `[K, d]` and state; the arguments are left as they are.

        Args:
            params: Weights `[K, d]`, in front of the step: momentum and weight decay act here.
            found: What the rule returned.
            state: The state from `init` or from the step before.
            step: The rest.
        """


class SecondOrderBase(Base, Protocol):
    """A base update that also multiplies vectors by the Hessian of the function whose gradient it is given."""

    @property
    def products(self) -> float:
        """Hessian-vector products of a step, on average over steps."""

    def needs_hessian(self, count: int) -> bool:
        """Return whether the step that follows `count` others takes Hessian-vector products."""


def answered(rule: Generator[Ask, Evaluation, Returned], answer: Callable[[Ask], Evaluation]) -> Returned:
    """Return what a rule returns, answering each of its questions."""
    ask = next(rule)
    while True:
        found = answer(ask)
        # the answer is outside of this: a StopIteration of its own is not the end of the rule
        try:
            ask = rule.send(found)
        except StopIteration as end:
            returned: Returned = end.value
            return returned
        del found.grad


def averaged(ask: Ask, shares: Sequence[float], evaluate: Callable[[int], Evaluation]) -> Evaluation:
    """Return the mean over the batches that a rule asks for, of what `evaluate` finds on each of them.

    Args:
        ask: The question.
        shares: The share of the step's examples that each of its batches has.
        evaluate: Maps the number of a batch to what is found there.
    """
    if len(ask.batches) == 1:
        return evaluate(ask.batches[0])
    whole = sum(shares[batch] for batch in ask.batches)
    products: list[tuple[float, HessianProduct]] = []
    losses: Tensor | float = 0.0
    grad: Tensor | float = 0.0
    for batch in ask.batches:
        share = shares[batch] / whole
        found = evaluate(batch)
        losses = losses + share * found.losses
        grad = grad.add_(found.grad, alpha=share) if isinstance(grad, Tensor) else share * found.grad
        if found.hvp is not None:
            products.append((share, found.hvp))
        del found.grad  # the next batch is evaluated without it
    assert isinstance(losses, Tensor) and isinstance(grad, Tensor)

    def hvp(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        for share, product in products:
            total += share * product(v)
        return total

    return Evaluation(losses, grad, hvp if ask.hessian else None)
