"""Chain: derivatives that are written out, against autograd through each model on its own, in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from flatmin.optimizers.interface import HessianProduct
from flatmin.stack import Batch, StackedNetwork, Streams
from flatmin.stack.chain import Chain
from flatmin.stack.streams import dropout_mask
from flatmin.trainables.forward import Forward, Gradient, Part
from flatmin.trainables.ranks import Ranks
from flatmin.trainables.tasks import Objective
from flatmin.trial import Execution

K, EXAMPLES, CLASSES = 3, 9, 4
DROPPED = 0.3
KEYS = torch.tensor([5, 6, 7])


def flat() -> list[nn.Module]:
    return [nn.Linear(6, CLASSES)]


def deep() -> list[nn.Module]:
    hidden = [nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5, bias=False), nn.Linear(5, 5), nn.ReLU()]
    return [nn.Sequential(nn.Flatten(), nn.Sequential(*hidden)), nn.Linear(5, CLASSES)]


def dropped() -> list[nn.Module]:
    hidden = [nn.Linear(6, 8), nn.ReLU(), nn.Dropout(DROPPED), nn.Linear(8, 7), nn.Dropout(DROPPED)]
    return [nn.Flatten(), *hidden, nn.Linear(7, CLASSES)]


def plain_losses(module: nn.Module, part: Part, k: int) -> Tensor:
    """Return the loss of one model on its examples, its layers and dropout applied one by one."""
    h, drawn = part.batch.x[k], 0
    for layer in (layer for layer in module.modules() if not isinstance(layer, nn.Sequential)):
        if isinstance(layer, nn.Dropout):
            drawn += 1
            h = h * dropout_mask(part.streams.keys[k], drawn, h.shape, layer.p, part.streams.first) / (1 - layer.p)
        else:
            h = layer(h)
    smoothing = 0.0 if part.smoothing is None else float(part.smoothing[k])
    return functional.cross_entropy(h, part.batch.y[k], label_smoothing=smoothing)


def examples(seed: int, smoothing: Tensor | None) -> Part:
    torch.manual_seed(seed)
    batch = Batch(torch.randn(K, EXAMPLES, 6, dtype=torch.float64), torch.randint(0, CLASSES, (K, EXAMPLES)))
    return Part(batch, Streams(KEYS, seed), torch.full((K,), float(EXAMPLES)), smoothing)


def answers(modules: list[nn.Module], part: Part) -> tuple[Gradient, Gradient, HessianProduct]:
    network = StackedNetwork(modules[0])
    assert network.chain is not None
    params, _ = StackedNetwork.stack(modules)
    forward = Forward(network, Objective("classification"), "fp64", Execution(), Ranks())
    return forward.gradient(params, {}, part), *forward.with_product(params, {}, part)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("smoothing", [None, torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64)])
@pytest.mark.parametrize("layers", [flat, deep, dropped])
def test_gradients_and_products_are_autograds(
    layers: Callable[[], list[nn.Module]], smoothing: Tensor | None, seed: int
) -> None:
    torch.manual_seed(seed)
    modules: list[nn.Module] = [nn.Sequential(*layers()).double() for _ in range(K)]
    part = examples(seed, smoothing)
    found, again, product = answers(modules, part)
    vectors = torch.randn(2, *found[1].shape, dtype=torch.float64)
    products = [product(v) for v in vectors]
    for k, module in enumerate(modules):
        own = list(module.parameters())
        loss = plain_losses(module, part, k)
        grads = torch.autograd.grad(loss, own, create_graph=True)
        flat_grad = torch.cat([g.reshape(-1) for g in grads])
        for losses, gradient, _ in (found, again):
            torch.testing.assert_close(losses[k], loss.detach(), rtol=1e-12, atol=0)
            torch.testing.assert_close(gradient[k], flat_grad.detach(), rtol=1e-10, atol=1e-14)
        for v, ours in zip(vectors, products, strict=True):
            hvp = torch.autograd.grad(flat_grad @ v[k], own, retain_graph=True)
            torch.testing.assert_close(ours[k], torch.cat([h.reshape(-1) for h in hvp]), rtol=1e-10, atol=1e-14)


def test_a_part_of_a_batch_draws_what_it_draws_in_the_whole() -> None:
    module = nn.Sequential(*dropped()).double()
    params, _ = StackedNetwork.stack([module] * K)
    chain, x = Chain.of(module), examples(0, None).batch.x
    assert chain is not None
    whole = chain.forward(params, x, Streams(KEYS)).outputs
    tail = chain.forward(params, x[:, 4:], Streams(KEYS).starting_at(4)).outputs
    torch.testing.assert_close(tail, whole[:, 4:], rtol=1e-12, atol=0)


def test_evaluations_take_it_too_and_drop_nothing() -> None:
    modules = [nn.Sequential(*dropped()).double() for _ in range(K)]
    params, buffers = StackedNetwork.stack(modules)
    part = examples(1, None)
    network = StackedNetwork(modules[0])
    with torch.no_grad():
        own = network.logits(params, buffers, part.batch)
        shared = network.logits(params, buffers, Batch(part.batch.x[0], part.batch.y, shared=True))
        for k, module in enumerate(modules):
            torch.testing.assert_close(own[k], module.eval()(part.batch.x[k]), rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(shared[k], module(part.batch.x[0]), rtol=1e-12, atol=1e-14)


def test_a_weight_that_is_no_number_makes_its_own_model_so_alone() -> None:
    modules: list[nn.Module] = [nn.Sequential(*deep()).double() for _ in range(K)]
    with torch.no_grad():
        next(modules[1].parameters())[0, 0] = float("nan")
    (losses, gradient, _), _, _ = answers(modules, examples(2, None))
    assert losses.isfinite().tolist() == gradient.isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("classes", [1, CLASSES, 21])
def test_models_that_leave_the_cache_give_the_same_outputs(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    modules = [
        nn.Sequential(nn.Flatten(), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, classes)).double() for _ in range(5)
    ]
    params, _ = StackedNetwork.stack(modules)
    chain, x = Chain.of(modules[0]), torch.randn(4, 2, 3, dtype=torch.float64).expand(5, -1, -1, -1)
    assert chain is not None
    whole = chain.outputs(params, x)
    monkeypatch.setattr("flatmin.stack.chain._CACHED_NUMBERS", 2 * 4 * 9)
    found = chain.outputs(params, x)
    assert torch.equal(found, whole)
    assert (found.stride(1) == 1) == (classes <= 20)
    for k, module in enumerate(modules):
        torch.testing.assert_close(found[k], module(x[k]), rtol=1e-12, atol=1e-14)


class _Shifted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def _frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, CLASSES), nn.ReLU(), nn.Linear(CLASSES, CLASSES))
    module[0].bias.requires_grad_(False)
    return module


def _hooked() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, CLASSES))
    module.register_forward_hook(lambda *_: None)
    return module


def _twice() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer)


def _tied() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    module[2].weight = module[0].weight
    return module


def _pruned() -> nn.Module:
    """A layer whose weight is registered behind its bias, of one input, so that the two have as many numbers."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, CLASSES))
    prune.random_unstructured(module[3], "weight", 0.5)  # type: ignore[no-untyped-call]
    prune.remove(module[3], "weight")  # type: ignore[no-untyped-call]
    return module


