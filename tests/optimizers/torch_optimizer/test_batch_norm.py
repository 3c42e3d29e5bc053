"""BatchNorm's running statistics under `TorchOptimizer`: which passes of a step update them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.optimizers.torch_optimizer.conftest import (
    NAMES,
    assert_same,
    backward,
    batch,
    buffers_of,
    closure_of,
    loop,
    mlp,
    network,
    same_bits,
    second_order,
    tracked,
    weights_of,
)
from torch import Tensor, nn

from flatmin.errors import RequestError
from flatmin.optimizers import TorchOptimizer


@pytest.mark.parametrize("bn_updates", ["once", "all", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_running_statistics_equal_those_of_a_loop_that_protects_them(name: str, bn_updates: str) -> None:
    """Replaying every pass at its weights, protected where the policy says so, gives the same buffers bit for bit."""
    own = loop(name, network(), bn_updates=bn_updates)
    for number in range(4):
        own.step(number)
    replayed = network()
    done: set[tuple[int, int]] = set()
    updates = 0
    for taken in own.passes:
        with torch.no_grad():
            for parameter, weight in zip(replayed.parameters(), taken["weights"], strict=True):
                parameter.copy_(weight)
        kept = buffers_of(replayed)
        replayed(batch(taken["number"], replayed, taken["part"])[0])
        first = (taken["number"], taken["part"]) not in done
        done.add((taken["number"], taken["part"]))
        if bn_updates == "all" or (bn_updates == "once" and first):
            updates += 1
        else:
            for buffer, value in zip(replayed.buffers(), kept, strict=True):
                buffer.copy_(value)
    assert same_bits(buffers_of(own.model), buffers_of(replayed))
    assert tracked(own.model) == updates
    if bn_updates == "once":
        assert updates == 4 * own.takes


@pytest.mark.parametrize(
    ("name", "options", "once", "all_of_them"),
    [
        ("sgd", {}, 1, 1),
        ("sam-sgd", {}, 1, 2),
        ("vasso-adam", {}, 1, 2),
        ("lpf-sgd", {"lpf_batches": 4}, 4, 4),
        ("smoothout-sgd", {}, 1, 1),
        ("entropy-sgd", {"entropy_steps": 5}, 5, 5),
        ("adahessian", {}, 1, 1),
        ("asam-adahessian", {}, 1, 2),
    ],
)
def test_batches_tracked_in_a_step(name: str, options: dict[str, Any], once: int, all_of_them: int) -> None:
    for bn_updates, expected in (("once", once), ("all", all_of_them), ("none", 0)):
        own = loop(name, network(), bn_updates=bn_updates, **options)
        own.step(0)
        assert [tracked(own.model, place) for place in (1, 5)] == [expected] * 2


@pytest.mark.parametrize("name", ["sam-sgd", "vasso-adam", "asam-adahessian"])
def test_from_parameters_alone_a_second_evaluation_is_refused(name: str) -> None:
    reason = "it cannot be told whose BatchNorm statistics to protect: give the module"
    model = network()
    own = loop(name, model, params=model.parameters())
    with pytest.raises(RequestError, match=reason):
        own.step(0)
    assert same_bits(weights_of(model), weights_of(network()))
    if not second_order(name):
        backward(model, 0)
        with pytest.raises(RequestError, match=reason):
            own.optimizer.first_step()
        assert same_bits(weights_of(model), weights_of(network()))
    for options in ({"module": model}, {"bn_updates": "all"}):
        fresh, twin = network(), network()
        given = {"module": fresh} if "module" in options else options
        own = loop(name, fresh, params=fresh.parameters(), **given)
        own.step(0)
        whole = loop(name, twin, **({} if "module" in options else options))
        whole.step(0)
        assert_same(own, whole)


@pytest.mark.parametrize("name", ["sgd", "lpf-sgd", "smoothout-adam", "entropy-sgd", "adahessian"])
def test_rules_that_see_every_batch_once_need_no_module(name: str) -> None:
    model = network()
    own, twin = loop(name, model, params=model.parameters()), loop(name, network())
    for each in (own, twin):
        each.step(0)
    assert_same(own, twin)


def test_a_buffer_that_a_module_replaces_is_protected_too() -> None:
    class Counted(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Any:
            self.seen = self.seen + 1
            return self.inner(x)

    model = Counted()
    x, y = batch(0, model.inner)
    for bn_updates, expected in (("once", 1), ("all", 3), ("none", 3)):
        optimizer = TorchOptimizer("sam-sgd", model, bn_updates=bn_updates)  # type: ignore[arg-type]
        optimizer.step(closure_of(model, x, y))
        assert int(model.seen) == expected
