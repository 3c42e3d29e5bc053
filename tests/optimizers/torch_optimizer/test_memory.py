"""Memory of `TorchOptimizer`: how many copies of the weights a step holds."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from tests.optimizers.torch_optimizer.conftest import CLIMBING, second_order
from torch import Tensor, nn

from flatmin.optimizers import TorchOptimizer

SIZE = 40_009


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Hide what is there already from `gc.get_objects`, which would take a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def copies_alive() -> float:
    """Return how many times `SIZE` fp32 numbers are held by tensors that Python can see."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu" and thing.numel() >= SIZE:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values()) / (4 * SIZE)


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize(
    ("name", "state", "extra"),
    [
        ("sgd", 1, 1),
        ("sam-sgd", 1, 1),
        ("asam-sgd", 1, 1),
        ("sam-adam", 2, 1),
        ("lpf-sgd", 1, 1),
        ("smoothout-sgd", 1, 1),
        ("sam-adahessian", 2, 1),
        ("vasso-sgd", 2, 2),  # the new running mean beside the old one, which an overflow would need
    ],
)
def test_one_copy_of_the_weights_is_held_during_a_pass(name: str, state: int, extra: int) -> None:
    """Beyond weights and state, in every pass of a step: not the first gradient, nor the displaced weights as such."""
    weight = nn.Parameter(torch.ones(SIZE))
    module = nn.ParameterList([weight])
    optimizer = TorchOptimizer(name, module)
    alive = []

    def closure() -> Tensor:
        alive.append(copies_alive())
        loss = (weight**2).mean()
        if not second_order(name):
            loss.backward()  # type: ignore[no-untyped-call]
        return loss

    before = copies_alive()
    assert before == 1
    optimizer.step(closure)
    alive.clear()
    optimizer.step(closure)
    assert len(alive) == (2 if name.partition("-")[0] in CLIMBING else 1)
    assert max(alive) - 1 - state <= extra
    weight.grad = None
    del closure
    assert copies_alive() == 1 + state


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("name", ["sam-sgd", "smoothout-sgd"])
def test_one_copy_of_the_weights_is_held_between_two_steps(name: str) -> None:
    weight = nn.Parameter(torch.ones(SIZE))
    optimizer = TorchOptimizer(name, nn.ParameterList([weight]))
    alive = []
    for _ in range(2):
        if "sam" in name:
            (weight**2).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.first_step(zero_grad=True)
        alive.append(copies_alive())
        (weight**2).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.second_step(zero_grad=True)
    assert alive == [3, 3]  # weights, velocity (zeros at first), and the copy
