"""Axes: what the choice of plug-ins fixes is none, and a setting of some models does not part them from the others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatmin.analysis import configurations, partial, sign_error
from flatmin.analysis.axes import fixed_by, independent
from flatmin.analysis.correlation import correlate
from flatmin.analysis.crossfit import crossfit
from flatmin.analysis.figures import coverage
from flatmin.analysis.granulated import granulated

AXES = ("optimizer", "lr", "rho", "gamma")
OWN = {"rho": {"sam", "asam"}, "gamma": {"lpf"}}


def grid(rhos: dict[str, list[float]], gammas: list[float], lrs: list[float]) -> pd.DataFrame:
    """SGD without a setting of its own, some of the SAM family with `rho`, LPF with `gamma`; all at every lr."""
    own: list[tuple[str, float | None, float | None]] = [
        ("sgd", None, None),
        *[(name, rho, None) for name, some in rhos.items() for rho in some],
    ]
    own += [("lpf", None, gamma) for gamma in gammas]
    rows = [(name, lr, rho, gamma) for (name, rho, gamma), lr in itertools.product(own, lrs)]
    return pd.DataFrame(rows, columns=list(AXES)).astype({"rho": float, "gamma": float})


def test_what_the_optimizer_fixes_is_no_axis() -> None:
    table = grid({"sam": [0.05], "asam": [2.0]}, [1.0], [0.1, 0.2])
    assert dict(fixed_by(table, AXES)) == {"rho": ("optimizer",), "gamma": ("optimizer",)}
    assert independent(table) == ["optimizer", "lr"]
    assert independent(grid({"sam": [0.05, 0.1]}, [], [0.1])) == ["optimizer", "rho"]


def test_what_a_case_of_a_study_fixes_is_no_axis() -> None:
    """Each data set has its network, and each pair of data set and optimizer its epochs."""
    cases = [("mnist", "lenet", "sgd", 10), ("mnist", "lenet", "adam", 20), ("cifar10", "resnet18", "sgd", 20)]
    cases.append(("cifar10", "resnet18", "adam", 30))
    table = pd.DataFrame(cases, columns=["dataset", "network", "optimizer", "epochs"])
    table = table.merge(pd.DataFrame({"width": [1, 2]}), how="cross")
    assert independent(table) == ["dataset", "optimizer", "width"]
    assert set(fixed_by(table, list(table.columns))["epochs"]) == {"dataset", "optimizer"}


def test_points_of_a_random_search_keep_their_axes() -> None:
    numbers = np.random.default_rng(0)
    table = pd.DataFrame({"lr": numbers.random(8), "momentum": numbers.random(8), "optimizer": ["sgd", "adam"] * 4})
    assert independent(table) == ["lr", "momentum", "optimizer"]


def test_a_null_that_no_other_axis_explains_is_a_level() -> None:
    table = pd.DataFrame(itertools.product(["sgd", "adam"], [None, 0.01], [1, 2]), columns=["optimizer", "stop", "lr"])
    found = configurations.of(table, list(table.columns), repeated=True)
    assert [found.own(axis) for axis in range(3)] == [[], [], []]
    assert [group.shape for group in found.groups(1)] == [(4, 2)]


@st.composite
def tables(draw: st.DrawFn) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    level = st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=2, max_size=3, unique=True)
    table = grid({"sam": draw(level), "asam": draw(level)}, draw(level), draw(level))
    number = st.integers(-3, 3).map(float)
    columns = [np.array(draw(st.lists(number, min_size=len(table), max_size=len(table)))) for _ in range(2)]
    return table, columns[0], columns[1]


def differ_in(one: Mapping[Any, Any], other: Mapping[Any, Any], axis: str) -> bool:
    """The definition: they differ in the axis, and in no other setting that both have."""
    both = [name for name in AXES if not (pd.isna(one[name]) or pd.isna(other[name]))]
    return [name for name in both if one[name] != other[name]] == [axis]


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(tables())
def test_psi_and_sign_error_are_of_pairs_that_differ_in_nothing_that_both_have(
    made: tuple[pd.DataFrame, np.ndarray, np.ndarray],
) -> None:
    table, x, y = made
    found = configurations.of(table, AXES, repeated=True)
    rows = table.to_dict("records")
    psi = granulated(found, x, y)
    errors = {one.axis: one for one in sign_error.sign_errors(sign_error.environments(found, y), x)}
    for axis in AXES:
        groups: dict[Any, list[int]] = {}
        for i, j in itertools.combinations(range(len(rows)), 2):
            if not differ_in(rows[i], rows[j], axis):
                continue
            key = rows[i]["lr"] if axis == "optimizer" else tuple(rows[i][name] for name in AXES if name != axis)
            groups.setdefault(str(key), []).append(int(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j])))
        every = [sign for group in groups.values() for sign in group]
        assert psi[axis].groups == len(groups)
        assert psi[axis].value == pytest.approx(np.mean([np.mean(group) for group in groups.values()]))
        assert psi[axis].tied == every.count(0)
        assert errors[axis].environments == 2 * len(every)
        assert errors[axis].mean == pytest.approx(np.mean([(1 - sign) / 2 for sign in every]))
        assert psi[axis].alone == 0


def test_leaving_out_a_setting_of_some_models_is_of_those() -> None:
    table = grid({"sam": [0.05, 0.1]}, [], [0.1, 0.2, 0.3])
    x = np.arange(9.0)
    whole = configurations.of(table, AXES[:3], repeated=True)
    having = table["rho"].notna().to_numpy()
    part = configurations.of(table[having], AXES[:3], repeated=True)
    y = np.sin(x)
    assert crossfit(whole, x, y)["rho"] == crossfit(part, x[having], y[having])["rho"]


def test_coverage_of_a_setting_is_of_the_models_that_have_it() -> None:
    table = grid({"sam": [0.05, 0.1]}, [], [0.1, 0.2]).drop(columns="gamma").assign(status="finished")
    data = coverage.data(table)
    assert data.groupby("axis")["n"].sum().to_dict() == {"optimizer": 6, "lr": 6, "rho": 4}
    assert data.loc[data["axis"] == "rho", "value"].tolist() == [0.05, 0.1]


def test_correlate_says_what_is_no_axis_and_loses_no_configuration() -> None:
    table = grid({"sam": [0.05], "asam": [2.0]}, [1.0], [0.1, 0.2, 0.3])
    numbers = np.random.default_rng(0)
    table = table.assign(seed=0, lpf_value=numbers.random(len(table)), gen_gap=numbers.random(len(table)))
    found = correlate(table, measures=["lpf_value"], bootstrap=0)
    assert found.axes == ("optimizer", "lr")
    assert found.notes == ("no axis of its own, because fixed by optimizer: rho, gamma",)
    one = found.measures["lpf_value"]
    assert (one.n_configs, one.psi["optimizer"].groups, one.psi["lr"].groups) == (12, 3, 4)
    every = correlate(table, measures=["lpf_value"], axes=AXES, bootstrap=0).measures["lpf_value"]
    assert (every.tau, every.n_configs) == (one.tau, one.n_configs)
    # the settings that are fixed span nothing beyond the optimizer
    assert every.partial == pytest.approx(one.partial)
    levels = configurations.of(table, ["optimizer", "lr"], repeated=True).levels
    expected = partial.partial_rank(table["lpf_value"].to_numpy(), table["gen_gap"].to_numpy(), levels)
    assert one.partial == pytest.approx(expected)
