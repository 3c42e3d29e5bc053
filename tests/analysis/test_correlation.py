"""Correlations: the numbers against scipy, the clusters, the rows left out, and the errors."""

from __future__ import annotations

import dataclasses
import itertools
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


def test_infinite_values_do_not_make_a_result_an_axis() -> None:
    table = grid_of_two_axes()
    table.loc[:1, "result"] = np.inf
    found = correlate(table, measures=["measure"])
    assert found.axes == ("lr", "width")
    assert found.notes == ("taken as results, not as axes, because no two seeds share a value: result",)


def test_a_result_that_is_taken_as_an_axis_is_told() -> None:
    table = grid_of_two_axes().assign(result=lambda frame: range(len(frame)))
    found = correlate(table, measures=["measure"])
    assert found.axes == ("lr", "width", "result")
    assert found.notes == (
        "no configuration has two models, although values of 'seed' come again: if one of the axes is a result, "
        "name the axes (--axes)",
    )


def test_seeds_of_data_repeat_a_configuration() -> None:
    table = grid_of_two_axes().drop(columns="result").assign(split_seed=lambda frame: frame["seed"])
    assert correlate(table, measures=["measure"]) == correlate(table.drop(columns="split_seed"), measures=["measure"])


def test_an_axis_that_is_named_twice_is_one() -> None:
    table = grid_of_two_axes()
    one = correlate(table, axes=["lr", "width"], measures=["measure"])
    assert correlate(table, axes=["lr", "width", "lr"], measures=["measure"]) == one
    assert one.measures["measure"].psi["lr"].groups == 3


def test_a_seed_that_is_named_as_an_axis_is_told() -> None:
    found = correlate(grid_of_two_axes(), axes=["lr", "seed"], measures=["measure"])
    assert found.axes == ("lr",)
    assert found.notes == ("no axis, because the runs of a configuration differ in it: seed",)


def test_a_test_set_too_small_for_any_environment_is_told() -> None:
    found = correlate(grid_of_two_axes(), axes=["lr", "width"], measures=["measure"], test_examples=2)
    assert found.notes == ("sign error: 2 test examples tell no two configurations apart from chance",)


def grid_of_two_axes() -> pd.DataFrame:
    """Two learning rates, three widths, three seeds; a result of the user's own in which no value comes twice."""
    rng = np.random.default_rng(0)
    grid = pd.DataFrame(list(itertools.product([0.1, 0.2], [4, 8, 16], range(3))), columns=["lr", "width", "seed"])
    columns = {name: rng.random(len(grid)) for name in ("result", "measure", "gen_gap")}
    return grid.assign(**columns)


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
        (lambda t: t, {"measures": ["sharp", "gen_gap"]}, "measures: 'gen_gap' is the target"),
        (lambda t: t, {"measures": ["sharp"], "axes": ["lr", "gen_gap"]}, "axes: 'gen_gap' is the target"),
        (lambda t: t, {"measures": ["sharp"], "seed_column": "sead"}, "seed column: .* Did you mean 'seed'"),
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


def test_models_of_two_studies_are_apart_and_told() -> None:
    table = pd.concat([random_table().assign(study=name, rho=1) for name in ("first", "second")])
    found = correlate(table, measures=["sharp", "noise"])
    assert found.axes == ("study", "width", "lr")
    assert found.notes == ("models of 2 studies are mixed: first, second",)
