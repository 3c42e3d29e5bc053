"""Types and shapes of weights under `TorchOptimizer`: bf16, groups of different types, tied weights, strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.optimizers.torch_optimizer.conftest import (
    NAMES,
    assert_near,
    backward,
    batch,
    batches_of,
    climb,
    closure_of,
    flat_state,
    loop,
    loss_of,
    mlp,
    of_torch,
    same_bits,
    second_order,
    settings_of,
    through_a_file,
    weights_of,
)
from torch import Tensor, nn
from torch.nn.functional import linear

from flatmin.optimizers import TorchOptimizer


def sgd_by_hand(w: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    state["v"] = 0.9 * state.get("v", torch.zeros_like(w)) + (g + 0.02 * w)
    return w - 0.05 * state["v"]


def adam_by_hand(w: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    g = g + 0.02 * w
    t = int(state.get("t", torch.tensor(0))) + 1
    state["t"] = torch.tensor(t)
    state["m"] = 0.9 * state.get("m", torch.zeros_like(w)) + (1 - 0.9) * g
    state["s"] = 0.999 * state.get("s", torch.zeros_like(w)) + (1 - 0.999) * g * g
    return w - 0.02 * (state["m"] / (1 - 0.9**t)) / ((state["s"] / (1 - 0.999**t)).sqrt() + 1e-8)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_bf16_weights_are_updated_in_fp32_and_rounded_once(name: str) -> None:
    """10 steps equal a hand computation; torch's own, which rounds every operation, goes elsewhere."""
    update = {"sgd": sgd_by_hand, "adam": adam_by_hand}[name]
    model, twin, rounded = (mlp(torch.bfloat16) for _ in range(3))
    own = loop(name, model)
    theirs = of_torch(name, [{"params": list(rounded.parameters()), **settings_of(name)}])
    states: list[dict[str, Tensor]] = [{} for _ in twin.parameters()]
    for number in range(10):
        own.step(number)
        twin.zero_grad()
        backward(twin, number)
        for parameter, state in zip(twin.parameters(), states, strict=True):
            assert parameter.grad is not None
            with torch.no_grad():
                parameter.copy_(update(parameter.float(), parameter.grad.float(), state))
        theirs.zero_grad()
        backward(rounded, number)
        theirs.step()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        # an unlucky last bit in fp32 may round to the neighbour: bf16 has 8 bits
        torch.testing.assert_close(ours, expected, rtol=2**-8 if name == "adam" else 0, atol=0)
    assert not same_bits(weights_of(model), weights_of(rounded))
    assert all(value.dtype != torch.bfloat16 for value in flat_state(own.optimizer))


def test_sam_climbs_from_bf16_weights_in_fp32() -> None:
    """The ascent point is rounded once too, and the norm is that of the fp32 gradient."""
    model = mlp(torch.bfloat16)
    own = loop("sam-sgd", model)
    own.step(0)
    twin = mlp(torch.bfloat16)
    backward(twin, 0)
    grads = [p.grad.float() for p in twin.parameters() if p.grad is not None]
    norm = torch.cat([g.reshape(-1) for g in grads]).norm()
    point = [(w.float() + g * (0.3 / (norm + 1e-12))).bfloat16() for w, g in zip(weights_of(twin), grads, strict=True)]
    assert same_bits(own.passes[1]["weights"], point)


def test_groups_of_different_types_keep_theirs() -> None:
    one, two = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = TorchOptimizer("sgd", [{"params": [one]}, {"params": [two], "lr": 0.01}], momentum=0.0)

    def closure() -> Tensor:
        loss = (one.double() ** 2).sum() + (two**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    assert one.dtype == torch.bfloat16
    torch.testing.assert_close(one.double(), torch.full((3,), 0.8, dtype=torch.float64), rtol=0, atol=2**-9)
    torch.testing.assert_close(two, torch.full((2,), 0.98, dtype=torch.float64), rtol=0, atol=1e-15)


class Tied(nn.Module):
    """An encoder and a decoder that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, dtype=torch.float64)
        self.last = nn.Linear(8, 6, bias=False, dtype=torch.float64)
        self.last.weight = nn.Parameter(self.first.weight.detach().t().clone())
        self.again = nn.Linear(8, 6, bias=False, dtype=torch.float64)
        self.again.weight = self.last.weight

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(self.first(x))
        both: Tensor = self.last(inner) + self.again(inner**2)
        return both[:, :3]


def test_a_shared_weight_is_one_weight() -> None:
    """sam-sgd on tied weights equals a hand-written loop, in which the parameter stands once."""
    model, twin = Tied(), Tied()
    twin.load_state_dict(model.state_dict())
    x, y = batch(0, mlp())
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
    ours = TorchOptimizer("sam-sgd", model, rho=0.3, **settings)
    theirs = of_torch("sgd", [{"params": list(twin.parameters()), **settings}])
    assert len(ours.param_groups[0]["params"]) == 3
    for _ in range(10):
        ours.step(closure_of(model, x, y))
        theirs.zero_grad()
        loss_of(twin, x, y).backward()  # type: ignore[no-untyped-call]
        grads = [p.grad.clone() for p in twin.parameters() if p.grad is not None]
        kept = weights_of(twin)
        with torch.no_grad():
            for parameter, change in zip(twin.parameters(), climb("sam", kept, grads, []), strict=True):
                parameter.add_(change)
        theirs.zero_grad()
        loss_of(twin, x, y).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter, weight in zip(twin.parameters(), kept, strict=True):
                parameter.copy_(weight)
        theirs.step()
    assert_near(model, twin, 1e-11)
    assert model.again.weight is model.last.weight


class Strided(nn.Module):
    """A convolution and a matrix whose elements may lie in another order in memory than in their indices."""

    def __init__(self, *, strided: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        kernel = torch.randn(4, 3, 2, 2, generator=generator, dtype=torch.float64)
        matrix = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        if strided:
            kernel = kernel.to(memory_format=torch.channels_last)
            matrix = matrix.t().contiguous().t()
        self.kernel, self.matrix = nn.Parameter(kernel), nn.Parameter(matrix)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.nn.functional.conv2d(x.reshape(8, 3, 2, 1).expand(-1, -1, -1, 2), self.kernel)
        return linear(inner.flatten(1).tanh(), self.matrix)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_in_memory_does_not_matter(name: str) -> None:
    """Channels-last and transposed weights: the same numbers, noise and state, and the strides are kept."""
    models = [Strided(strided=strided) for strided in (True, False)]
    assert not models[0].kernel.is_contiguous()
    assert not models[0].matrix.is_contiguous()
    strides = [parameter.stride() for parameter in models[0].parameters()]
    x, y = batch(0, mlp())
    for model in models:
        settings = settings_of(name)
        optimizer = TorchOptimizer(name, model, total_steps=5, **settings)
        takes = batches_of(name, settings)
        closure = closure_of(model, x, y, backward=not second_order(name))
        for _ in range(3):
            optimizer.step(closure if takes == 1 else [closure] * takes)
            optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        for parameter in model.parameters():
            assert {value.shape for value in optimizer.state[parameter].values()} <= {parameter.shape, torch.Size()}
    assert_near(models[0], models[1], 1e-10)
    assert [parameter.stride() for parameter in models[0].parameters()] == strides
    assert not same_bits(weights_of(models[0]), weights_of(Strided(strided=True)))
