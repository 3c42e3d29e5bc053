"""What every measure in the listing must do, on a perceptron and on a convolutional network with BatchNorm."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flatmin import plugins
from flatmin.sharpness import Engine, measure, measure_all, measure_stack
from flatmin.stack import Batch, StackedNetwork
from flatmin.tables import fixed_columns

MEASURES = sorted(plugins.listing("measure"))
WITH_CURVES = {"fourier", "hessian_density", "loss_surface"}
GIVEN_BY_THE_CALLER = {"model_id", "trial_id", "epoch"}
BUDGETS = {"max_samples", "max_steps", "max_draws"}
DIFFERENCES = {"average_sharpness", "lpf_gap", "lpf_relative"}
"""Their tolerance is relative to a difference that may be next to nothing, and then they rightly do not converge."""


NEED_MEMORY = DIFFERENCES | {"effective_dimension", "hessian_density", "lambda_max", "pac_bayes"}
"""What does not converge without a Krylov space."""

LITTLE_MEMORY = 60_000
"""Bytes: four Krylov spaces of all 43 weights, and no graph of 23 examples."""


Defaults = Callable[[Any, str], list[dict[str, Any]]]


def engine_of(problem: Any, **changes: Any) -> Engine:
    """Return an engine of a problem's models, initial weights included."""
    made = problem.engine((6,))
    given = {
        "params": made.params,
        "buffers": made.buffers,
        "batches": made.batches,
        "keys": made.keys,
        "initial": made.params + 0.1 * torch.ones_like(made.params),
        **changes,
    }
    return Engine(made.network, **given)


def rows_of(engine: Engine, name: str) -> list[dict[str, Any]]:
    (rows,) = measure_stack(engine, [name])
    return [{**row, "seconds": 0} for row in rows]


@pytest.fixture(scope="module")
def defaults() -> Defaults:
    """Return a function that measures all models of a problem at the defaults, once for all tests."""
    made: dict[tuple[int, str], list[dict[str, Any]]] = {}

    def rows(problem: Any, name: str) -> list[dict[str, Any]]:
        key = (len(problem.modules), name)
        if key not in made:
            made[key] = rows_of(engine_of(problem), name)
        return made[key]

    return rows


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_fills_a_row(problem: Any, name: str) -> None:
    engine = engine_of(problem)
    (rows,) = measure_stack(engine, [name])
    assert len(rows) == len(engine)
    defaults = {key: argument.default for key, argument in plugins.get("measure", name).arguments.items()}
    for row in rows:
        assert set(row) | GIVEN_BY_THE_CALLER == set(fixed_columns("sharpness"))
        assert (row["measure"], row["label"], row["metric"]) == (name, name, defaults.get("metric"))
        assert json.loads(row["settings"]) == defaults
        assert math.isfinite(row["value"])
        assert row["stderr"] >= 0
        assert row["samples"] >= 0
        assert row["passes"] >= 0
        assert row["seconds"] > 0
        spent = name in DIFFERENCES and row["samples"] == defaults["max_samples"]
        assert row["converged"] is True or spent


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_that_costs_nothing_looks_at_no_example(problem: Any, name: str, defaults: Defaults) -> None:
    rows = defaults(problem, name)
    others = [Batch(1.0 - batch.x, (batch.y + 1) % 3, batch.shared) for batch in problem.engine((6,)).batches]
    other = rows_of(engine_of(problem, batches=others), name)
    for row, of_others in zip(rows, other, strict=True):
        assert (row["passes"] > 0) == (row["value"] != of_others["value"])


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_repeats_itself(problem: Any, name: str, defaults: Defaults) -> None:
    assert rows_of(engine_of(problem), name) == defaults(problem, name)


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_does_not_depend_on_neighbours(problem: Any, name: str, defaults: Defaults) -> None:
    together = defaults(problem, name)
    for k, row in enumerate(together):
        (alone,) = rows_of(engine_of(problem).select(torch.tensor([k])), name)
        assert alone["value"] == pytest.approx(row["value"], rel=1e-9)
        assert {**alone, "value": 0, "stderr": 0} == {**row, "value": 0, "stderr": 0}


def test_measures_do_not_depend_on_each_other(problem: Any, defaults: Defaults) -> None:
    forwards, backwards = engine_of(problem), engine_of(problem)
    rows = dict(zip(MEASURES, measure_stack(forwards, MEASURES), strict=True))
    reverse = dict(zip(MEASURES[::-1], measure_stack(backwards, MEASURES[::-1]), strict=True))
    for name in MEASURES:
        alone = defaults(problem, name)
        assert [{**row, "seconds": 0} for row in rows[name]] == alone
        assert [{**row, "seconds": 0} for row in reverse[name]] == alone


@pytest.mark.parametrize("name", MEASURES)
def test_a_broken_model_is_undefined_and_breaks_no_other(mlp: Any, name: str, defaults: Defaults) -> None:
    params = mlp.engine().params.clone()
    params[2] = math.nan
    whole, broken = defaults(mlp, name), rows_of(engine_of(mlp, params=params), name)
    for k, row in enumerate(broken):
        if k == 2 and row["passes"] > 0:
            assert (row["value"], row["stderr"], row["converged"]) == (None, None, False)
        elif k != 2:
            assert row["value"] == pytest.approx(whole[k]["value"], rel=1e-9)


