"""What stands beside tau: its keys, q-values, filters and controls, and wrong requests."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest

from flatmin.analysis.correlation import correlate
from flatmin.errors import RequestError


def factorial(seeds: int = 4) -> pd.DataFrame:
    """Three axes, one of names: `sharp` follows the lr as the gap does, and opposes the gap given the lr."""
    rng = np.random.default_rng(0)
    grid = [(lr, width, name) for lr in (0.1, 0.01, 0.001) for width in (4, 8, 16) for name in ("sgd", "sam")]
    rows = []
    for lr, width, optimizer in grid:
        own = rng.normal()
        for seed in range(seeds):
            row = {"lr": lr * (1 + 1e-12 * seed), "width": width, "optimizer": optimizer, "seed": seed}
            row |= {"sharp": np.log10(lr) + 0.1 * own + 0.02 * rng.normal(), "other": rng.normal()}
            rows.append(row | {"gen_gap": 0.02 * np.log10(lr) - 0.004 * own, "train_loss": 0.02 * rng.random()})
    return pd.DataFrame(rows)


def test_the_json_of_a_measure_has_these_keys_in_plain_values() -> None:
    out = correlate(factorial(), axes=["lr", "width", "optimizer"], measures=["sharp"]).to_json()
    one = json.loads(json.dumps(out, allow_nan=False))["measures"]["sharp"]
    assert list(one) == [
        "tau",
        "tau_low",
        "tau_high",
        "n",
        "n_configs",
        "tau_rows",
        "spearman",
        "pearson",
        "partial",
        "partial_low",
        "partial_high",
        "sign_flip",
        "psi",
        "psi_mean",
        "cmi",
        "sign_error",
        "q",
    ]
    assert list(one["psi"]) == ["lr", "width", "optimizer"]
    assert all(list(psi) == ["value", "groups"] for psi in one["psi"].values())
    assert [error["axis"] for error in one["sign_error"]] == ["lr", "width", "optimizer", "all"]
    assert all(list(error) == ["axis", "mean", "p90", "max", "environments"] for error in one["sign_error"])


def test_a_measure_that_only_follows_a_setting_flips_its_sign_given_it() -> None:
    one = correlate(factorial(), axes=["lr", "width", "optimizer"], measures=["sharp"]).measures["sharp"]
    assert one.tau is not None
    assert one.tau_low is not None
    assert one.partial_high is not None
    assert one.tau > one.tau_low > 0.2
    assert one.partial_high < 0
    assert one.sign_flip is True
    assert one.psi["lr"].value == 1
    width = one.psi["width"].value
    assert width is not None
    assert width < -0.7  # not -1: the seeds' noise turns a pair or two
    assert (one.n_configs, [psi.groups for psi in one.psi.values()]) == (18, [6, 6, 9])


def test_floats_that_differ_in_the_last_digits_are_one_level() -> None:
    table = factorial()
    assert table["lr"].nunique() == 12
    assert correlate(table, axes=["lr"], measures=["sharp"]).measures["sharp"].n_configs == 3
    assert correlate(table, measures=["sharp", "other"]).axes == ("lr", "width", "optimizer")


def test_q_values_are_those_of_benjamini_and_hochberg() -> None:
    table = factorial()
    rng = np.random.default_rng(3)
    table = table.assign(**{f"m{place}": rng.normal(size=len(table)) + place * table["sharp"] for place in range(4)})
    names = ["m0", "m1", "m2", "m3", "constant"]
    found = correlate(table.assign(constant=1.0), axes=["lr", "width", "optimizer"], measures=names).measures
    p = sorted((one.p, name) for name, one in found.items() if one.p is not None)
    assert len(p) == 4
    for place, (_, name) in enumerate(p):
        expected = min(1.0, *(4 * other / (rank + 1) for rank, (other, _) in enumerate(p) if rank >= place))
        assert found[name].q == pytest.approx(expected)
    assert found["constant"].q is None


def test_a_filter_counts_what_it_leaves_out_and_tau_comes_with_and_without_it() -> None:
    table = factorial()
    table.loc[0, "train_loss"] = np.nan
    kept = table["train_loss"] <= 0.01
    axes = ["lr", "width", "optimizer"]
    found = correlate(table, axes=axes, measures=["other"], filter="train_loss <= 0.01")
    alone = correlate(table[kept], axes=axes, measures=["other"]).measures["other"]
    every = correlate(table, axes=axes, measures=["other"]).measures["other"]
    one = found.measures["other"]
    assert found.dropped == {"filter train_loss <= 0.01": int((~kept).sum())}
    assert (found.n, found.convergence) == (int(kept.sum()), "train_loss <= 0.01")
    assert (one.tau, one.tau_low, one.cmi) == (alone.tau, alone.tau_low, alone.cmi)
    assert (one.tau_converged, one.n_converged) == (alone.tau, int(kept.sum()))
    assert (one.tau_all, one.n_all) == (every.tau, 72)
    assert one.tau != every.tau


def test_our_own_status_is_the_convergence_filter_where_none_is_given() -> None:
    table = factorial()
    table = table.assign(status=np.where(table["train_loss"] <= 0.01, "converged", "finished"))
    axes = ["lr", "width", "optimizer"]
    one = correlate(table, axes=axes, measures=["other"]).measures["other"]
    filtered = correlate(table, axes=axes, measures=["other"], filter="train_loss <= 0.01").measures["other"]
    assert (one.tau_converged, one.n_converged) == (filtered.tau, filtered.n)
    assert (one.tau_all, one.n_all) == (one.tau, 72)


def test_controls_stand_beside_the_measures() -> None:
    axes = ["lr", "width", "optimizer"]
    found = correlate(factorial(), axes=axes, measures=["sharp"])
    assert list(found.measures) == ["sharp"]
    assert list(found.controls) == ["random", "train_loss"]
    loss = correlate(factorial(), axes=axes, measures=["train_loss"])
    assert loss.measures["train_loss"].tau == found.controls["train_loss"].tau
    assert list(loss.controls) == ["random"]
    random = found.controls["random"]
    assert random.q is None
    assert random.tau_low is not None
    assert random.tau_high is not None
    assert random.tau_low < 0 < random.tau_high
    assert random == correlate(factorial(), axes=axes, measures=["other"]).controls["random"]


def test_one_model_has_counts_and_nothing_else() -> None:
    out = correlate(factorial()[:1], axes=["lr"], measures=["sharp"]).to_json()
    one = json.loads(json.dumps(out))["measures"]["sharp"]
    assert {name: value for name, value in one.items() if value not in (None, [], {})} == {
        "n": 1,
        "n_configs": 1,
        "psi": {"lr": {"value": None, "groups": 0}},
        "sign_error": [
            {"axis": axis, "mean": None, "p90": None, "max": None, "environments": 0} for axis in ("lr", "all")
        ],
    }


def test_a_measure_that_is_null_everywhere_leaves_the_others_alone() -> None:
    axes = ["lr", "width", "optimizer"]
    found = correlate(factorial().assign(never=np.nan), axes=axes, measures=["never", "sharp"])
    assert found.dropped == {"never is null": 72}
    assert found.measures["sharp"].tau is not None
    assert (found.measures["never"].n, found.measures["never"].tau) == (0, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filter": "train_los <= 0.01"}, r"filter .*no column 'train_los'\. Did you mean 'train_loss'"),
        ({"filter": "train_loss < 0"}, "filter 'train_loss < 0': none of 72 models passes it"),
        ({"test_examples": 0}, "test examples: 0 is impossible"),
        ({"test_examples": 100, "target": "sharp"}, "column 'sharp' is no gap of accuracy in fractions"),
    ],
)
def test_wrong_filters_and_test_sizes_are_said(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        correlate(factorial(), axes=["lr", "width", "optimizer"], measures=["other"], **arguments)


@pytest.mark.slow
def test_a_million_rows_take_minutes_and_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    width, lr, x, noise = (
        rng.integers(1, 400, size=10**6),
        rng.integers(1, 2500, size=10**6),
        *rng.normal(size=(2, 10**6)),
    )
    table = pd.DataFrame({"width": width, "lr": 0.1 / lr, "m": x, "gen_gap": 0.6 * x + 0.8 * noise})
    start = time.process_time()
    found = correlate(table, axes=["width", "lr"], measures=["m"], controls=False)
    assert time.process_time() - start < 300
    one = found.measures["m"]
    truth = 2 / np.pi * np.arcsin(0.6)
    assert one.n == 10**6
    assert one.n_configs > 600_000
    assert one.tau_low is not None
    assert one.tau_high is not None
    assert one.tau == pytest.approx(truth, abs=0.002)
    assert one.tau_low < truth < one.tau_high < one.tau_low + 0.004
    assert len(found.notes) == 3
