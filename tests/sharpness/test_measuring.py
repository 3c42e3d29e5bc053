from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from flatmin.errors import FlatminError, RequestError
from flatmin.sharpness import Curve, Engine, Estimate, measure_all, measure_stack
from flatmin.sharpness.estimate import exact
from flatmin.tables import fixed_columns


def test_arguments_reach_the_measure_and_the_label(mlp: Any) -> None:
    (rows,) = measure_stack(mlp.engine(), ["lpf( metric=identity, sigma=2e-2 )"])
    assert rows[0]["label"] == "lpf(metric=identity, sigma=0.02)"
    assert rows[0]["metric"] == "identity"
    assert json.loads(rows[0]["settings"])["sigma"] == 0.02


def test_what_all_measures_take_reaches_label_and_settings_where_it_is_not_the_default(mlp: Any) -> None:
    (rows,) = measure_stack(mlp.engine(), ["lpf(label_smoothing=0.1, data=train)"])
    assert rows[0]["label"] == "lpf(label_smoothing=0.1)"
    settings = json.loads(rows[0]["settings"])
    assert settings["label_smoothing"] == 0.1
    assert "data" not in settings


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


def test_a_measure_may_return_curves(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def density(engine: Engine, **arguments: Any) -> Estimate:
        x = torch.arange(3.0).expand(len(engine), 3)
        keys = engine.keys.double()
        value = torch.stack([keys, keys + 1, torch.full_like(keys, math.inf)], dim=1)
        curves = [Curve("hessian_density", x, value), Curve("surface", x, x, y=-x, settings={"direction": 1})]
        return replace(exact(engine.losses(), passes=1.0), curves=curves)

    monkeypatch.setattr("flatmin.sharpness.lpf.lpf", density)
    found = measure_all(mlp.engine(), ["lambda_max(max_steps=1)", "lpf(sigma=0.5)"])
    assert found.points[0] == [[], [], [], []]
    first, last = found.points[1][1][0], found.points[1][1][-1]
    assert {**first, "settings": 0} == {"kind": "hessian_density", "settings": 0, "x": 0.0, "y": None, "value": 101}
    assert json.loads(first["settings"])["label"] == "lpf(sigma=0.5)"
    assert json.loads(first["settings"])["sigma"] == 0.5
    assert {**last, "settings": 0} == {"kind": "surface", "settings": 0, "x": 2.0, "y": -2.0, "value": 2.0}
    assert json.loads(last["settings"])["direction"] == 1
    assert found.points[1][1][2]["value"] is None
    assert set(last) | {"model_id", "trial_id", "epoch"} == set(fixed_columns("spectra"))
    assert [row["value"] for row in found.rows[1]] == mlp.engine().losses().tolist()


@pytest.mark.parametrize("error", [MemoryError("full"), torch.OutOfMemoryError("full")], ids=["host", "device"])
def test_running_out_of_memory_stays_what_it_is(mlp: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr("flatmin.sharpness.lpf.lpf", broken(error))
    with pytest.raises(type(error), match="full") as caught:
        measure_stack(mlp.engine(), ["lpf"])
    assert caught.value.__notes__ == ["while measuring lpf"]
