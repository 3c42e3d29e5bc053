"""Curvature: Hessians recorded and written out, against dense ones by autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flatmin.stack import StackedNetwork
from flatmin.stack.chain import Chain
from flatmin.stack.curvature import AlongChain, Recorded

K, EXAMPLES, OUTPUTS = 3, 9, 4

LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "one layer": lambda: [nn.Linear(6, OUTPUTS)],
    "no ReLU": lambda: [nn.Linear(6, 5), nn.Linear(5, OUTPUTS, bias=False)],
    "deep": lambda: [nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5, bias=False), nn.ReLU(), nn.Linear(5, OUTPUTS)],
    "dropout": lambda: [nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, OUTPUTS)],
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": lambda outputs, y: functional.cross_entropy(outputs, y.softmax(dim=1)),
    "squared error": functional.mse_loss,
    "huber": functional.huber_loss,
    "linear": lambda outputs, y: (outputs * y).mean(),
    "of one output": lambda outputs, y: outputs[:, 0].square().mean(),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
def test_all_is_the_dense_hessians(
    layers: Callable[[], list[nn.Module]], loss: Callable[[Tensor, Tensor], Tensor], seed: int
) -> None:
    torch.manual_seed(seed)
    modules: list[nn.Module] = [nn.Sequential(*layers()).double().eval() for _ in range(K)]
    chain = Chain.of(modules[0])
    assert chain is not None and chain.n_outputs == OUTPUTS
    x, y = (torch.randn(K, EXAMPLES, size, dtype=torch.float64) for size in (6, OUTPUTS))
    params, _ = StackedNetwork.stack(modules)

    def losses(outputs: Tensor) -> Tensor:
        return torch.stack([loss(*own) for own in zip(outputs, y, strict=True)])

    found = AlongChain(chain, params, x, losses)
    v, diagonal = torch.randn_like(params), found.diagonal()
    products = found.product(v)
    for k, module in enumerate(modules):
        own = list(module.parameters())
        value = loss(module(x[k]), y[k])
        grads = torch.autograd.grad(value, own, create_graph=True, materialize_grads=True)
        flat = torch.cat([(g + 0.0 * weight).reshape(-1) for g, weight in zip(grads, own, strict=True)])
        rows = [torch.autograd.grad(g, own, retain_graph=True, allow_unused=True, materialize_grads=True) for g in flat]
        dense = torch.stack([torch.cat([h.reshape(-1) for h in row]) for row in rows])
        torch.testing.assert_close(found.losses[k], value.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.gradient[k], flat.detach(), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(products[k], dense @ v[k], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(diagonal[k], dense.diagonal(), rtol=1e-10, atol=1e-14)


def test_recorded_products_are_those_of_the_hessian() -> None:
    leaf = torch.randn(K, 5, dtype=torch.float64, requires_grad=True)
    found = Recorded((leaf**3).sum(dim=1) + leaf[:, 0] * leaf[:, 4], leaf)
    v, at = torch.randn(K, 5, dtype=torch.float64), leaf.detach()
    expected = 6 * at * v
    expected[:, 0] += v[:, 4]
    expected[:, 4] += v[:, 0]
    torch.testing.assert_close(found.product(v), expected, rtol=1e-12, atol=0)
    with torch.no_grad():
        assert torch.equal(found.product(v), found.product(v))


def test_a_loss_that_is_linear_but_has_a_parameter_of_its_own_has_no_curvature() -> None:
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    leaf = torch.randn(K, 5, dtype=torch.float64, requires_grad=True)
    v = torch.randn(K, 5, dtype=torch.float64)
    assert torch.equal(Recorded((factor * leaf).sum(dim=1), leaf).product(v), torch.zeros_like(v))
    assert torch.equal(Recorded(leaf.sum(dim=1), leaf).product(v), torch.zeros_like(v))
