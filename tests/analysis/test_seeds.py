"""Optimizer tables: spreads over seeds and paired differences, against scipy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatmin.analysis import seeds
from flatmin.errors import RequestError


@pytest.fixture
def models() -> pd.DataFrame:
    """Two optimizers at two widths with five seeds; the seeds' own effect is larger than the optimizers'."""
    rng = np.random.default_rng(0)
    effect = rng.normal(size=5)
    rows = [
        {"optimizer": optimizer, "width": width, "seed": seed, "status": "finished"}
        | {"test_acc": gain + effect[seed] + 0.01 * rng.normal(), "best_test_acc": gain + effect[seed] + 0.1}
        for optimizer, gain in (("sgd", 0.0), ("sam", 0.1))
        for width in (4, 8)
        for seed in range(5)
    ]
    return pd.DataFrame(rows)


def test_a_spread_is_scipys() -> None:
    values = np.array([0.5, 0.9, 0.4, np.nan, 0.8])
    one = seeds.spread(values)
    known = values[np.isfinite(values)]
    low, high = stats.t.interval(0.95, 3, loc=known.mean(), scale=stats.sem(known))
    assert one.n == 4
    expected = [known.mean(), known.std(ddof=1), stats.sem(known), low, high]
    assert [one.mean, one.sd, one.se, one.low, one.high] == pytest.approx(expected)


def test_one_seed_has_no_spread_and_none_no_mean() -> None:
    assert seeds.spread(np.array([0.5])) == seeds.Spread(1, 0.5, None, None, None, None)
    assert seeds.spread(np.array([np.nan])) == seeds.Spread(0, None, None, None, None, None)


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_so_many_seeds_halve_the_interval_and_one_fewer_do_not(n: int) -> None:
    more = seeds.seeds_to_halve(n)
    assert more is not None

    def width(count: int) -> float:
        return float(stats.t.ppf(0.975, count - 1) / np.sqrt(count))

    assert width(more) <= width(n) / 2 < width(more - 1)


def test_the_last_and_the_best_epoch_are_apart(models: pd.DataFrame) -> None:
    table = seeds.over_seeds(models, ["test_acc", "best_test_acc"])
    assert table.groupby("quantity")["epoch"].unique().map(list).to_dict() == {
        "best_test_acc": ["best on test"],
        "test_acc": ["last"],
    }
    assert len(table) == 8
    expected = models.groupby(["optimizer", "width"], sort=False)["test_acc"].agg(["mean", "std", "sem"])
    found = table[table["quantity"] == "test_acc"].set_index(["optimizer", "width"])
    np.testing.assert_allclose(found[["mean", "sd", "se"]], expected)
    assert found["n"].tolist() == [5] * 4


def test_pairing_takes_the_effect_of_the_seed_out(models: pd.DataFrame) -> None:
    table = seeds.paired(models, "test_acc")
    assert table[["width", "first", "second"]].values.tolist() == [[4, "sgd", "sam"], [8, "sgd", "sam"]]
    wide = models[models["width"] == 4].pivot(index="seed", columns="optimizer", values="test_acc")
    test = stats.ttest_rel(wide["sgd"], wide["sam"])
    mean, sd, se, low, high = table[["mean", "sd", "se", "low", "high"]].to_numpy(dtype=float)[0]
    assert mean / se == pytest.approx(test.statistic)
    interval = test.confidence_interval()
    assert [low, high] == pytest.approx([interval.low, interval.high])
    assert sd < 0.1 * models["test_acc"].std()


def test_only_shared_seeds_are_paired(models: pd.DataFrame) -> None:
    part = models[(models["optimizer"] == "sgd") | (models["seed"] < 3)]
    assert seeds.paired(part, "test_acc")["n"].tolist() == [3, 3]
    apart = models[(models["optimizer"] == "sgd") == (models["seed"] < 3)]
    assert seeds.paired(apart, "test_acc").empty


def test_diverged_models_are_left_out(models: pd.DataFrame) -> None:
    models.loc[0, "status"] = "diverged"
    assert seeds.over_seeds(models, ["test_acc"])["n"].tolist() == [4, 5, 5, 5]


def test_a_missing_column_is_named(models: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match=r"optimizer table: the table has no column 'test_ac'\. Did you mean"):
        seeds.over_seeds(models, ["test_ac"])
    with pytest.raises(RequestError, match="no column 'optimiser'"):
        seeds.paired(models, "test_acc", by="optimiser")
