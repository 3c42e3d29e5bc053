"""`TorchOptimizer` saved, loaded and copied: what goes on is the uninterrupted run."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tests.optimizers.torch_optimizer.conftest import (
    NAMES,
    Loop,
    assert_same,
    flat_state,
    loop,
    network,
    parts_of,
    same_bits,
    through_a_file,
    weights_of,
)
from torch import nn

from flatmin.errors import RequestError
from flatmin.optimizers import TorchOptimizer


def halves(name: str, model: nn.Module, **of_second: Any) -> list[dict[str, Any]]:
    """Return two groups of a module's parameters, the second with settings of its own."""
    parameters = list(model.parameters())
    known = {key for part in parts_of(name) for key in part.arguments}
    own = {key: value for key, value in of_second.items() if key in known}
    return [{"params": parameters[:3]}, {"params": parameters[3:], **own}]


OWN = {"lr": 0.01, "rho": 0.1, "theta": 0.7, "lpf_gamma": 0.05, "weight_decay": 0.1, "scrn_penalty": 2.0}


@pytest.mark.parametrize(
    ("groups", "dtype"), [(1, torch.float32), (2, torch.bfloat16)], ids=["one group, fp32", "two groups, bf16"]
)
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, groups: int, dtype: torch.dtype) -> None:
    """Every bit of weights, state and buffers, after a new process has loaded module and optimizer at step 3."""

    def fresh(init: int, **options: Any) -> Loop:
        model = network(dtype, init)
        params = model if groups == 1 else halves(name, model, **(OWN if init == 0 else {}))
        return loop(name, model, params=params, module=model, **options)

    whole = fresh(0, seed=7)
    for number in range(3):
        whole.step(number)
    saved = through_a_file({"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict()})
    other = {"lr": 0.5} if "scrn" not in name else {"scrn_penalty": 1.0}
    resumed = fresh(5, seed=8, total_steps=4, **other)
    resumed.step(9)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    assert_same(whole, resumed)
    for number in range(3, 6):
        losses = [one.step(number) for one in (whole, resumed)]
        assert losses[0] is not None
        assert losses[1] is not None
        assert torch.equal(losses[0], losses[1])
    assert_same(whole, resumed)
    settings = [
        {key: value for key, value in group.items() if key != "params"} for group in resumed.optimizer.param_groups
    ]
    assert settings == [
        {key: value for key, value in group.items() if key != "params"} for group in whole.optimizer.param_groups
    ]
    assert all(value.dtype in (torch.float32, torch.float64) for value in flat_state(resumed.optimizer))
    assert all(torch.isfinite(weight).all() for weight in weights_of(whole.model))


@pytest.mark.parametrize("lost", ["count", "seed", "total_steps"])
def test_the_position_in_the_noise_is_part_of_the_state(lost: str) -> None:
    """Without the step's number, the seed or the training's length a resumed run would be another one."""
    whole = loop("lpf-sgd", network(), seed=7)
    for number in range(3):
        whole.step(number)
    state = whole.optimizer.state_dict()
    for spoilt in (False, True):
        resumed = loop("lpf-sgd", copy.deepcopy(whole.model))
        own = {**state["flatmin"], **({lost: {"count": 0, "seed": 3, "total_steps": 4}[lost]} if spoilt else {})}
        resumed.optimizer.load_state_dict({**state, "flatmin": own})
        twin = loop("lpf-sgd", copy.deepcopy(whole.model))
        twin.optimizer.load_state_dict(state)
        for each in (resumed, twin):
            each.step(3)
        assert same_bits(weights_of(resumed.model), weights_of(twin.model)) is not spoilt


def test_a_loaded_state_is_a_copy() -> None:
    whole = loop("vasso-adam", network())
    whole.step(0)
    saved = whole.optimizer.state_dict()
    kept = flat_state(whole.optimizer)
    resumed = loop("vasso-adam", copy.deepcopy(whole.model))
    resumed.optimizer.load_state_dict(saved)
    with torch.no_grad():
        for state in resumed.optimizer.state.values():
            for value in state.values():
                value.fill_(5.0)
    assert same_bits(flat_state(whole.optimizer), kept)


def test_the_state_of_another_optimizer_is_refused() -> None:
    own = loop("sam-sgd", network())
    own.step(0)
    kept = flat_state(own.optimizer)
    other = loop("vasso-sgd", network())
    with pytest.raises(RequestError, match="the state is of 'vasso-sgd', this is 'sam-sgd'"):
        own.optimizer.load_state_dict(other.optimizer.state_dict())
    theirs = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(RequestError, match="the state is of 'another optimizer', this is 'sam-sgd'"):
        own.optimizer.load_state_dict(theirs.state_dict())
    smaller = TorchOptimizer("sam-sgd", [nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="size of optimizer's group"):
        own.optimizer.load_state_dict(smaller.state_dict())
    assert same_bits(flat_state(own.optimizer), kept)
    assert own.optimizer.state_dict()["flatmin"]["count"] == 1


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["sgd", "vasso-adam", "lpf-sgd", "entropy-adamw", "adahessian"])
def test_a_copy_goes_on_by_itself(name: str, how: str) -> None:
    own = loop(name, network(), seed=3)
    for number in range(2):
        own.step(number)
    pair = (own.model, own.optimizer)
    model, optimizer = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    twin = Loop(name, model, optimizer, own.takes)
    assert optimizer.module is model
    assert_same(own, twin)
    start = weights_of(own.model)
    twin.step(2)
    assert same_bits(weights_of(own.model), start)
    assert not same_bits(weights_of(twin.model), start)
    own.step(2)
    assert_same(own, twin)
