"""StackedNetwork: gradients and Hessian-vector products per model, buffers, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from flatmin.stack import Batch, StackedNetwork, Streams


def build(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4)).double()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 10, 2, 6, 6, generator=generator, dtype=torch.float64)
    return Batch(x, torch.randint(0, 4, (3, 10), generator=generator))


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("train", [True, False])
def test_losses_gradients_and_hessian_products_are_each_models_own(batch: Batch, vectorize: Any, train: bool) -> None:
    modules = [build(seed) for seed in range(3)]
    params, buffers = StackedNetwork.stack(modules)
    network = StackedNetwork(modules[0], vectorize)
    leaf = params.clone().requires_grad_()
    v = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    losses = network.losses(leaf, buffers, batch, train=train)
    (grad,) = torch.autograd.grad(losses.sum(), leaf, create_graph=True)
    (product,) = torch.autograd.grad((grad * v).sum(), leaf)
    for k, module in enumerate(modules):
        module.train(train)
        own = list(module.parameters())
        loss = functional.cross_entropy(module(batch.x[k]), batch.y[k])
        grads = torch.autograd.grad(loss, own, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in grads])
        hvp = torch.autograd.grad(flat @ v[k], own)
        torch.testing.assert_close(losses[k], loss, rtol=0, atol=1e-12)
        torch.testing.assert_close(grad[k], flat, rtol=0, atol=1e-12)
        torch.testing.assert_close(product[k], torch.cat([h.reshape(-1) for h in hvp]), rtol=0, atol=1e-12)
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(buffers[name][k], buffer, rtol=0, atol=1e-12)


def test_one_model_that_overflows_leaves_the_others_alone(batch: Batch) -> None:
    params, buffers = StackedNetwork.stack([build(seed) for seed in range(3)])
    network = StackedNetwork(build(0), "vmap")
    broken = params.clone()
    broken[1] = float("nan")
    grads = []
    for weights in (params, broken):
        leaf = weights.clone().requires_grad_()
        losses = network.losses(leaf, {name: b.clone() for name, b in buffers.items()}, batch, train=True)
        grads.append(torch.autograd.grad(losses.sum(), leaf)[0])
    assert torch.equal(grads[0][[0, 2]], grads[1][[0, 2]])


def test_shared_inputs_equal_repeated_ones(batch: Batch) -> None:
    params, buffers = StackedNetwork.stack([build(seed) for seed in range(3)])
    network = StackedNetwork(build(0))
    shared = Batch(batch.x[0], batch.y, shared=True)
    repeated = Batch(batch.x[0].expand(3, *batch.x.shape[1:]), batch.y)
    torch.testing.assert_close(
        network.losses(params, buffers, shared), network.losses(params, buffers, repeated), rtol=0, atol=1e-12
    )


def test_module_is_a_copy_with_the_models_weights_and_buffers(batch: Batch) -> None:
    modules = [build(seed) for seed in range(3)]
    params, buffers = StackedNetwork.stack(modules)
    network = StackedNetwork(modules[0])
    network.losses(params, buffers, batch, train=True)
    single = network.module(params, buffers, 2)
    single.eval()
    torch.testing.assert_close(single(batch.x[2]), network.logits(params, buffers, batch)[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_what_draws_at_random_without_a_stream_is_refused(batch: Batch, vectorize: Any) -> None:
    noisy = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(72, 4)).double()
    params, buffers = StackedNetwork.stack([noisy, noisy])
    network = StackedNetwork(noisy, vectorize)
    two = batch.select(torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="random"):
        network.losses(params, buffers, two, train=True)
    rrelu = nn.Sequential(nn.Flatten(), nn.RReLU(), nn.Linear(72, 4)).double()
    with pytest.raises(RuntimeError, match=r"random|rrelu"):
        StackedNetwork(rrelu, vectorize).losses(
            *StackedNetwork.stack([rrelu, rrelu]), two, train=True, streams=Streams(torch.arange(2))
        )
    assert torch.isfinite(network.losses(params, buffers, two, train=True, streams=Streams(torch.arange(2)))).all()


def test_a_network_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        StackedNetwork(nn.Flatten())
