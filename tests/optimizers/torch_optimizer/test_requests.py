"""Requests that `TorchOptimizer` cannot meet, and what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.optimizers.torch_optimizer.conftest import loop, mlp, network, same_bits, weights_of
from torch import Tensor, nn

from flatmin.errors import RequestError
from flatmin.optimizers import TorchOptimizer


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("samm-sgd", {}, "there is no optimizer 'samm-sgd'. Did you mean 'sam-sgd'"),
        ("sam", {}, "'sam' is a gradient rule and needs a base update: .*sam-sgd"),
        ("entropy-scrn", {}, "'entropy-scrn' makes no sense: 'scrn' multiplies by the Hessian"),
        ("sam-sgd", {"rhoo": 0.1}, "'sam-sgd' does not take 'rhoo'. Did you mean 'rho'.*It takes: rho=0.05, lr=0.1"),
        ("sgd", {"rho": 0.1}, "'sgd' does not take 'rho'"),
        ("sam-sgd", {"rho": -0.1}, "rho = -0.1: should be greater than or equal to 0"),
        ("sgd", {"lr": 0.0}, "lr = 0.0: should be greater than 0"),
        ("sgd", {"lr": float("nan")}, "lr = nan: should be a finite number"),
        ("sgd", {"momentum": 1.0}, "momentum = 1.0: should be less than 1"),
        ("sgd", {"lr": "fast"}, "lr = 'fast': should be a valid number"),
        ("lpf-sgd", {"lpf_noise": "filters"}, "lpf_noise = 'filters': should be 'filter', 'tensor' or 'absolute'"),
        ("lpf-sgd", {"lpf_batches": 0}, "lpf_batches = 0: should be greater than or equal to 1"),
        ("lpf-adahessian", {"lpf_batches": 2}, "'lpf-adahessian' with 2 batches a step needs Hessian-vector products"),
        ("lpf-sgd", {"total_steps": 0}, "total_steps = 0: should be 1 or more"),
        ("sam-sgd", {"bn_updates": "twice"}, "bn_updates = 'twice': should be 'once', 'all' or 'none'"),
    ],
)
def test_a_wrong_request_says_what_is_possible(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        TorchOptimizer(name, mlp(), **options)


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ({"lrr": 0.1}, "'lpf-sgd' does not take 'lrr'. Did you mean 'lr'"),
        ({"lr": -1.0}, "lr = -1.0: should be greater than 0"),
        ({"lpf_batches": 2}, "lpf_batches is the same for all groups of parameters, here 1"),
        ({"nesterov": True}, "nesterov is the same for all groups of parameters, here False"),
        ({"lpf_noise": "tensor"}, "lpf_noise is the same for all groups of parameters, here 'filter'"),
    ],
)
def test_a_wrong_setting_of_a_group_is_refused(group: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        TorchOptimizer("lpf-sgd", [{"params": mlp().parameters(), **group}])
    own = loop("lpf-sgd", mlp(), lpf_batches=1)
    with pytest.raises(RequestError, match=reason):
        own.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, dtype=torch.float64))], **group})
    assert len(own.optimizer.param_groups) == 1
    own.step(0)


def with_gradients(loss: Tensor) -> Tensor:
    torch.autograd.backward(loss)
    return loss


def test_sparse_gradients_are_refused() -> None:
    module = nn.EmbeddingBag(4, 2, sparse=True, mode="sum")
    with pytest.raises(RequestError, match="'sgd' takes dense gradients"):
        TorchOptimizer("sgd", module).step(lambda: with_gradients(module(torch.tensor([[0, 1]])).sum()))


def test_frozen_integers_beside_the_weights_do_no_harm() -> None:
    module = nn.Linear(2, 1)
    module.register_parameter("table", nn.Parameter(torch.arange(3), requires_grad=False))
    TorchOptimizer("sgd", module).step(lambda: with_gradients(module(torch.ones(1, 2)).sum()))
    assert torch.equal(module.get_parameter("table"), torch.arange(3))


def test_only_real_weights_are_taken() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    reason = "'sam-sgd' takes real floating-point parameters, not torch.complex64"
    with pytest.raises(RequestError, match=reason):
        TorchOptimizer("sam-sgd", [weight])
    own = loop("sam-sgd", mlp())
    with pytest.raises(RequestError, match=reason):
        own.optimizer.add_param_group({"params": [weight]})
    assert len(own.optimizer.param_groups) == 1
    own.step(0)


def test_parameters_are_needed() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        TorchOptimizer("sgd", [])
    with pytest.raises(ValueError, match="empty parameter list"):
        TorchOptimizer("sgd", nn.ReLU())
    with pytest.raises(RequestError, match="bn_updates = 'none' needs the module"):
        TorchOptimizer("sam-sgd", mlp().parameters(), bn_updates="none")


@pytest.mark.parametrize("name", ["sgd", "sam-sgd", "adahessian"])
def test_a_model_that_is_frozen_cannot_be_trained(name: str) -> None:
    model = mlp().requires_grad_(False)
    with pytest.raises(RequestError, match="no parameter requires a gradient"):
        TorchOptimizer(name, model).step(lambda: torch.zeros(()))


def test_growing_noise_needs_the_length_of_the_training() -> None:
    own = loop("lpf-sgd", network(), total_steps=None)
    with pytest.raises(RequestError, match=r"lpf_increase needs the number of steps .* give total_steps"):
        own.step(0)
    assert same_bits(weights_of(own.model), weights_of(network()))
    one = loop("lpf-sgd", network(), total_steps=None, lpf_batches=1)
    with pytest.raises(RequestError, match="give total_steps"):
        one.optimizer.first_step()
    assert one.optimizer.state_dict()["flatmin"]["count"] == 0
