"""Torch's learning-rate schedulers over `TorchOptimizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from tests.optimizers.torch_optimizer.conftest import (
    Loop,
    assert_near,
    assert_same,
    backward,
    batch,
    by_hand,
    closure_of,
    groups_of,
    loop,
    mlp,
    network,
    of_torch,
    through_a_file,
    two_steps,
)

from flatmin.optimizers import TorchOptimizer

SCHEDULES: Mapping[str, Callable[[torch.optim.Optimizer], Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 5, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 15),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: min(1.0, t / 5)),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=25, cycle_momentum=False),
    "one cycle of momentum": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=25),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.3, patience=1),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["sgd", "sam-sgd"])
def test_torchs_schedulers_drive_the_learning_rate(name: str, schedule: str) -> None:
    """20 steps equal torch.optim.SGD, or a hand-written SAM over it, under the same scheduler."""
    model, twin = mlp(), mlp()
    own = [{"lr": 0.2}, {"lr": 0.05}, {"lr": 0.1}]
    rho: dict[str, Any] = {"rho": 0.3} if name == "sam-sgd" else {}
    ours = TorchOptimizer(name, groups_of("sgd", model, own), module=model, weight_decay=0.05, **rho)
    theirs = of_torch("sgd", [{**group, "weight_decay": 0.05} for group in groups_of("sgd", twin, own)])
    ours_schedule, theirs_schedule = SCHEDULES[schedule](ours), SCHEDULES[schedule](theirs)
    rates = set()
    for number in range(20):
        loss = ours.step(closure_of(model, *batch(number, model)))
        assert loss is not None
        if name == "sam-sgd":
            by_hand("sam", twin, theirs, number, [])
        else:
            theirs.zero_grad()
            backward(twin, number)
            theirs.step()
        for each in (ours_schedule, theirs_schedule):
            each.step(*([float(number >= 3)] if schedule == "plateau" else []))
        assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
        rates.add(ours.param_groups[0]["lr"])
    assert len(rates) > 2
    assert_near(model, twin, 1e-11)


def test_a_scheduled_run_resumes_exactly() -> None:
    def fresh() -> tuple[Loop, Any]:
        own = loop("sam-sgd", network())
        return own, torch.optim.lr_scheduler.CosineAnnealingLR(own.optimizer, 8)

    (whole, schedule), (resumed, other) = fresh(), fresh()
    for number in range(3):
        whole.step(number)
        schedule.step()
    saved = through_a_file([whole.model.state_dict(), whole.optimizer.state_dict(), schedule.state_dict()])
    for part, state in zip((resumed.model, resumed.optimizer, other), saved, strict=True):
        part.load_state_dict(state)
    for number in range(3, 6):
        for own, own_schedule in ((whole, schedule), (resumed, other)):
            own.step(number)
            own_schedule.step()
    assert_same(whole, resumed)
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"] < 0.05


def test_a_scheduler_takes_a_second_step_for_a_step() -> None:
    """Torch warns where its scheduler steps before its optimizer; warnings are errors here."""
    own = loop("sam-sgd", network())
    schedule = torch.optim.lr_scheduler.StepLR(own.optimizer, 1, 0.5)
    two_steps(own, 0)
    schedule.step()
    assert own.optimizer.param_groups[0]["lr"] == 0.025
    early = loop("sam-sgd", network())
    schedule = torch.optim.lr_scheduler.StepLR(early.optimizer, 1, 0.5)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        schedule.step()
