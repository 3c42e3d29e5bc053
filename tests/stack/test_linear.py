"""Linear layers taken as W x^T: torch's own outputs and derivatives, and gradients that lie as the weights do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional

from flatmin.stack.linear import weights_first


def derivatives(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs, the gradient of a function of them, and a Hessian-vector product, of K layers."""
    leaf = weight.clone().requires_grad_()
    outputs = vmap(functional.linear)(x, leaf, bias) if bias is not None else vmap(functional.linear)(x, leaf)
    (grad,) = torch.autograd.grad(outputs.tanh().square().sum(), leaf, create_graph=True)
    (product,) = torch.autograd.grad((grad * torch.arange(grad.numel()).reshape(grad.shape)).sum(), leaf)
    return outputs, grad, product


@pytest.mark.parametrize("biased", [True, False])
def test_outputs_and_derivatives_are_those_of_torch(biased: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    x, weight, bias = (torch.randn(*shape, generator=generator).double() for shape in ((3, 7, 5), (3, 6, 5), (3, 6)))
    expected = derivatives(x, weight, bias if biased else None)
    with weights_first(x):
        found = derivatives(x, weight, bias if biased else None)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert found[1].is_contiguous()
    assert not expected[1].is_contiguous(), "torch gives it as W^T lies; if it no longer does, this is not needed"


@pytest.mark.parametrize("shape", [(5,), (2, 7, 5)])
def test_other_inputs_are_left_to_torch(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(6, 5), torch.randn(6)
    with weights_first(x):
        found = functional.linear(x, weight, bias)
    assert torch.equal(found, functional.linear(x, weight, bias))
