"""The closures of `TorchOptimizer`: how many a rule takes, what they weigh, what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.optimizers.torch_optimizer.conftest import (
    BASES,
    NAMES,
    Closure,
    assert_near,
    assert_same,
    backward,
    batch,
    closure_of,
    loop,
    loss_of,
    mlp,
    network,
    same_bits,
    second_order,
    settings_of,
    tracked,
    weights_of,
)
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.optimizers import TorchOptimizer


@pytest.mark.parametrize(
    ("name", "options", "given", "reason"),
    [
        ("lpf-sgd", {}, "one", r"3 micro-batches a step: step\(\[closure_1, .*; it was given a single closure"),
        ("entropy-sgd", {}, "one", r"3 batches a step: step\(\[closure_1, .*; it was given a single closure"),
        ("entropy-sgd", {}, "none", r"3 batches a step.*step\(\) has nothing to evaluate"),
        ("lpf-sgd", {}, "four", "it was given 4 closures"),
        ("lpf-sgd", {}, "zero", "it was given 0 closures"),
        ("sam-sgd", {}, "two", r"'sam-sgd' takes step\(closure\); it was given 2 closures"),
        ("sam-sgd", {}, "none", "or first_step and second_step; step.. has nothing to evaluate"),
        ("adahessian", {}, "none", "whose closure returns the loss without calling backward; step.. has nothing"),
        ("scrn", {}, "none", "whose closure returns the loss without calling backward; step.. has nothing"),
    ],
)
def test_closures_that_a_rule_does_not_take_are_refused(
    name: str, options: dict[str, Any], given: str, reason: str
) -> None:
    own = loop(name, network(), **options)
    closure = closure_of(own.model, *batch(0, own.model))
    start = weights_of(own.model)
    calls: dict[str, Any] = {"one": closure, "none": None, "zero": [], "two": [closure] * 2, "four": [closure] * 4}
    with pytest.raises(RequestError, match=reason):
        own.optimizer.step(calls[given])
    assert same_bits(weights_of(own.model), start)
    assert tracked(own.model) == 0


@pytest.mark.parametrize("name", NAMES)
def test_step_without_a_closure_is_for_optimizers_of_the_plain_gradient(name: str) -> None:
    own, twin = loop(name, network()), loop(name, network())
    backward(own.model, 0)
    if name in BASES and not second_order(name):
        assert own.optimizer.step() is None
        twin.step(0)
        assert_same(own, twin)
    else:
        with pytest.raises(RequestError, match=r"step\(\) has nothing to evaluate"):
            own.optimizer.step()
        assert same_bits(weights_of(own.model), weights_of(network()))


@pytest.mark.parametrize("name", ["sgd", "sam-sgd"])
def test_a_list_of_one_closure_is_a_closure(name: str) -> None:
    own, twin = loop(name, network()), loop(name, network())
    own.optimizer.step(own.closures(0))
    twin.step(0)
    assert_same(own, twin)


def test_a_short_list_of_micro_batches_is_a_short_step() -> None:
    """The last step of an epoch may have fewer; they are those of the same numbers, with the same noise."""
    own = loop("lpf-sgd", mlp(), lpf_increase=1.0)
    own.optimizer.step(own.closures(0)[:2])
    assert [taken["part"] for taken in own.passes] == [0, 1]
    twin = loop("lpf-sgd", mlp(), lpf_increase=1.0)
    twin.step(0, weights=[1, 1, 0])
    assert same_bits(own.passes[1]["weights"], twin.passes[1]["weights"])
    assert_near(own.model, twin.model)


def test_weights_are_the_shares_of_micro_batches() -> None:
    """Micro-batches of 5, 2 and 1 examples, weighed so, give the loss and gradient over the 8 examples."""
    model, twin = mlp(), mlp()
    settings = settings_of("lpf-sgd", lpf_gamma=0.0)
    x, y = batch(0, model)
    pieces = list(zip(torch.split(x, [5, 2, 1]), torch.split(y, [5, 2, 1]), strict=True))
    optimizer = TorchOptimizer("lpf-sgd", model, total_steps=5, **settings)
    loss = optimizer.step([closure_of(model, *piece) for piece in pieces], weights=[5, 2, 1])
    expected = TorchOptimizer("sgd", twin, **settings_of("sgd")).step(closure_of(twin, x, y))
    assert loss is not None
    assert expected is not None
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    assert_near(model, twin)
    alike, other = mlp(), TorchOptimizer("lpf-sgd", unweighted := mlp(), total_steps=5, **settings)
    other.step([closure_of(unweighted, *piece) for piece in pieces])
    assert not any(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(unweighted.parameters(), twin.parameters(), strict=True)
    )
    assert not same_bits(weights_of(unweighted), weights_of(alike))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([1.0, 1.0], "there are 3 closures but 2 weights"),
        ([0.0, 0.0, 0.0], "from 0, not all of them 0"),
        ([3.0, -1.0, 1.0], "from 0, not all of them 0"),
        ([1.0, 1.0, float("nan")], "from 0, not all of them 0"),
    ],
)
def test_senseless_weights_are_refused(weights: list[float], reason: str) -> None:
    own = loop("lpf-sgd", network())
    with pytest.raises(RequestError, match=reason):
        own.step(0, weights=weights)
    assert same_bits(weights_of(own.model), weights_of(network()))


@pytest.mark.parametrize("name", [name for name in NAMES if second_order(name)])
def test_a_second_order_base_refuses_a_closure_that_called_backward(name: str) -> None:
    own = loop(name, network())
    with pytest.raises(RequestError, match=f"the closure of '{name}' must return the loss without calling backward"):
        own.optimizer.step(closure_of(own.model, *batch(0, own.model)))
    with pytest.raises(RequestError, match=f"the closure of '{name}' must return the loss without calling backward"):
        own.optimizer.step(lambda: loss_of(own.model, *batch(0, own.model)).detach())
    assert same_bits(weights_of(own.model), weights_of(network()))
    assert own.step(0) is not None


@pytest.mark.parametrize("returned", ["nothing", "float", "vector"])
@pytest.mark.parametrize("name", ["sgd", "sam-adam", "lpf-sgd", "adahessian", "sam-scrn"])
def test_a_closure_returns_a_tensor_of_one_number(name: str, returned: str) -> None:
    own = loop(name, network())

    def returning(closure: Closure) -> Any:
        kinds: dict[str, Callable[[Tensor], Any]]
        kinds = {"nothing": lambda loss: None, "float": Tensor.item, "vector": lambda loss: loss.expand(2)}
        return lambda: kinds[returned](closure())

    closures = [returning(closure) for closure in own.closures(0)]
    kind = {"nothing": "NoneType", "float": "float", "vector": r"shape \(2,\)"}[returned]
    with pytest.raises(RequestError, match=f"a tensor of one number; this one returned {kind}"):
        own.optimizer.step(closures[0] if own.takes == 1 else closures)
    assert same_bits(weights_of(own.model), weights_of(network()))


@pytest.mark.parametrize("name", ["sgd", "sam-sgd", "adahessian"])
def test_a_loss_that_gives_no_gradient_is_refused(name: str) -> None:
    model = network()
    optimizer = TorchOptimizer(name, model)
    other = torch.zeros(1, requires_grad=True)
    reason = "the loss depends on no parameter" if second_order(name) else "call backward on the loss first"
    with pytest.raises(RequestError, match=f"no parameter has a gradient: {reason}"):
        optimizer.step(lambda: other.sum())
    assert same_bits(weights_of(model), weights_of(network()))