@pytest.mark.parametrize("name", [name for name in MEASURES if BUDGETS & set(plugins.get("measure", name).arguments)])
def test_the_least_budget_is_never_silent(conv: Any, name: str, defaults: Defaults) -> None:
    """Where it does not do, the row says that it has not converged."""
    plugin = plugins.get("measure", name)
    budgets = {key: plugin.arguments[key].setting.ge for key in BUDGETS & set(plugin.arguments)}
    label = f"{name}({', '.join(f'{key}={least}' for key, least in budgets.items())})"
    for short, row in zip(rows_of(engine_of(conv), label), defaults(conv, name), strict=True):
        error = abs(short["value"] - row["value"]) if short["value"] is not None else math.inf
        assert not short["converged"] or error <= 5 * (short["stderr"] + row["stderr"])


@pytest.mark.parametrize("memory", [0, LITTLE_MEMORY])
@pytest.mark.parametrize("name", MEASURES)
def test_little_memory_changes_no_value(mlp: Any, name: str, memory: int, defaults: Defaults) -> None:
    little, much = engine_of(mlp, memory=memory), engine_of(mlp)
    assert (little._keeps_graphs, much._keeps_graphs) == (False, True)
    for tight, row in zip(rows_of(little, name), defaults(mlp, name), strict=True):
        assert tight["converged"] == row["converged"] or (memory == 0 and name in NEED_MEMORY)
        error = 5 * ((tight["stderr"] or 0) + row["stderr"]) + 1e-9 * abs(row["value"])
        assert not tight["converged"] or tight["value"] == pytest.approx(row["value"], abs=error)


@pytest.mark.parametrize("name", MEASURES)
def test_nothing_is_changed(problem: Any, name: str) -> None:
    module = problem.modules[0]
    parts = list(module.modules())
    parts[-1].train()
    module[0].weight.requires_grad_(False)
    module[0].weight.grad = torch.ones_like(module[0].weight)
    before = copy.deepcopy(module.state_dict())
    modes = [part.training for part in parts]
    given = [(parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    x, y, generator = problem.x.clone(), problem.y.clone(), torch.get_rng_state()
    measure(module, "cross_entropy", (problem.x, problem.y[0]), [name], initial=module)
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert [part.training for part in parts] == modes
    assert all(
        parameter.requires_grad is wanted and parameter.grad is grad
        for parameter, (wanted, grad) in zip(module.parameters(), given, strict=True)
    )
    assert torch.equal(module[0].weight.grad, torch.ones_like(module[0].weight))
    assert torch.equal(problem.x, x)
    assert torch.equal(problem.y, y)
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("name", MEASURES)
def test_the_engine_is_not_changed(problem: Any, name: str) -> None:
    engine = engine_of(problem)
    params, start = engine.params.clone(), engine.initial_weights().clone()
    buffers = {key: buffer.clone() for key, buffer in engine.buffers.items()}
    state = torch.get_rng_state()
    measure_stack(engine, [name])
    assert torch.equal(engine.params, params)
    assert torch.equal(engine.initial_weights(), start)
    assert all(torch.equal(engine.buffers[key], buffer) for key, buffer in buffers.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not engine.params.requires_grad


@pytest.mark.parametrize("name", MEASURES)
def test_curves_have_a_point_for_every_value(problem: Any, name: str) -> None:
    engine = engine_of(problem)
    (points,) = measure_all(engine, [name]).points
    assert [bool(of_model) for of_model in points] == [name in WITH_CURVES] * len(engine)
    for of_model in points:
        for point in of_model:
            assert set(point) | GIVEN_BY_THE_CALLER == set(fixed_columns("spectra"))
            assert json.loads(point["settings"])["label"] == name
            assert math.isfinite(point["x"])


@pytest.mark.parametrize("name", [name for name in MEASURES if "subset" not in plugins.get("measure", name).refuses])
def test_a_subset_is_a_sample_of_the_whole(name: str) -> None:
    """Its interval (Student's with 15 degrees of freedom, at 99.99 %) holds the value of all examples."""
    copies = 20
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
        x, y = torch.randn(1280, 4, dtype=torch.float64), torch.randint(3, (1, 1280))
        params, _ = StackedNetwork.stack([module] * copies)
        start = params + 0.1 * torch.randn_like(params[:1])
    batch = Batch(x, y.expand(copies, -1), shared=True)
    engine = Engine(StackedNetwork(module), params, {}, [batch], torch.arange(copies), initial=start)
    whole, part = measure_stack(engine, [name, f"{name}(subset=320)"])
    for row, of_part in zip(whole, part, strict=True):
        assert of_part["value"] is not None
        error = math.hypot(of_part["stderr"], row["stderr"])
        assert abs(of_part["value"] - row["value"]) <= 5.2 * error + 1e-9 * abs(row["value"])
