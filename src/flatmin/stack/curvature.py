"""The losses of K models with their gradients and Hessians: recorded by autograd, or written out along a chain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flatmin.stack.chain import Chain
from flatmin.stack.streams import Streams


class Recorded:
    """Derivatives by autograd.

    Args:
        losses: Each model's loss, `[K]`, made with `leaf`.
        leaf: What they are differentiated by, `[K, ...]`.

    Attributes:
        losses: The same, without their history.
        gradient: Their gradients, in the shape of the leaf.
    """

    def __init__(self, losses: Tensor, leaf: Tensor) -> None:
        (self._gradient,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
        self._leaf = leaf
        self.losses, self.gradient = losses.detach(), self._gradient.detach()

    def product(self, v: Tensor) -> Tensor:
        """Return the Hessians of the losses times vectors in the shape of the leaf."""
        if not self._gradient.requires_grad:
            return torch.zeros_like(v)
        with torch.enable_grad():  # v as an argument of grad makes torch load sympy, which takes a second
            along = (self._gradient * v).sum()
        # the gradient may depend on anything but the leaf, such as a parameter of the loss
        (found,) = torch.autograd.grad(along, self._leaf, retain_graph=True, allow_unused=True, materialize_grads=True)
        return found


class AlongChain:
    """Derivatives written out: autograd sees what the losses make of the outputs, and no layer.

    Args:
        chain: The networks.
        params: Weights `[K, d]`.
        x: Examples `[K, b, ...]`.
        losses: Maps outputs `[K, b, classes]` to each model's loss, `[K]`.
        streams: What dropout draws from; None in eval mode.

    Attributes:
        losses: Each model's loss, `[K]`.
        gradient: Their gradients, `[K, d]`.
    """

    def __init__(
        self,
        chain: Chain,
        params: Tensor,
        x: Tensor,
        losses: Callable[[Tensor], Tensor],
        streams: Streams | None = None,
    ) -> None:
        self._chain, self._there = chain, chain.forward(params, x, streams)
        outputs = self._there.outputs.requires_grad_()
        with torch.enable_grad():
            self._of_outputs = Recorded(losses(outputs), outputs)
        self.losses = self._of_outputs.losses
        self.gradient, self._slopes = chain.backward(self._there, self._of_outputs.gradient)

    def product(self, v: Tensor) -> Tensor:
        """Return the Hessians of the losses times vectors, `[K, d]`."""
        return self._chain.product(self._there, self._slopes, self._of_outputs.product, v)

    def diagonal(self) -> Tensor:
        """Return the diagonals of the Hessians of the losses, `[K, d]`; they take a product for each output."""
        return self._chain.diagonal(self._there, self._of_outputs.product)
