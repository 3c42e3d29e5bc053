"""Shake-Shake: what is drawn, forward, backward and twice backward, and in a stack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from flatmin.stack import Batch, StackedNetwork, Streams
from flatmin.stack.streams import draws_from, layer_uniform
from flatmin.trainables.networks.shake_shake import shake, shake_shake

KEY = torch.tensor(11)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(key: Tensor, examples: int) -> tuple[Tensor, Tensor]:
    """Return the alpha and beta of a pass's first block."""
    alpha, beta = (layer_uniform(key, call, (examples, 1, 1, 1)) for call in (1, 2))
    return alpha, beta


def test_paths_are_mixed_with_alpha_and_their_gradients_with_beta() -> None:
    a, b, g = (normal(6, 3, 2, 2, seed=seed) for seed in range(3))
    a, b = a.requires_grad_(), b.requires_grad_()
    with draws_from(KEY):
        mixed = shake(a, b)
    alpha, beta = drawn(KEY, 6)
    torch.testing.assert_close(mixed, alpha * a + (1 - alpha) * b, rtol=0, atol=1e-14)
    to_a, to_b = torch.autograd.grad(mixed, (a, b), g)
    torch.testing.assert_close(to_a, beta * g, rtol=0, atol=1e-14)
    torch.testing.assert_close(to_b, (1 - beta) * g, rtol=0, atol=1e-14)


def test_alpha_and_beta_are_uniform_and_independent_for_every_image() -> None:
    a, b = torch.ones(4000, 1, 1, 1, dtype=torch.float64, requires_grad=True), torch.zeros(4000, 1, 1, 1)
    with draws_from(KEY):
        alpha = shake(a, b)
    (beta,) = torch.autograd.grad(alpha.sum(), a)
    for number in (alpha, beta):
        assert stats.kstest(number.detach().flatten().numpy(), "uniform").pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack([alpha.detach().flatten(), beta.flatten()]))[0, 1])) < 0.05


def test_in_eval_mode_nothing_shakes() -> None:
    with torch.random.fork_rng():
        network: Any = shake_shake((1, 8, 8), 3, depth=8, width=4).double().eval()
        before = torch.get_rng_state()
        x = normal(4, 1, 8, 8)
        assert torch.equal(network(x), network(x))
        assert torch.equal(torch.get_rng_state(), before)
        block = network[2]
        h = network[1](network[0](x))
        half = (block.first(h) + block.second(h)) / 2
    torch.testing.assert_close(block(h), block.shortcut(h) + half, rtol=0, atol=1e-14)


def test_a_block_is_the_published_one() -> None:
    """Two paths and the shortcut from two images, the second moved by one pixel."""
    with torch.random.fork_rng():
        network: Any = shake_shake((1, 8, 8), 3, depth=8, width=4).double().train()
    block = network[3]
    x = normal(5, 4, 8, 8)
    weights = dict(block.named_parameters())

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.batch_norm(x, None, None, weights[f"{name}.weight"], weights[f"{name}.bias"], training=True)

    def path(name: str) -> Tensor:
        out = functional.conv2d(x.relu(), weights[f"{name}.1.weight"], stride=2, padding=1)
        out = functional.conv2d(norm(out, f"{name}.2").relu(), weights[f"{name}.4.weight"], padding=1)
        return norm(out, f"{name}.5")

    moved = torch.zeros_like(x)
    moved[:, :, :-1, :-1] = x.relu()[:, :, 1:, 1:]
    halves = [
        torch.einsum("bihw,oi->bohw", image[:, :, ::2, ::2], weights[f"shortcut.{name}.weight"][:, :, 0, 0])
        for image, name in ((x.relu(), "straight"), (moved, "shifted"))
    ]
    alpha, _ = drawn(KEY, 5)
    expected = norm(torch.cat(halves, 1), "shortcut.norm") + alpha * path("first") + (1 - alpha) * path("second")
    with draws_from(KEY):
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


def test_the_second_derivative_is_that_of_the_mixture_with_beta_plus_a_constant() -> None:
    """Symmetric; the constant is (alpha - beta)(a - b) at the weights where the derivative is taken."""
    x, w0 = normal(4, 1, 1, 1), torch.tensor([0.7, -0.4], dtype=torch.float64)
    alpha, beta = drawn(KEY, 4)

    def paths(w: Tensor) -> tuple[Tensor, Tensor]:
        return (w[0] * x).sin() + w[1], w[0] * w[1] * x

    def shaken(w: Tensor) -> Tensor:
        with draws_from(KEY):
            return shake(*paths(w)).exp().sum()

    a0, b0 = paths(w0)

    def surrogate(w: Tensor) -> Tensor:
        a, b = paths(w)
        return (beta * a + (1 - beta) * b + (alpha - beta) * (a0 - b0)).exp().sum()

    hessian: Any = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(shaken, w0), hessian(surrogate, w0), rtol=1e-12, atol=0)
    v = torch.tensor([1.0, -2.0], dtype=torch.float64)
    product = torch.func.grad(lambda w: torch.func.grad(shaken)(w) @ v)(w0)
    torch.testing.assert_close(product, hessian(surrogate, w0) @ v, rtol=1e-12, atol=0)


def test_a_module_alone_draws_from_torchs_generator() -> None:
    with torch.random.fork_rng():
        network = shake_shake((1, 8, 8), 3, depth=8, width=4).train()
        x = normal(4, 1, 8, 8).float()
        outputs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outputs.append(network(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


class Shaking(nn.Module):
    """Two linear maps that shake: without BatchNorm, an example does not depend on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return shake(self.first(x), self.second(x))


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_stack_shakes_each_model_and_each_example_by_its_own_stream(vectorize: Any) -> None:
    """Whatever the neighbours; a second pass in the same step shakes alike, and so does a part of the batch."""
    modules = [Shaking().double() for _ in range(3)]
    params, buffers = StackedNetwork.stack(modules)
    network = StackedNetwork(modules[0], vectorize)
    x, y, keys = normal(5, 6), torch.zeros(3, 5, dtype=torch.int64), torch.tensor([4, 9, 2])
    streams = Streams(keys, 7)

    def outputs(rows: list[int], part: slice = slice(None), step: int = 7) -> Tensor:
        own = Streams(keys[rows], step)
        own.first = part.start or 0
        batch = Batch(x[part], y[rows][:, part], shared=True)
        return network.logits(params[rows], buffers, batch, train=True, streams=own)

    whole = outputs([0, 1, 2])
    for k, module in enumerate(modules):
        with draws_from(streams.keys[k]):
            torch.testing.assert_close(whole[k], module(x), rtol=0, atol=1e-14)
    assert torch.equal(outputs([0, 1, 2]), whole)
    torch.testing.assert_close(outputs([2, 0]), whole[[2, 0]], rtol=0, atol=1e-14)
    torch.testing.assert_close(outputs([0, 1, 2], slice(3, 5)), whole[:, 3:5], rtol=0, atol=1e-14)
    assert not torch.isclose(outputs([0, 1, 2], step=8), whole).any()
