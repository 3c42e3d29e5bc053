"""The simulator of schedules: closed forms, and bounds that hold for every schedule."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from flatmin.orchestrator.rates import list_schedule, longest_first, makespan

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return `benchmarks/schedule.py` as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "schedule", raising=False)
    return importlib.import_module("schedule")


@pytest.mark.parametrize(
    ("seconds", "gpus", "ends"),
    [
        ([4.0], 8, [4.0]),
        ([1.0] * 6, 3, [1.0] * 3 + [2.0] * 3),
        ([3.0, 1.0, 1.0, 1.0, 2.0], 2, [3.0, 1.0, 2.0, 3.0, 5.0]),
        ([1.0, 2.0, 3.0], 1, [1.0, 3.0, 6.0]),
        ([], 2, []),
    ],
)
def test_ends_of_small_cases(seconds: list[float], gpus: int, ends: list[float]) -> None:
    assert list_schedule(seconds, gpus) == ends


def test_utilisation_and_bound_of_a_case_worked_by_hand(schedule: ModuleType) -> None:
    found = schedule.simulate([1.0, 1.0, 4.0], [0, 1, 2], 2)  # in this order the long one starts last
    assert (found.makespan, found.bound, found.seconds, found.utilisation) == (5.0, 4.0, 6.0, 0.6)
    best = schedule.simulate([1.0, 1.0, 4.0], longest_first([1.0, 1.0, 4.0]), 2)
    assert (best.makespan, best.utilisation) == (4.0, 0.75)


def test_every_schedule_keeps_grahams_bounds(schedule: ModuleType) -> None:
    numbers = np.random.default_rng(3)
    for _ in range(200):
        gpus = int(numbers.integers(1, 9))
        seconds = numbers.exponential(size=int(numbers.integers(1, 40))).tolist()
        any_order = schedule.simulate(seconds, numbers.permutation(len(seconds)).tolist(), gpus)
        longest = schedule.simulate(seconds, longest_first(seconds), gpus)
        assert any_order.bound * (1 - 1e-12) <= any_order.makespan <= sum(seconds) / gpus + max(seconds)
        assert longest.makespan == makespan(seconds, gpus)
        assert longest.utilisation <= 1.0 + 1e-12
