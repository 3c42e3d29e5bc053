"""Faults within a stack: memory that does not suffice, and a plug-in that raises in some of its models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tests.faults.conftest import Judge, rows

from flatmin.orchestrator.inspect import status
from flatmin.orchestrator.launch import LaunchOptions, launch
from flatmin.orchestrator.runner import RunOptions
from flatmin.results import Results
from flatmin.trainables import measures, parts
from flatmin.trainables.trainer import StackTrainer

ROUNDING = 1e-9
"""What another partition into stacks may change in float64."""


def go(study: Path, results: Path, max_failures: int = 3) -> int:
    return launch(str(study), results, options=LaunchOptions(RunOptions(max_failures), inline=True)).exit_code


def test_a_stack_that_does_not_fit_in_the_memory_is_halved_until_it_does(
    plugin: Path, unharmed: list[pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: Judge
) -> None:
    monkeypatch.setenv("FLATMIN_FAULT", "memory")
    assert go(plugin, tmp_path / "r", max_failures=0) == 0
    judge("device out of memory, stacks halved twice", 6, tmp_path / "r", unharmed, tolerance=ROUNDING)
    results = Results.open(tmp_path / "r")
    assert results.failures().empty
    for text in results.models()["execution"]:
        execution = json.loads(text)
        assert (execution["stack_size"], execution["halvings"], execution["halved_for"]) == (1, 2, "memory")


@pytest.mark.parametrize("max_failures", [0, 2])
def test_a_model_that_fails_costs_no_other(
    plugin: Path,
    unharmed: list[pd.DataFrame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    judge: Judge,
    max_failures: int,
) -> None:
    """Of two stacks of four, the narrow one has two models in which the plug-in raises."""
    monkeypatch.setenv("FLATMIN_FAULT", "raise")
    assert go(plugin, tmp_path / "r", max_failures) == 1
    judge("plug-in raises in two models of a stack", 2, tmp_path / "r", unharmed, failed=2, tolerance=ROUNDING)
    results = Results.open(tmp_path / "r")
    plan, failures = results.plan().set_index("model_id"), results.failures()
    last = failures[failures["attempt"] == max_failures + 1]
    assert len(last) == 2
    assert set(plan.loc[last["model_id"], ["width", "lr"]].itertuples(index=False, name=None)) == {(4, 0.002)}
    assert set(last["error"]) == {"ZeroDivisionError: a bug of the plug-in"}
    assert last["traceback"].str.contains("flatmin_faulty.py").all()
    counted = status(results)
    assert (counted.finished, counted.failed, counted.remaining) == (6, 2, 0)

    monkeypatch.delenv("FLATMIN_FAULT")  # the plug-in is mended
    assert go(plugin, tmp_path / "r") == 0
    assert len(rows(tmp_path / "r")[0]) == 8


def test_a_fault_of_every_model_is_not_sought_in_each(
    plugin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MOST_ALONE", 2)
    monkeypatch.setattr("flatmin.trainables.job.network_builder", lambda *_: 1 / 0)
    assert go(plugin, tmp_path / "r", max_failures=0) == 1
    failures = Results.open(tmp_path / "r").failures()
    assert sorted(failures["model_id"]) == sorted(Results.open(tmp_path / "r").plan()["model_id"])
    assert set(failures["error"]) == {"ZeroDivisionError: division by zero"}


def test_models_whose_measures_do_not_fit_are_not_trained_again(
    plugin: Path, unharmed: list[pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: Judge
) -> None:
    """They are committed, and measured from their weights in halves, within the same attempt."""
    measure = measures._measure

    def crowded(trainer: StackTrainer, positions: Sequence[int], *rest: Any) -> Any:
        if len(positions) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return measure(trainer, positions, *rest)

    monkeypatch.setattr(measures, "_measure", crowded)
    assert go(plugin, tmp_path / "r", max_failures=0) == 0
    judge("device out of memory while measuring", 2, tmp_path / "r", unharmed, tolerance=ROUNDING)
    results = Results.open(tmp_path / "r")
    assert results.failures().empty
    assert {json.loads(text)["stack_size"] for text in results.models()["execution"]} == {4}
