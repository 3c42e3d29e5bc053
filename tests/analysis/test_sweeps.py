"""Sweeps of one axis: tau with its level and with the target, and curves per seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatmin.analysis import peak, sweeps
from flatmin.errors import RequestError


@pytest.fixture
def noise() -> pd.DataFrame:
    """Six noise levels of three seeds at two widths; `m` follows the level, the gap falls at the end."""
    rng = np.random.default_rng(0)
    rows = [
        {"label_noise": level, "width": width, "seed": seed, "m": level + width + 0.1 * rng.normal()}
        | {"gen_gap": level * (1.2 - level) + 0.05 * rng.normal()}
        for level in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
        for width in (4, 8)
        for seed in range(3)
    ]
    return pd.DataFrame(rows)


def test_tau_with_the_level_and_with_the_gap_are_scipys_of_seed_means(noise: pd.DataFrame) -> None:
    table = sweeps.along(noise, axis="label_noise", measures=["m"]).set_index("measure")
    means = noise.groupby(["width", "label_noise"])[["m", "gen_gap"]].mean().reset_index()
    expected = [
        [stats.kendalltau(group["m"], group[other]).statistic for _, group in means.groupby("width")]
        for other in ("label_noise", "gen_gap")
    ]
    level, goal = table[["tau_level", "tau_target"]].to_numpy(dtype=float)[0]
    assert [level, goal] == pytest.approx([np.mean(taus) for taus in expected])
    assert table[["groups", "n", "n_configs"]].values.tolist() == [[2, 36, 12]] * 2
    assert table["tau_target"]["gen_gap"] == 1
    assert level > goal + 0.3


def test_the_test_error_stands_for_the_accuracy(tables: Any) -> None:
    table = sweeps.along(tables.models, tables.sharpness, axis="width", target="test_error").set_index("measure")
    opposite = sweeps.along(tables.models, tables.sharpness, axis="width", target="test_acc").set_index("measure")
    labels = ["eps_sharpness(radius=0.1)", "lpf"]
    assert table.index.tolist() == [*labels, "test_error"]
    np.testing.assert_allclose(table.loc[labels, "tau_target"], -opposite.loc[labels, "tau_target"])
    assert table.loc["lpf", "tau_level"] == -1


def test_the_peak_of_the_mean_curve_and_its_spread_over_seeds(tables: Any) -> None:
    of = tables.models["label_noise"] == 0.2
    curves = sweeps.curves(tables.models, "test_error", axis="width", of=of)
    assert curves.shape == (11, 3)
    found = peak.peak_over_seeds(curves)
    assert (found.x, found.seeds, found.found) == (16, 3, 1.0)
    assert found.x_low is not None
    assert found.x_high is not None
    assert 12 <= found.x_low <= 16 <= found.x_high <= 24
    assert found.height_low is not None
    assert found.height is not None
    assert found.height_high is not None
    assert 0.1 < found.height_low <= found.height <= found.height_high


def test_every_resample_of_two_seeds_is_one_of_three_curves() -> None:
    curves = pd.DataFrame({0: [0.5, 0.2, 0.6, 0.1, 0.1], 1: [0.5, 0.2, 0.2, 0.8, 0.1]}, index=[1, 2, 4, 8, 16])
    found = peak.peak_over_seeds(curves)
    # seed 0 alone peaks 0.4 high at 4, seed 1 alone 0.6 at 8, both 0.25 at 8
    assert (found.x, found.x_low, found.x_high) == (8, 4, 8)
    assert [found.height, found.height_low, found.height_high] == pytest.approx([0.25, 0.25, 0.6])


@pytest.mark.parametrize("columns", [1, 3])
def test_no_peak_is_said(columns: int) -> None:
    found = peak.peak_over_seeds(pd.DataFrame({seed: [0.4, 0.3, 0.1] for seed in range(columns)}, index=[1, 2, 4]))
    assert (found.x, found.height, found.seeds) == (None, None, columns)
    assert found.found == (0.0 if columns > 1 else None)


def test_a_seed_with_a_hole_is_left_out() -> None:
    curves = pd.DataFrame({0: [0.5, 0.2, 0.4, 0.1], 1: [0.5, None, 0.9, 0.1]}, index=[1, 2, 4, 8])
    assert peak.peak_over_seeds(curves).seeds == 1
    assert peak.peak_over_seeds(curves[[1]]).x is None


def test_a_missing_axis_is_named(noise: pd.DataFrame) -> None:
    with pytest.raises(RequestError, match=r"sweep: the table has no column 'label_nois'\. Did you mean 'label_noise'"):
        sweeps.along(noise, axis="label_nois", measures=["m"])
    with pytest.raises(RequestError, match="target: the table has no column 'test_acc'"):
        sweeps.along(noise, axis="label_noise", target="test_error", measures=["m"])
