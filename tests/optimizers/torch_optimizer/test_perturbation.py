"""`TorchOptimizer` after a perturbation: the weights are back, bit for bit, and the base acts there."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from tests.optimizers.torch_optimizer.conftest import (
    BASES,
    CLIMBING,
    NAMES,
    Closure,
    assert_near,
    assert_same,
    batch,
    by_hand,
    closure_of,
    flat_state,
    loop,
    mlp,
    network,
    of_torch,
    same_bits,
    weights_of,
)
from torch import Tensor

from flatmin.optimizers import TorchOptimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_closure_that_raises_leaves_no_trace(name: str, dtype: torch.dtype) -> None:
    """In whichever pass it does: weights and state are bit for bit those before, and the next step is as without it."""
    own, twin = loop(name, network(dtype)), loop(name, network(dtype))
    for each in (own, twin):
        with torch.no_grad():
            each.model[0].weight[0, 0, 0] = -0.0  # type: ignore[index]
        each.step(0)
    with_passes = loop(name, copy.deepcopy(own.model))
    with_passes.step(1)
    displaced = not same_bits(with_passes.passes[-1]["weights"], with_passes.passes[0]["weights"])
    assert displaced or name in BASES or "lpf" in name or "smoothout" in name
    errors = (KeyboardInterrupt, RuntimeError, StopIteration)
    for fatal, error in itertools.product(range(len(with_passes.passes)), errors):
        own.passes.clear()
        start, state = weights_of(own.model), flat_state(own.optimizer)

        def raising(closure: Closure, fatal: int = fatal, error: type[BaseException] = error) -> Closure:
            def run() -> Tensor:
                loss = closure()
                if len(own.passes) == fatal + 1:
                    raise error("in the closure")
                return loss

            return run

        closures = [raising(closure) for closure in own.closures(1)]
        with pytest.raises(error, match="in the closure"):
            own.optimizer.step(closures[0] if own.takes == 1 else closures)
        if "lpf" in name or "smoothout" in name:
            assert not same_bits(own.passes[-1]["weights"], start)
        assert same_bits(weights_of(own.model), start)
        assert same_bits(flat_state(own.optimizer), state)
    for each in (own, twin):
        each.step(2)
    assert_same(own, twin, buffers=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in NAMES if "scrn" not in name])
def test_a_step_of_length_zero_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    model = network(dtype)
    own = loop(name, model, weight_decay=0.0)
    own.optimizer.param_groups[0]["lr"] = 0.0
    start = weights_of(model)
    for number in range(3):
        own.step(number)
    assert same_bits(weights_of(model), start)
    if name not in BASES:
        assert any(not same_bits(taken["weights"], start) for taken in own.passes)


@pytest.mark.parametrize("base", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("rule", CLIMBING)
def test_weight_decay_and_momentum_act_at_the_unperturbed_weights(rule: str, base: str) -> None:
    """30 steps equal a hand-written loop over torch's base, and not one whose base acts at the displaced weights."""
    settings: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.2}
    of_rule: dict[str, Any] = {"rho": 0.3, **({"theta": 0.4} if rule == "vasso" else {})}
    model, right, wrong = mlp(), mlp(), mlp()
    ours = TorchOptimizer(f"{rule}-{base}", model, **settings, **of_rule)
    hands = [of_torch(base, [{"params": list(own.parameters()), **settings}]) for own in (right, wrong)]
    means: list[list[Tensor]] = [[], []]
    for number in range(30):
        found = ours.step(closure_of(model, *batch(number, model)))
        expected = by_hand(rule, right, hands[0], number, means[0])
        by_hand(rule, wrong, hands[1], number, means[1], back=False)
        assert found is not None
        assert float(found) == pytest.approx(expected, abs=1e-11)
    assert_near(model, right, 1e-10)
    differences = [
        float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), wrong.parameters(), strict=True)
    ]
    assert max(differences) > 1e-3
