"""`TorchOptimizer` with a GradScaler: overflowed steps are skipped, and the others are those without it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.optimizers.torch_optimizer.conftest import (
    CLIMBING,
    Closure,
    Loop,
    assert_near,
    assert_same,
    backward,
    batch,
    buffers_of,
    flat_state,
    loop,
    loss_of,
    mlp,
    network,
    of_torch,
    same_bits,
    tracked,
    two_steps,
    weights_of,
)
from torch import Tensor, nn

from flatmin.errors import RequestError
from flatmin.optimizers import TorchOptimizer

SCALED = ["sgd", "adam", "sam-sgd", "asam-adam", "vasso-adam", "lpf-sgd", "smoothout-adamw", "entropy-adam"]


@dataclass
class Scaled:
    """A loop whose losses are scaled, and whose gradient overflows in a pass of choice."""

    own: Loop
    autocast: bool
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", init_scale=1024.0))

    def step(self, number: int, *, scaled: bool = True, poisoned: int | None = None) -> Tensor | None:
        taken = [0]

        def closure_on(part: int) -> Closure:
            x, y = batch(number, self.own.model, part)

            def closure() -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                    loss = loss_of(self.own.model, x, y)
                (self.scaler.scale(loss) if scaled else loss).backward()  # type: ignore[no-untyped-call]
                if taken[0] == poisoned:
                    grad = next(self.own.model.parameters()).grad
                    assert grad is not None
                    grad.view(-1)[0] = torch.inf
                taken[0] += 1
                return loss

            return closure

        closures = [closure_on(part) for part in range(self.own.takes)]
        given = closures[0] if self.own.takes == 1 else closures
        found = self.own.optimizer.step(given, scaler=self.scaler if scaled else None)
        if scaled:
            self.scaler.update()
        return found


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", SCALED)
def test_an_overflowed_step_is_skipped_and_training_goes_on(name: str, autocast: bool) -> None:
    """In whichever pass: weights and state are untouched, the scale is halved, and what follows equals unscaled steps.

    The twin takes only the steps that did not overflow, without a scaler. A power of two scales without rounding.
    """
    passes = loop(name, network())
    passes.step(0)
    own, twin = (Scaled(loop(name, network()), autocast) for _ in range(2))
    found, expected = own.step(0), twin.step(0, scaled=False)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)
    assert_same(own.own, twin.own)
    for poisoned in range(len(passes.passes)):
        start, state, scale = weights_of(own.own.model), own.own.optimizer.state_dict(), own.scaler.get_scale()
        kept = copy.deepcopy(state)
        loss = own.step(1, poisoned=poisoned)
        assert loss is not None
        assert torch.isfinite(loss)
        assert same_bits(weights_of(own.own.model), start)
        now = own.own.optimizer.state_dict()
        assert now["flatmin"] == kept["flatmin"]
        assert now["param_groups"] == kept["param_groups"]
        for number, each in now["state"].items():
            assert same_bits(list(each.values()), list(kept["state"][number].values()))
        assert own.scaler.get_scale() == scale / 2
    for number in (2, 3):
        own.step(number)
        twin.step(number, scaled=False)
    assert_same(own.own, twin.own, buffers=False)
    assert not same_bits(weights_of(own.own.model), start)


def test_running_statistics_of_a_skipped_step() -> None:
    """The batches that were seen before the overflow have updated them, once each, at the unperturbed weights.

    So it is in any loop over a GradScaler: the forward pass comes before the overflow is known.
    """
    for poisoned in (0, 1):
        own = Scaled(loop("sam-sgd", network()), autocast=False)
        own.step(0, poisoned=poisoned)
        once = network()
        once(batch(0, once)[0])
        assert same_bits(buffers_of(own.own.model), buffers_of(once))
    for poisoned, seen in ((0, 1), (1, 2), (2, 3)):
        own = Scaled(loop("entropy-sgd", network()), autocast=False)
        own.step(0, poisoned=poisoned)
        assert tracked(own.own.model) == seen
    own = Scaled(loop("sam-sgd", network(), bn_updates="none"), autocast=False)
    own.step(0, poisoned=1)
    assert same_bits(buffers_of(own.own.model), buffers_of(network()))


@pytest.mark.parametrize("poisoned", ["first", "second", "both", "neither"])
@pytest.mark.parametrize("name", ["sam-sgd", "vasso-adam", "lpf-sgd"])
def test_a_scaler_goes_with_two_steps(name: str, poisoned: str) -> None:
    one = {"lpf_batches": 1} if "lpf" in name else {}
    own, twin = loop(name, network(), **one), loop(name, network(), **one)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    two_steps(own, 0, scaler)
    scaler.update()
    twin.step(0)
    assert_same(own, twin)
    start, state = weights_of(own.model), flat_state(own.optimizer)

    def spoil(now: bool) -> None:
        grad = next(own.model.parameters()).grad
        if now and grad is not None:
            grad.view(-1)[0] = torch.inf

    climbs = name.partition("-")[0] in CLIMBING
    if climbs:
        backward(own.model, 1, scaler)
        spoil(poisoned in ("first", "both"))
    own.optimizer.first_step(zero_grad=True, scaler=scaler)
    backward(own.model, 1, scaler)
    spoil(poisoned in ("second", "both"))
    own.optimizer.second_step(zero_grad=True, scaler=scaler)
    scaler.update()
    skipped = poisoned in ("second", "both") or (poisoned == "first" and climbs)
    assert scaler.get_scale() == (512.0 if skipped else 1024.0)
    if skipped:
        assert same_bits(weights_of(own.model), start)
        assert same_bits(flat_state(own.optimizer), state)
    else:
        twin.step(1)
    two_steps(own, 2, scaler)
    scaler.update()
    twin.step(2)
    assert_same(own, twin, buffers=not skipped)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_scaler_steps_a_plain_optimizer_as_it_steps_torchs(name: str) -> None:
    model, twin = mlp(torch.float32), mlp(torch.float32)
    settings: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.02}
    ours = TorchOptimizer(name, model, **settings)
    theirs = of_torch(name, [{"params": list(twin.parameters()), **settings}])
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    for number in range(6):
        start = weights_of(model)
        for optimizer, own, scaler in ((ours, model, scalers[0]), (theirs, twin, scalers[1])):
            optimizer.zero_grad()
            backward(own, number, scaler)
            if number == 3:
                next(own.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
            if number == 4:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(own.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        assert same_bits(weights_of(model), start) == (number == 3)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 512.0
    assert ours.state_dict()["flatmin"]["count"] == 5
    assert_near(model, twin, 1e-6)


def test_a_disabled_scaler_does_nothing() -> None:
    own, twin = loop("sam-sgd", network()), loop("sam-sgd", network())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    own.step(0, scaler=scaler)
    two_steps(own, 1, scaler)
    for number in range(2):
        twin.step(number)
    assert_same(own, twin)


def test_a_scaler_is_refused_where_no_closure_calls_backward() -> None:
    own = loop("sam-adahessian", network())
    with pytest.raises(RequestError, match="'sam-adahessian' takes no GradScaler"):
        own.step(0, scaler=torch.amp.GradScaler("cpu"))
