"""`first_step` and `second_step` of `TorchOptimizer`: one step with a closure, and refused in the wrong order."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tests.optimizers.torch_optimizer.conftest import (
    CLIMBING,
    assert_same,
    backward,
    batch,
    buffers_of,
    loop,
    network,
    same_bits,
    two_steps,
    weights_of,
)

from flatmin.errors import RequestError

TWO_STEPS = [f"{rule}-{base}" for rule in (*CLIMBING, "lpf", "smoothout") for base in ("sgd", "adam")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bn_updates", ["once", "all"])
@pytest.mark.parametrize("name", TWO_STEPS)
def test_two_steps_equal_one_with_a_closure(name: str, bn_updates: str, dtype: torch.dtype) -> None:
    one = {"lpf_batches": 1} if "lpf" in name else {}
    ours, twin = (loop(name, network(dtype), bn_updates=bn_updates, **one) for _ in range(2))
    for number in range(5):
        two_steps(ours, number)
        twin.step(number)
    assert_same(ours, twin)
    assert all(parameter.grad is None for parameter in ours.model.parameters())
    assert not same_bits(weights_of(ours.model), weights_of(network(dtype)))


def test_two_steps_keep_gradients_unless_asked_to_clear_them() -> None:
    own = loop("sam-sgd", network())
    backward(own.model, 0)
    own.optimizer.first_step()
    assert all(parameter.grad is not None for parameter in own.model.parameters())
    own.optimizer.second_step()
    assert all(parameter.grad is not None for parameter in own.model.parameters())


def test_steps_in_the_wrong_order_are_refused() -> None:
    own, twin = loop("sam-sgd", network()), loop("sam-sgd", network())
    with pytest.raises(RequestError, match="second_step comes after first_step"):
        own.optimizer.second_step()
    backward(own.model, 0)
    own.optimizer.first_step(zero_grad=True)
    for refused, message in (
        (own.optimizer.first_step, "first_step was called already; second_step comes next"),
        (lambda: own.step(0), "first_step was called, so second_step comes before the next step"),
        (own.optimizer.state_dict, "save after second_step"),
        (lambda: own.optimizer.load_state_dict(twin.optimizer.state_dict()), "load after second_step"),
        (lambda: copy.deepcopy(own.optimizer), "copy after second_step"),
        (lambda: pickle.dumps(own.optimizer), "copy after second_step"),
    ):
        with pytest.raises(RequestError, match=message):
            refused()
    backward(own.model, 0)
    own.optimizer.second_step(zero_grad=True)
    twin.step(0)
    assert_same(own, twin)
    with pytest.raises(RequestError, match="second_step comes after first_step"):
        own.optimizer.second_step()


def test_a_second_step_without_gradients_returns_to_the_weights() -> None:
    own = loop("sam-sgd", network())
    start, buffers = weights_of(own.model), None
    backward(own.model, 0)
    buffers = buffers_of(own.model)
    own.optimizer.first_step(zero_grad=True)
    own.model(batch(0, own.model)[0])
    assert not same_bits(weights_of(own.model), start)
    with pytest.raises(RequestError, match="no parameter has a gradient: call backward on the loss first"):
        own.optimizer.second_step()
    assert same_bits(weights_of(own.model), start)
    assert same_bits(buffers_of(own.model), buffers)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("sgd", {}, r"it takes step\(\) or step\(closure\)"),
        ("adahessian", {}, "closure returns the loss without calling backward"),
        ("sam-adahessian", {}, "closure returns the loss without calling backward"),
        ("lpf-sgd", {"lpf_batches": 2}, r"2 micro-batches a step: step\(\[closure_1, \.\.\., closure_2\]\)"),
        ("entropy-adam", {}, r"3 batches a step: step\(\[closure_1, \.\.\., closure_3\]\)"),
        ("entropy-sgd", {"entropy_steps": 1}, r"it takes step\(closure\)"),
        ("sam-sgd", {"bn_updates": "none"}, "the pass before first_step has updated them"),
    ],
)
def test_what_has_no_two_steps_says_why(name: str, options: dict[str, Any], reason: str) -> None:
    own = loop(name, network(), **options)
    backward(own.model, 0)
    start = weights_of(own.model)
    with pytest.raises(RequestError, match=reason):
        own.optimizer.first_step()
    assert same_bits(weights_of(own.model), start)
    own.step(0)
    assert not same_bits(weights_of(own.model), start)


def test_first_step_needs_gradients_where_the_rule_climbs() -> None:
    own = loop("sam-sgd", network())
    with pytest.raises(RequestError, match="no parameter has a gradient"):
        own.optimizer.first_step()
    assert own.step(0) is not None
