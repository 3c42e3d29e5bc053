"""Correlations: the numbers against scipy, the clusters, the rows left out, and the errors."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatmin.analysis.correlation import Correlations, correlate
from flatmin.errors import RequestError


def random_table(configs: int = 20, seeds: int = 4, *, rng_seed: int = 0) -> pd.DataFrame:
    """A wide table of two axes where the measure `sharp` goes with the gap, and `noise` does not."""
    rng = np.random.default_rng(rng_seed)
    base = rng.normal(size=configs)
    rows = []
    for config in range(configs):
        for seed in range(seeds):
            sharp = base[config] + 0.5 * rng.normal()
            row = {"width": config // 2, "lr": (0.1, 0.01)[config % 2], "seed": seed, "sharp": sharp}
            rows.append(row | {"noise": rng.normal(), "gen_gap": 0.1 * base[config] + 0.1 * rng.normal()})
    return pd.DataFrame(rows)


def test_numbers_are_scipys_on_seed_means() -> None:
    table = random_table()
    result = correlate(table, measures=["sharp", "noise"])
    means = table.groupby(["width", "lr"])[["sharp", "noise", "gen_gap"]].mean()
    assert result.axes == ("width", "lr")
    assert (result.n, result.dropped) == (80, {})
    assert list(result.measures) == ["sharp", "noise"]
    for name, one in result.measures.items():
        assert one.tau == pytest.approx(stats.kendalltau(means[name], means["gen_gap"]).statistic)
        assert one.spearman == pytest.approx(stats.spearmanr(means[name], means["gen_gap"]).statistic)
        assert one.pearson == pytest.approx(stats.pearsonr(means[name], means["gen_gap"]).statistic)
        assert one.tau_rows == pytest.approx(stats.kendalltau(table[name], table["gen_gap"]).statistic)
        assert (one.n, one.n_configs) == (80, 20)


def test_interval_is_the_percentile_bootstrap_over_configurations() -> None:
    table = random_table(configs=15)
    one = correlate(table, measures=["sharp"], bootstrap=300, seed=3).measures["sharp"]
    means = table.groupby(["width", "lr"], sort=False)[["sharp", "gen_gap"]].mean().to_numpy()
    rng = np.random.default_rng(3)
    taus = []
    for count in rng.multinomial(15, np.full(15, 1 / 15), size=300):
        drawn = means[np.repeat(np.arange(15), count)]
        taus.append(stats.kendalltau(drawn[:, 0], drawn[:, 1]).statistic)
    low, high = np.quantile(taus, [0.025, 0.975])
    assert one.tau_low == pytest.approx(low)
    assert one.tau_high == pytest.approx(high)


def test_more_copies_of_the_same_seeds_do_not_narrow_the_interval() -> None:
    """Resampling rows would: fifty copies of each row would shrink it about sevenfold."""
    table = random_table(configs=12, seeds=2).drop(columns="noise")
    copies = pd.concat([table] * 50, ignore_index=True)
    few = correlate(table, measures=["sharp"]).measures["sharp"]
    many = correlate(copies, measures=["sharp"]).measures["sharp"]
    assert few.tau_low is not None
    assert few.tau_high is not None
    assert few.tau_high - few.tau_low > 0.3
    assert many.tau_low == pytest.approx(few.tau_low)
    assert many.tau_high == pytest.approx(few.tau_high)
    assert many.n == 50 * few.n


def test_interval_covers_the_truth() -> None:
    """Bivariate normal: tau = 2/pi asin(r). At 95 %, 50 hits of 60 have probability > 0.999."""
    truth = 2 / np.pi * np.arcsin(0.6)
    covered = 0
    for trial in range(60):
        rng = np.random.default_rng(trial)
        x, z = rng.normal(size=(2, 60))
        table = pd.DataFrame({"config": range(60), "m": x, "gen_gap": 0.6 * x + 0.8 * z})
        one = correlate(table, measures=["m"], axes=["config"], bootstrap=400, controls=False).measures["m"]
        assert one.tau_low is not None
        assert one.tau_high is not None
        covered += one.tau_low <= truth <= one.tau_high
    assert covered >= 50


def test_a_measure_has_the_same_interval_whatever_else_is_asked() -> None:
    table = random_table()
    alone = correlate(table, measures=["sharp"], axes=["width", "lr"]).measures["sharp"]
    both = correlate(table, measures=["sharp", "noise"], axes=["width", "lr"]).measures["sharp"]
    assert alone.q != both.q
    assert dataclasses.replace(alone, q=None) == dataclasses.replace(both, q=None)


def test_result_tables(tables: Any) -> None:
    result = correlate(tables.models, tables.sharpness)
    assert result.axes == ("width", "label_noise")
    assert result.n == len(tables.models) - 1
    assert result.dropped == {"status diverged": 1}
    assert list(result.measures) == ["eps_sharpness(radius=0.1)", "lpf"]
    assert result.measures["lpf"].n_configs == 22


def test_a_subset_of_labels_and_model_columns_can_be_measures(tables: Any) -> None:
    result = correlate(tables.models, tables.sharpness, measures=["n_params", "lpf"], target="test_loss")
    assert list(result.measures) == ["n_params", "lpf"]
    assert result.axes == ("width", "label_noise")
    lpf, params = result.measures["lpf"].tau, result.measures["n_params"].tau
    assert lpf is not None
    assert params is not None
    assert lpf == pytest.approx(-params, abs=0.1)


def test_rows_left_out_are_counted_by_reason() -> None:
    table = random_table(configs=6, seeds=2).assign(status="finished")
    table.loc[0, "status"] = "diverged"
    table.loc[1, "gen_gap"] = np.nan
    table.loc[[2, 3, 4], "sharp"] = [np.nan, np.inf, -np.inf]
    result = correlate(table, measures=["sharp", "noise"])
    assert result.dropped == {"status diverged": 1, "gen_gap is null": 1, "sharp is null": 3}
    assert result.n == 10
    assert (result.measures["sharp"].n, result.measures["sharp"].n_configs) == (7, 4)
    assert (result.measures["noise"].n, result.measures["noise"].n_configs) == (10, 5)


def test_means_are_paired_when_a_seed_lacks_the_measure() -> None:
    """The target of a row without measure must not enter the mean that the measure is compared with."""
    table = pd.DataFrame(
        {
            "width": [1, 1, 2, 2, 3, 3],
            "seed": [0, 1] * 3,
            "m": [1.0, np.nan, 2.0, 2.0, 3.0, 3.0],
            "gen_gap": [1.0, 99.0, 2.0, 2.0, 3.0, 3.0],
        }
    )
    assert correlate(table, measures=["m"]).measures["m"].tau == pytest.approx(1.0)


@pytest.mark.parametrize("values", [[np.nan] * 6, [2.0] * 6])
def test_undefined_is_none_and_json_has_no_nan(values: list[float]) -> None:
    table = pd.DataFrame({"width": range(6), "m": values, "gen_gap": np.arange(6.0)})
    out = correlate(table, measures=["m"]).to_json()
    text = json.dumps(out, allow_nan=False)
    one = json.loads(text)["measures"]["m"]
    assert [one[key] for key in ("tau", "tau_low", "tau_high")] == [None] * 3
    assert [one[key] for key in ("tau_rows", "spearman", "pearson")] == [None] * 3
    assert list(out) == ["target", "axes", "n", "dropped", "measures"]


def test_few_configurations_have_no_interval() -> None:
    table = pd.DataFrame({"width": [1, 2, 3], "m": [1.0, 2.0, 3.0], "gen_gap": [1.0, 2.0, 3.0]})
    one = correlate(table, measures=["m"]).measures["m"]
    assert one.tau == pytest.approx(1.0)
    assert (one.tau_low, one.tau_high) == (None, None)


def test_no_bootstrap_no_interval() -> None:
    one = correlate(random_table(), measures=["sharp"], axes=["width"], bootstrap=0).measures["sharp"]
    assert one.tau is not None
    assert (one.tau_low, one.tau_high) == (None, None)


def test_without_axes_and_seeds_every_row_is_a_configuration() -> None:
    table = random_table(configs=10, seeds=1)[["sharp", "gen_gap"]]
    one = correlate(table, measures=["sharp"]).measures["sharp"]
    assert one.n_configs == 10
    assert one.tau == one.tau_rows


def test_seeds_alone_are_one_configuration() -> None:
    one = correlate(random_table(configs=1, seeds=9), measures=["sharp", "noise"]).measures["sharp"]
    assert (one.n, one.n_configs, one.tau) == (9, 1, None)
    assert one.tau_rows is not None


def test_a_seed_column_of_another_name_makes_no_configuration() -> None:
    table = random_table().rename(columns={"seed": "run"})
    named = correlate(table, measures=["sharp", "noise"], seed_column="run")
    assert named.axes == ("width", "lr")
    assert named.measures["sharp"].n_configs == 20
    unnamed = correlate(table, measures=["sharp", "noise"])
    assert unnamed.measures["sharp"].n_configs == 80


def test_a_column_that_no_seeds_share_is_no_axis() -> None:
    """Else a measure that was not asked for would make a configuration of every row."""
    result = correlate(random_table(), measures=["sharp"])
    assert result.axes == ("width", "lr")
    assert result.notes == ("taken as results, not as axes, because no two seeds share a value: noise",)
    without_seeds = correlate(random_table().drop(columns="seed"), measures=["sharp"])
    assert without_seeds.axes == ("width", "lr", "noise")


def test_a_null_setting_is_a_configuration_of_its_own() -> None:
    rho = [None, None, 0.1, 0.2]
    table = pd.DataFrame({"rho": rho, "m": [1.0, 3.0, 4.0, 5.0], "gen_gap": [1.0, 2.0, 3.0, 4.0]})
    assert correlate(table, measures=["m"]).measures["m"].n_configs == 3


def test_with_axes_given_the_other_numeric_columns_are_measures() -> None:
    result = correlate(random_table().assign(label="x"), axes=["width", "lr"])
    assert list(result.measures) == ["sharp", "noise"]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda t: t, {"measures": ["sharq"]}, "measure: .* 'sharq'. Did you mean 'sharp'.*Valid: gen"),
        (lambda t: t, {"measures": ["sharp"], "target": "gap"}, "target: .*no column 'gap'"),
        (lambda t: t, {"measures": ["sharp"], "axes": ["with"]}, "axis: .* Did you mean 'width'"),
        (lambda t: t, {}, "does not say which columns are measures.*sharp, noise"),
        (lambda t: t.assign(sharp="x"), {"measures": ["sharp"]}, "'sharp' is not numeric.*'x'"),
        (lambda t: t.assign(gen_gap="x"), {"measures": ["sharp"]}, "target: column 'gen_gap' is not numeric"),
        (lambda t: t.assign(gen_gap=0.5), {"measures": ["sharp"]}, r"'gen_gap' is constant \(0.5\)"),
        (lambda t: t.assign(gen_gap=None), {"measures": ["sharp"]}, "null for all 80 models"),
        (lambda t: t.assign(status="diverged"), {"measures": ["sharp"]}, "no model is converged or finished"),
        (lambda t: t, {"measures": ["sharp"], "bootstrap": -1}, "bootstrap: -1"),
    ],
)
def test_errors_say_what_is_wrong(
    change: Callable[[pd.DataFrame], pd.DataFrame], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        correlate(change(random_table()), **arguments)


def test_a_thousand_resamples_of_four_measures_take_seconds() -> None:
    table = random_table(configs=216, seeds=1)
    table = table.assign(c=table["sharp"] ** 2, d=table["noise"] ** 2)
    start = time.process_time()
    result: Correlations = correlate(table, measures=["sharp", "noise", "c", "d"])
    assert time.process_time() - start < 5
    assert result.notes == ()


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


def test_models_of_two_studies_are_apart_and_told() -> None:
    table = pd.concat([random_table().assign(study=name, rho=1) for name in ("first", "second")])
    found = correlate(table, measures=["sharp", "noise"])
    assert found.axes == ("study", "width", "lr")
    assert found.notes == ("models of 2 studies are mixed: first, second",)


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