def _bent() -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES))
    module[0].forward = MethodType(lambda self, x: nn.Linear.forward(self, x).tanh(), module[0])
    return module


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a subclass": lambda: nn.Sequential(_Shifted(6, CLASSES)),
    "a frozen bias": _frozen,
    "a hook": _hooked,
    "a weight behind its bias": _pruned,
    "a forward of its own": _bent,
    "a layer twice": _twice,
    "tied weights": _tied,
    "another activation": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES)),
    "a ReLU at the end": lambda: nn.Sequential(nn.Linear(6, CLASSES), nn.ReLU()),
    "a ReLU behind dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.ReLU(), nn.Linear(6, CLASSES)),
    "a ReLU first": lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, CLASSES)),
    "flattened later": lambda: nn.Sequential(nn.Linear(6, 6), nn.Flatten(), nn.Linear(6, CLASSES)),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_chain_goes_through_autograd(name: str) -> None:
    torch.manual_seed(0)
    module = OTHERS[name]().double()
    assert Chain.of(module) is None
    params, buffers = StackedNetwork.stack([module])
    batch = examples(0, None).batch
    x = batch.x[:1]
    with torch.no_grad():
        ours: Any = StackedNetwork(module).logits(params, buffers, Batch(x, batch.y[:1]))
        torch.testing.assert_close(ours[0], module.eval()(x[0]), rtol=1e-12, atol=1e-14)


def test_linear_layers_over_more_axes_are_not_for_it() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES)).double()
    params, buffers = StackedNetwork.stack([module] * 2)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        ours = StackedNetwork(module).logits(params, buffers, Batch(x, torch.zeros(2, 3)))
        torch.testing.assert_close(ours, torch.stack([module(own) for own in x]), rtol=1e-12, atol=1e-14)
