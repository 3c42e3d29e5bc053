from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from flatmin.errors import FlatminError, RequestError
from flatmin.sharpness import Curve, Engine, Estimate, measure_all, measure_stack, refused
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


def counted(calls: list[str], name: str, error: Exception | None = None) -> Any:
    def measure(engine: Engine, **arguments: Any) -> Estimate:
        calls.append(name)
        if error is not None:
            raise error
        return exact(engine.losses(), passes=1.0)

    return measure


@pytest.mark.parametrize("subset", ["", ", subset=64"])
def test_a_measure_that_cannot_be_taken_costs_no_other(mlp: Any, monkeypatch: pytest.MonkeyPatch, subset: str) -> None:
    calls: list[str] = []
    errors = {"lpf": RequestError("not of this network"), "lpf_gap": ValueError("a bug"), "pac_bayes": None}
    for name, error in errors.items():
        monkeypatch.setattr(f"flatmin.sharpness.{name}.{name}", counted(calls, name, error))
    labels = [f"{name}(label_smoothing=0.1{subset})" for name in errors]
    found = measure_all(mlp.engine(), labels, keep_going=True)
    assert calls == list(errors), "nothing is measured twice"
    refusal, value = found.rows
    assert [row["label"].partition("(")[0] for row in (refusal[0], value[0])] == ["lpf", "pac_bayes"]
    assert all(row["value"] is None and not row["converged"] and row["samples"] == 0 for row in refusal)
    assert json.loads(refusal[3]["settings"])["refused"] == "not of this network"
    assert {"sigma", "tolerance", "label_smoothing"} < set(json.loads(refusal[0]["settings"]))
    assert set(refusal[0]) == set(value[0])
    assert found.points == [[[], [], [], []]] * 2
    (label,) = found.failed
    assert str(found.failed[label]) == f"measure {label} failed: ValueError: a bug"
    with pytest.raises(RequestError, match=r"measure lpf\(.*\) failed: not of this network"):
        measure_all(mlp.engine(), labels)


def test_a_set_that_is_not_there_is_refused_for_its_measures_alone(mlp: Any) -> None:
    found = measure_all(mlp.engine(), ["lpf(data=val)", "lambda_max", "l2_norm"], keep_going=True)
    assert [rows[0]["value"] is None for rows in found.rows] == [True, False, False]
    assert "there is no 'val' set" in json.loads(found.rows[0][0]["settings"])["refused"]


def test_a_network_that_cannot_be_measured() -> None:
    found = refused(["lpf(subset=64)", "l2_norm"], 3, RequestError("it mixes examples"))
    assert [len(rows) for rows in found.rows] == [3, 3]
    assert found.points == [[[], [], []]] * 2
    settings = json.loads(found.rows[0][2]["settings"])
    assert (settings["subset"], settings["sigma"], settings["refused"]) == (64, 0.01, "it mixes examples")
