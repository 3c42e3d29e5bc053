"""What people get wrong around `TorchOptimizer`, and shapes that are easily forgotten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin.errors import RequestError
from flatmin.optimizers import TorchOptimizer
from flatmin.orchestrator.estimate import estimate
from flatmin.orchestrator.study import read_study
from flatmin.trial import Trial


def squared(module: nn.Module) -> Tensor:
    loss: Tensor = module(torch.ones(3, 2)).square().mean()
    torch.autograd.backward(loss)
    return loss


@pytest.mark.parametrize(
    ("given", "said"),
    [(torch.tensor(1.0), "was given a Tensor"), (iter([]), "was given a list_iterator")],
    ids=["loss", "iterator"],
)
def test_what_is_no_closure_is_named(given: Any, said: str) -> None:
    with pytest.raises(RequestError, match=rf"'sam-sgd' takes step\(closure\); it {said}"):
        TorchOptimizer("sam-sgd", nn.Linear(2, 1)).step(given)


def test_a_class_in_place_of_the_name_is_named() -> None:
    with pytest.raises(RequestError, match="the first argument is the optimizer's name, such as 'sam-sgd', not <class"):
        TorchOptimizer(torch.optim.SGD, nn.Linear(2, 1))  # type: ignore[arg-type]


def test_the_policy_for_batch_norm_is_saved() -> None:
    first = TorchOptimizer("sam-sgd", nn.Linear(2, 1), bn_updates="all", seed=3, total_steps=7)
    second = TorchOptimizer("sam-sgd", nn.Linear(2, 1))
    second.load_state_dict(first.state_dict())
    assert (second.bn_updates, second.seed, second.total_steps) == ("all", 3, 7)


@pytest.mark.parametrize("name", ["lpf-sgd", "smoothout-sgd", "sam-adam", "adahessian"])
def test_a_parameter_without_elements_does_no_harm(name: str) -> None:
    module = nn.Linear(2, 1)
    module.register_parameter("empty", nn.Parameter(torch.zeros(0, 3, 2)))
    settings: dict[str, Any] = {"smoothout_noise": "filter"} if name.startswith("smoothout") else {}
    optimizer = TorchOptimizer(name, module, **settings)
    before = module.weight.detach().clone()
    if name == "adahessian":
        optimizer.step(lambda: module(torch.ones(3, 2)).square().mean())
    else:
        optimizer.step(lambda: squared(module))
    assert not torch.equal(module.weight, before)


def test_more_batches_a_step_than_an_epoch_has_are_refused() -> None:
    """The row would say 100 inner steps, and every step would take the 4 that there are."""
    study = read_study("digits-sharpness", ["optimizer=entropy-sgd", "entropy_steps=100", "batch_size=256", "seeds=1"])
    trials = [Trial("s", study.models[:1])]
    with pytest.raises(RequestError, match=r"'entropy-sgd' takes 100 batches, and 1000 training examples make 4"):
        estimate(trials)
