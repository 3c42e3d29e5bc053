"""The numbers behind the figures of statistics, cost and coverage, and that each one can be drawn from them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from scipy import stats

from flatmin.analysis.correlation import correlate
from flatmin.analysis.figures import correlations, cost, coverage, measures_over_epochs, noise, optimizers, psi


def drawn(figure: go.Figure) -> dict[str, Any]:
    """What a browser would get."""
    return dict(json.loads(figure.to_json()))


@pytest.fixture(scope="module")
def confounded() -> pd.DataFrame:
    """The measure `follows` goes with the gap within each width, and the width moves the two in opposite directions."""
    rows = []
    for width in (1, 2, 3):
        for lr in (1, 2, 3, 4):
            rows.append({"model_id": f"{width}{lr}", "width": width, "lr": lr, "seed": 0})
    table = pd.DataFrame(rows)
    own = np.random.default_rng(0).random(len(table))
    return table.assign(follows=10 * table["width"] + own, gen_gap=own / 10 - table["width"])


def test_the_ranking_marks_signs_that_the_settings_make(confounded: pd.DataFrame) -> None:
    result = correlate(confounded, measures=["follows"], axes=["width", "lr"])
    data = correlations.data(result)
    row = data[data["measure"] == "follows"].iloc[0]
    assert row["tau"] < 0 < row["partial"]
    assert row["sign_flip"]
    assert list(data["control"]) == [False, True]
    traces = drawn(correlations.draw(data))["data"]
    names = [trace["name"] for trace in traces if trace["showlegend"]]
    assert names == ["measure whose sign changes given the settings", "control"]


def test_psi_is_a_cell_per_measure_and_axis(confounded: pd.DataFrame) -> None:
    result = correlate(confounded, measures=["follows"], axes=["width", "lr"])
    data = psi.data(result).set_index(["measure", "axis"])
    assert data.loc[("follows", "lr"), "psi"] == 1
    assert data.loc[("follows", "width"), "psi"] == -1
    assert data.loc[("follows", "lr"), "groups"] == 3
    heat = drawn(psi.draw(data.reset_index()))["data"][0]
    assert heat["z"][0] == [-1, 1]
    assert heat["customdata"][0][1][0] == 3


def test_an_undefined_psi_is_blank(confounded: pd.DataFrame) -> None:
    alone = confounded[confounded["width"] == confounded["lr"]]
    data = psi.data(correlate(alone, measures=["follows"], axes=["width", "lr"]))
    assert data["psi"].isna().all()
    heat = drawn(psi.draw(data))["data"][0]
    assert {cell for row in heat["z"] for cell in row} == {None}
    assert {cell for row in heat["text"] for cell in row} == {""}


def test_noise_scales_each_measure_and_has_both_taus() -> None:
    levels = [0.0, 0.1, 0.2, 0.3]
    models = pd.DataFrame(
        {"model_id": list("abcdefgh"), "label_noise": levels * 2, "seed": [0] * 4 + [1] * 4, "status": "finished"}
    ).assign(gen_gap=[0.4, 0.1, 0.3, 0.2] * 2)
    value = [1.0, 3.0, 2.0, 5.0, 3.0, 5.0, 4.0, 7.0]
    sharpness = pd.DataFrame({"model_id": models["model_id"], "label": "lpf", "value": value})
    data = noise.data(models, sharpness, axis="label_noise")
    own = data[data["quantity"] == "lpf"].sort_values("x")
    assert own["mean"].tolist() == [2, 4, 3, 6]
    assert own["scaled"].tolist() == [0, 0.5, 0.25, 1]
    assert own[["low", "high", "n"]].iloc[0].tolist() == [1, 3, 2]
    means = [2.0, 4.0, 3.0, 6.0]
    for column, other in (("tau_level", levels), ("tau_target", [0.4, 0.1, 0.3, 0.2])):
        np.testing.assert_allclose(own[column], stats.kendalltau(means, other).statistic)
    assert set(data["kind"]) == {"target", "measure"}
    names = [trace["name"] for trace in drawn(noise.draw(data))["data"] if trace.get("name")]
    assert names == ["gen_gap", "lpf: τ .67 with level, −.67 with gen_gap"]


def test_a_constant_measure_has_no_scale() -> None:
    models = pd.DataFrame({"model_id": list("abc"), "label_noise": [0.0, 0.1, 0.2], "gen_gap": [0.1, 0.2, 0.3]})
    sharpness = pd.DataFrame({"model_id": list("abc"), "label": "flat", "value": 1.0})
    data = noise.data(models, sharpness, axis="label_noise")
    assert data.loc[data["quantity"] == "flat", ["scaled", "tau_level", "tau_target"]].isna().all(axis=None)


def test_measures_over_epochs_are_means_over_seeds() -> None:
    models = pd.DataFrame(
        {"model_id": list("abcd"), "status": ["finished"] * 3 + ["diverged"], "optimizer": list("sstt")}
    )
    rows = [(model, epoch, 10.0 * place + epoch) for place, model in enumerate("abcd") for epoch in (1, 5)]
    sharpness = pd.DataFrame(rows, columns=["model_id", "epoch", "value"]).assign(label="lpf")
    once = pd.DataFrame({"model_id": ["a", "b"], "epoch": [5, 3], "value": 1.0, "label": "at the end"})
    data = measures_over_epochs.data(pd.concat([sharpness, once]), models, axis="optimizer")
    assert set(data["measure"]) == {"lpf"}
    found: Any = data.set_index(["value", "epoch"])
    assert found.loc[("s", 1), ["mean", "low", "high", "n"]].tolist() == [6, 1, 11, 2]
    assert found.loc[("t", 5), ["mean", "n"]].tolist() == [25, 1]
    traces = drawn(measures_over_epochs.draw(data))["data"]
    assert len(traces) == 3 + 1  # a line with its band, and a line of a single model
    assert {trace["meta"] for trace in traces} == {"lpf"}
    assert measures_over_epochs.data(once, models).empty


def test_optimizers_have_t_intervals_and_their_published_values() -> None:
    models = pd.DataFrame(
        {
            "model_id": list("abcde"),
            "optimizer": ["sgd"] * 3 + ["sam-sgd"] * 2,
            "rho": [None] * 3 + [0.05] * 2,
            "seed": [0, 1, 2, 0, 1],
            "test_acc": [0.90, 0.92, 0.94, 0.95, 0.97],
            "best_test_acc": [0.91, 0.93, 0.95, 0.96, 0.98],
        }
    )
    settings = ['{"optimizer": "sam-sgd", "rho": 0.05}', '{"optimizer": "sam-sgd", "rho": 0.5}', '{"optimizer": "sgd"}']
    compared = pd.DataFrame(
        {
            "settings": settings,
            "quantity": "test_acc",
            "epoch": [None] * 3,
            "value": [0.99, 0.5, 0.9],
            "stderr": [0.01, 0.1, 0.02],
        }
    ).assign(ours=[0.96, 0.96, np.nan])
    data: Any = optimizers.data(models, compared).set_index(["configuration", "epoch"])
    assert data.index[0] == ("sam-sgd", "last")
    plain = data.loc[("sgd", "last")]
    half = stats.t.ppf(0.975, 2) * 0.02 / np.sqrt(3)
    np.testing.assert_allclose(plain[["mean", "low", "high"]].astype(float), [0.92, 0.92 - half, 0.92 + half])
    assert data.loc[("sam-sgd", "last"), ["published", "published_stderr"]].tolist() == [0.99, 0.01]
    assert data.drop(index=("sam-sgd", "last"))["published"].isna().all()
    names = [trace["name"] for trace in drawn(optimizers.draw(data.reset_index()))["data"]]
    assert names == ["last epoch", "best on test", "published, last"]


def test_cost_is_medians_and_a_share() -> None:
    sharpness = pd.DataFrame(
        {
            "label": ["lpf"] * 3 + ["trace"],
            "seconds": [1.0, 2.0, 9.0, 5.0],
            "passes": [10.0, 10.0, 40.0, None],
            "converged": [True, False, None, True],
        }
    )
    data: Any = cost.data(sharpness).set_index("measure")
    assert list(data.index) == ["trace", "lpf"]
    assert data.loc["lpf"].tolist() == [2, 12, 10, 0.5, 3]
    assert np.isnan(data.loc["trace", "passes"])
    assert len(drawn(cost.draw(data.reset_index()))["data"]) == 3


def test_coverage_counts_every_planned_model_once_per_axis() -> None:
    plan = pd.DataFrame(
        {"model_id": list("abcdefg"), "width": [1, 1, 1, 2, 2, 2, 2], "lr": [0.1, 0.2, None, 0.1, 0.2, 0.1, 0.2]}
    )
    models = plan.iloc[:5].assign(status=["converged", "finished", "diverged", "filtered out", "converged"])
    failures = pd.DataFrame({"model_id": ["f", "a"]})
    data = coverage.data(models, plan, failures)
    counts = {value: part.set_index("outcome")["n"] for value, part in data[data["axis"] == "width"].groupby("value")}
    assert data.groupby("axis")["n"].sum().tolist() == [7, 7]
    assert counts[1].to_dict() == {"converged": 1, "finished": 1, "diverged": 1}
    assert counts[2].to_dict() == {
        "converged": 1,
        "filtered out": 1,
        "attempt failed": 1,
        "not trained": 1,
    }
    assert data[data["value"].isna()]["outcome"].tolist() == ["diverged"]
    assert drawn(coverage.draw(data))["layout"]["barmode"] == "stack"


def test_coverage_of_one_configuration() -> None:
    data = coverage.data(pd.DataFrame({"model_id": ["a", "b"], "width": 4, "status": "finished"}))
    assert data.to_numpy().tolist() == [["all", "all models", "finished", 2]]
