"""`TorchOptimizer` against torch's own optimizers, groups of parameters and frozen ones included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.optimizers.torch_optimizer.conftest import (
    GROUPS,
    NAMES,
    assert_near,
    backward,
    batch,
    batches_of,
    closure_of,
    groups_of,
    loop,
    mlp,
    network,
    of_torch,
    same_bits,
    second_order,
    settings_of,
    weights_of,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flatmin.errors import RequestError
from flatmin.optimizers import TorchOptimizer


@pytest.mark.parametrize("several", [False, True], ids=["one group", "three groups"])
@pytest.mark.parametrize(("name", "nesterov"), [("sgd", False), ("sgd", True), ("adam", False), ("adamw", False)])
def test_base_equals_torch(name: str, several: bool, nesterov: bool) -> None:
    """50 steps, float64, with a closure; groups differ in every setting of theirs."""
    own = [dict(one) for one in GROUPS["sgd" if name == "sgd" else "adam"]]
    own = own if several else [own[2]] * 3
    common: dict[str, Any] = {"nesterov": nesterov} if name == "sgd" else {}
    if nesterov:
        own[1]["momentum"] = 0.1
    model, twin = mlp(), mlp()
    groups, theirs_groups = groups_of(name, model, own), groups_of(name, twin, own)
    ours = TorchOptimizer(name, groups, **common)
    theirs = of_torch(name, [{**group, **common} for group in theirs_groups])
    for number in range(50):
        found = ours.step(closure_of(model, *batch(number, model)))
        theirs.zero_grad()
        expected = backward(twin, number)
        theirs.step()
        assert found is not None
        assert float(found) == pytest.approx(float(expected), abs=1e-12)
    assert_near(model, twin)
    assert not same_bits(weights_of(model), weights_of(mlp()))


class TwoHeads(nn.Module):
    """A body and two heads, of which a batch may use one."""

    def __init__(self) -> None:
        super().__init__()
        whole = mlp()
        self.body = nn.Sequential(*list(whole)[:2])
        self.one = nn.Sequential(*list(whole)[2:])
        self.two = copy.deepcopy(self.one)

    def loss(self, number: int, *, both: bool) -> Tensor:
        x, y = batch(number, self.body)
        shared = self.body(x)
        loss = cross_entropy(self.one(shared), y)
        return loss + 0.5 * cross_entropy(self.two(shared), 2 - y) if both else loss


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_parameter_without_a_gradient_is_skipped_as_in_torch(name: str) -> None:
    """The second head is used in every third step only: weights, moments and its own count of steps stand still."""
    model, twin = TwoHeads(), TwoHeads()
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
    ours = TorchOptimizer(name, model, **settings)
    theirs = of_torch(name, [{"params": list(twin.parameters()), **settings}])
    for number in range(30):
        both = number % 3 == 1
        for optimizer, own in ((ours, model), (theirs, twin)):
            optimizer.zero_grad()
            own.loss(number, both=both).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert_near(model, twin)
    if name != "sgd":
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert float(ours.state[parameter][f"{name}/steps"]) == float(theirs.state[other]["step"])
        assert {float(ours.state[p][f"{name}/steps"]) for p in model.parameters()} == {30.0, 10.0}


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_a_gradient_is_left_alone_in_that_step(name: str) -> None:
    """Weights and state of the unused head are bit for bit what they were, and it goes on when it is used again."""
    model = TwoHeads()
    settings = settings_of(name)
    optimizer = TorchOptimizer(name, model, total_steps=10, **settings)

    def take(number: int, both: bool) -> None:
        def closure() -> Tensor:
            loss = model.loss(number, both=both)
            if not second_order(name):
                loss.backward()  # type: ignore[no-untyped-call]
            return loss

        takes = batches_of(name, settings)
        optimizer.step(closure if takes == 1 else [closure] * takes)

    def of_head() -> list[Tensor]:
        state = [value for p in model.two.parameters() for _, value in sorted(optimizer.state[p].items())]
        return [*weights_of(model.two), *(value.clone() for value in state)]

    take(0, True)
    before, body = of_head(), weights_of(model.body)
    take(1, False)
    assert same_bits(of_head(), before)
    assert not any(torch.equal(a, b) for a, b in zip(weights_of(model.body), body, strict=True))
    take(2, True)
    assert not any(torch.equal(a, b) for a, b in zip(weights_of(model.two), before, strict=False))
    of_two, of_body = (optimizer.state[next(part.parameters())] for part in (model.two, model.body))
    for key in [key for key in of_two if key.endswith("/steps")]:
        assert float(of_two[key]) == 2
        assert float(of_body[key]) == 3


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_are_left_alone_bit_for_bit(name: str) -> None:
    model = network()
    frozen = [model[0], model[5]]
    for layer in frozen:
        layer.requires_grad_(False)
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
    own = loop(name, model)
    before, others = [weights_of(layer) for layer in frozen], weights_of(model[7])
    for number in range(3):
        own.step(number)
    assert all(same_bits(weights_of(layer), kept) for layer, kept in zip(frozen, before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights_of(model[7]), others, strict=True))
    assert not any(p in own.optimizer.state for layer in frozen for p in layer.parameters())
    at_passes = [weights["weights"][0] for weights in own.passes]
    assert all(torch.equal(weight, before[0][0]) for weight in at_passes)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_freezing_and_unfreezing_equals_torch(name: str) -> None:
    """A layer joins at step 10, another leaves at 20 and is back at 30, a group is added at 40: momenta are kept."""
    model, twin = mlp(), mlp()
    extra = [nn.Parameter(torch.full((3,), 0.1, dtype=torch.float64)) for _ in range(2)]
    for own in (model, twin):
        own[4].requires_grad_(False)
    settings: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.05}
    ours = TorchOptimizer(name, model, **settings)
    theirs = of_torch(name, [{"params": list(twin.parameters()), **settings}])
    of_added: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0, **({"momentum": 0.5} if name == "sgd" else {})}
    for number in range(50):
        for optimizer, own, bias in ((ours, model, extra[0]), (theirs, twin, extra[1])):
            if number == 40:
                optimizer.add_param_group({"params": [bias], **of_added})
            own[4].requires_grad_(number >= 10)
            own[0].requires_grad_(not 20 <= number < 30)
            optimizer.zero_grad()
            x, y = batch(number, own)
            cross_entropy(own(x) + bias, y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert_near(model, twin)
    torch.testing.assert_close(extra[0], extra[1], rtol=0, atol=1e-12)
    assert not torch.equal(extra[0], torch.full((3,), 0.1, dtype=torch.float64))


def test_groups_can_be_made_while_everything_is_frozen() -> None:
    model = mlp().requires_grad_(False)
    optimizer = TorchOptimizer("sgd", groups_of("sgd", model, GROUPS["sgd"]))
    with pytest.raises(RequestError, match="no parameter requires a gradient"):
        optimizer.step(closure_of(model, *batch(0, model)))
    model.requires_grad_(True)
    assert optimizer.step(closure_of(model, *batch(0, model))) is not None
    assert not same_bits(weights_of(model), weights_of(mlp()))
