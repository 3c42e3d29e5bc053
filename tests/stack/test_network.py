"""StackedNetwork: gradients and Hessian-vector products per model, buffers, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flatmin.errors import RequestError
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


def repeated() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(72, 6), layer, nn.Tanh(), layer, nn.Linear(6, 4))


def tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(72, 6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 4))
    module[3].weight = module[1].weight
    module.append(nn.BatchNorm1d(4)).append(nn.BatchNorm1d(4))
    module[6].running_mean = module[5].running_mean
    return module


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("layers", [repeated, tied])
def test_layers_that_run_twice_and_weights_of_two_layers_are_one(batch: Batch, vectorize: Any, layers: Any) -> None:
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Flatten(), layers()).double().eval() for _ in range(3)]
    params, buffers = StackedNetwork.stack(modules)
    network = StackedNetwork(modules[0], vectorize)
    before = [tensor.clone() for tensor in network.template.state_dict().values()]
    leaf = params.clone().requires_grad_()
    losses = network.losses(leaf, buffers, batch)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    for k, module in enumerate(modules):
        loss = functional.cross_entropy(module(batch.x[k]), batch.y[k])
        grads = torch.autograd.grad(loss, list(module.parameters()))
        torch.testing.assert_close(losses[k], loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad[k], torch.cat([g.reshape(-1) for g in grads]), rtol=1e-10, atol=1e-14)
        copied = network.module(params, buffers, k).eval()
        torch.testing.assert_close(copied(batch.x[k]), module(batch.x[k]), rtol=1e-12, atol=1e-14)
    left = list(network.template.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, left, strict=True)), "nothing stays in the template"


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
    with pytest.raises(RequestError, match="random"):
        network.losses(params, buffers, two, train=True)
    rrelu = nn.Sequential(nn.Flatten(), nn.RReLU(), nn.Linear(72, 4)).double()
    with pytest.raises(RequestError, match=r"random|rrelu"):
        StackedNetwork(rrelu, vectorize).losses(
            *StackedNetwork.stack([rrelu, rrelu]), two, train=True, streams=Streams(torch.arange(2))
        )
    assert torch.isfinite(network.losses(params, buffers, two, train=True, streams=Streams(torch.arange(2)))).all()


def test_a_network_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        StackedNetwork(nn.Flatten())


class Awkward(nn.Module):
    """BatchNorm, and then something that vmap refuses."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.linear, self.how = nn.BatchNorm1d(72), nn.Linear(72, 4), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.flatten(1))
        if self.how == "branches on data":
            return torch.as_tensor(self.linear(x if x.sum() > 0 else 2 * x))
        out = torch.zeros(len(x), 4, dtype=x.dtype)
        out += self.linear(x)
        return out


@pytest.mark.parametrize("how", ["branches on data", "fills a tensor of its own"])
def test_what_vmap_refuses_is_looped_over(batch: Batch, how: str) -> None:
    """And BatchNorm's statistics move once, though vmap came as far as them."""
    modules = [Awkward(how).double() for _ in range(3)]
    params, buffers = StackedNetwork.stack(modules)
    network = StackedNetwork(modules[0])
    for _ in range(2):
        out = network.logits(params, buffers, batch, train=True)
        for k, module in enumerate(modules):
            torch.testing.assert_close(out[k], module(batch.x[k]), rtol=0, atol=1e-12)
            for name, buffer in module.named_buffers():
                torch.testing.assert_close(buffers[name][k], buffer, rtol=0, atol=1e-12)
    with pytest.raises(RequestError, match=r"does not go through torch.func.vmap .*vectorize='loop'"):
        StackedNetwork(modules[0], "vmap").logits(params, buffers, batch, train=True)


class Assigning(nn.Module):
    """Keeps a running mean by assigning a new tensor to its buffer."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(72, dtype=torch.float64))
        self.linear = nn.Linear(72, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * self.linear(x).sum() * x.mean(dim=0)
        return torch.as_tensor(self.linear(x - self.mean))


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_buffer_that_is_assigned_anew_moves_as_in_the_module(batch: Batch, vectorize: Any) -> None:
    modules = [Assigning() for _ in range(3)]
    params, buffers = StackedNetwork.stack(modules)
    network = StackedNetwork(modules[0], vectorize)
    for _ in range(3):
        leaf = params.clone().requires_grad_()
        out = network.logits(leaf, buffers, batch, train=True)
        for k, module in enumerate(modules):
            torch.testing.assert_close(out[k], module(batch.x[k]), rtol=0, atol=1e-12)
            torch.testing.assert_close(buffers["mean"][k], module.mean, rtol=0, atol=1e-12)
            module.mean = module.mean.detach()
        assert not buffers["mean"].requires_grad
    kept = buffers["mean"].clone()
    network.logits(params, buffers, batch)
    assert torch.equal(buffers["mean"], kept)
    assert kept.abs().sum() > 0


class InPlace(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(72, 4).double()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.flatten(1))
        self.mean.mul_(0.9).add_(0.1 * out.mean(0))
        return out - self.mean.detach().clone()


@pytest.mark.parametrize("models", [1, 3])
def test_a_buffer_that_is_changed_in_place_moves_as_in_the_module(batch: Batch, models: int) -> None:
    modules = [InPlace() for _ in range(models)]
    params, buffers = StackedNetwork.stack(modules)
    some = Batch(batch.x[:models], batch.y[:models])
    leaf = params.clone().requires_grad_()
    losses = StackedNetwork(modules[0], "loop").losses(leaf, buffers, some, train=True)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    for k, module in enumerate(modules):
        loss = functional.cross_entropy(module(some.x[k]), some.y[k])
        grads = torch.autograd.grad(loss, list(module.parameters()))
        torch.testing.assert_close(buffers["mean"][k].detach(), module.mean.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(grad[k], torch.cat([g.flatten() for g in grads]), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_layer_is_refused_with_its_name() -> None:
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(4))
    with pytest.raises(RequestError, match=r"'1\.weight' of the network is lazy"):
        StackedNetwork(lazy)
    with pytest.raises(RequestError, match=r"'1\.weight' of the network is lazy"):
        StackedNetwork.stack([lazy])


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_network_that_returns_no_tensor_is_refused(batch: Batch, vectorize: Any) -> None:
    class Pair(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return {"out": super().forward(input.flatten(1))}

    module = Pair(72, 4).double()
    params, buffers = StackedNetwork.stack([module] * 3)
    with pytest.raises(RequestError, match="the network returns dict"):
        StackedNetwork(module, vectorize).logits(params, buffers, batch)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_an_error_of_the_network_itself_comes_through(batch: Batch, vectorize: Any) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(71, 4)).double()
    params, buffers = StackedNetwork.stack([module] * 3)
    with pytest.raises((RuntimeError, RequestError), match=r"71|72"):
        StackedNetwork(module, vectorize).logits(params, buffers, batch)
