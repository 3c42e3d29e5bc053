from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from flatmin import plugins
from flatmin.errors import FlatminError, RequestError
from flatmin.sharpness import Engine, measure_stack
from flatmin.tables import fixed_columns

GIVEN_BY_THE_CALLER = {"model_id", "trial_id", "epoch"}


@pytest.mark.parametrize("name", plugins.listing("measure"))
def test_every_measure_fills_a_row(mlp: Any, name: str) -> None:
    (rows,) = measure_stack(mlp.engine(), [name])
    assert len(rows) == 4
    for row in rows:
        assert set(row) | GIVEN_BY_THE_CALLER == set(fixed_columns("sharpness"))
        assert (row["measure"], row["label"], row["metric"]) == (name, name, "filter")
        assert math.isfinite(row["value"])
        assert row["stderr"] >= 0
        assert row["samples"] > 0
        assert row["passes"] > 0
        assert row["seconds"] > 0
        assert row["converged"] is True
        defaults = {key: argument.default for key, argument in plugins.get("measure", name).arguments.items()}
        assert json.loads(row["settings"]) == defaults


@pytest.mark.parametrize("name", plugins.listing("measure"))
def test_every_measure_of_a_broken_model_is_none(mlp: Any, name: str) -> None:
    engine = mlp.engine()
    params = engine.params.clone()
    params[2] = math.nan
    (rows,) = measure_stack(Engine(engine.network, params, {}, engine.batches, engine.keys), [name])
    assert [row["value"] is None for row in rows] == [False, False, True, False]
    assert rows[2]["stderr"] is None
    assert rows[2]["converged"] is False


def test_arguments_reach_the_measure_and_the_label(mlp: Any) -> None:
    (rows,) = measure_stack(mlp.engine(), ["lpf( metric=identity, sigma=2e-2 )"])
    assert rows[0]["label"] == "lpf(metric=identity, sigma=0.02)"
    assert rows[0]["metric"] == "identity"
    assert json.loads(rows[0]["settings"])["sigma"] == 0.02


def test_a_wrong_label_is_refused_before_anything_is_measured(mlp: Any) -> None:
    with pytest.raises(RequestError, match="'lpff'"):
        measure_stack(mlp.engine(), ["lpf", "lpff"])
    with pytest.raises(RequestError, match="sigma = -1"):
        measure_stack(mlp.engine(), ["lpf(sigma=-1)"])


def broken(error: Exception) -> Any:
    def measure(engine: Engine, **arguments: Any) -> Any:
        raise error

    return measure


def test_a_measure_that_fails_is_named(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatmin.sharpness.lpf.lpf", broken(KeyError("x")))
    with pytest.raises(FlatminError, match=r"measure lpf\(sigma=0.5\) failed: KeyError: 'x'"):
        measure_stack(mlp.engine(), ["lpf(sigma=0.5)"])


@pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full")], ids=["host", "device"])
def test_running_out_of_memory_stays_what_it_is(mlp: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr("flatmin.sharpness.lpf.lpf", broken(error))
    with pytest.raises(type(error), match="full") as caught:
        measure_stack(mlp.engine(), ["lpf"])
    assert caught.value.__notes__ == ["while measuring lpf"]
