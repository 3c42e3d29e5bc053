"""What a base update and a gradient rule are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

State = Mapping[str, Tensor]
"""Tensors whose first axis is the model, so that a stack can be split, shrunk, frozen and saved by rows."""

LossAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps weights `[K, d]` to the losses `[K]` of the step's batch and their gradients `[K, d]`."""


class Base(Protocol):
    """A base update: what is done with a gradient."""

    def init(self, params: Tensor) -> State:
        """Return the state before the first step for weights `[K, d]`."""

    def update(self, params: Tensor, grad: Tensor, state: State, lr_factor: Tensor) -> tuple[Tensor, State]:
        """Return new weights `[K, d]` and state; the arguments are left as they are.

        Args:
            params: Weights `[K, d]`.
            grad: The rule's gradient `[K, d]`.
            state: The state from `init` or from the step before.
            lr_factor: The schedule's factor of the learning rate `[K, 1]`.
        """


class Rule(Protocol):
    """A gradient rule: at which weights the gradient is taken."""

    def __call__(self, params: Tensor, loss_and_grad: LossAndGrad) -> tuple[Tensor, Tensor]:
        """Return the losses `[K]` at `params` and the gradient `[K, d]` that the base will use."""
