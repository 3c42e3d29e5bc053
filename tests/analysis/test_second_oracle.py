"""Our statistics beside those of mbe-eval, an independent implementation of the same papers."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from mbe_eval.comparators import granulated_kendall, jiang_normalized_cmi
from mbe_eval.core import partial_rank_corr
from mbe_eval.robust_sign_error import robust_sign_error_environments, robust_sign_error_summary

from flatmin.analysis.correlation import correlate

AXES = ["lr", "width", "optimizer"]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """A grid of 24 configurations with four seeds each; no ties, where conventions would differ."""
    rng = np.random.default_rng(1)
    rows = [
        {"lr": lr, "width": width, "optimizer": optimizer, "config_id": f"{lr} {width} {optimizer}", "seed": seed}
        for lr, width, optimizer in itertools.product([0.1, 0.03, 0.01, 0.003], [8, 16, 32], ["sgd", "sam"])
        for seed in range(4)
    ]
    frame = pd.DataFrame(rows)
    effect = 0.1 * np.log(frame["lr"]) - 0.05 * np.log2(frame["width"]) + 0.05 * (frame["optimizer"] == "sam")
    sharp = effect + 0.1 * rng.normal(size=len(frame))
    return frame.assign(sharp=sharp, gap=0.3 + 0.5 * sharp - 0.4 * effect + 0.1 * rng.random(len(frame)))


def test_partial_psi_and_information_are_theirs(table: pd.DataFrame) -> None:
    one = correlate(table, target="gap", axes=AXES, measures=["sharp"], bootstrap=0).measures["sharp"]
    means = table.groupby([*AXES, "config_id"])[["sharp", "gap"]].mean().reset_index()
    partial, _, _ = partial_rank_corr(means.astype(dict.fromkeys(AXES, str)), "sharp", "gap", AXES)
    assert one.partial == pytest.approx(partial, abs=1e-12)
    mean, per_axis = granulated_kendall(table, "sharp", "gap", AXES, group_col="config_id")
    assert one.psi_mean == pytest.approx(mean, abs=1e-12)
    assert [psi.value for psi in one.psi.values()] == pytest.approx(per_axis["granulated_kendall"].tolist(), abs=1e-12)
    assert one.cmi == pytest.approx(
        jiang_normalized_cmi(table, "sharp", "gap", AXES, group_col="config_id")[0], abs=1e-12
    )


def test_sign_errors_are_theirs(table: pd.DataFrame) -> None:
    found = correlate(table, target="gap", axes=AXES, measures=["sharp"], bootstrap=0, test_examples=8000)
    environments = robust_sign_error_environments(table, ["sharp"], AXES, target="gap", test_size=8000)
    theirs = robust_sign_error_summary(environments, ["sharp"]).set_index("hyperparameter")
    assert len(theirs) == 4
    assert theirs.loc["all", "environments"] < 24 * 6  # the filter left some out
    for one in found.measures["sharp"].sign_error:
        other = theirs.loc[one.axis]
        assert one.environments == other["environments"]
        expected = [other[f"{name}_sign_error"] for name in ("mean", "p90", "max")]
        assert [one.mean, one.p90, one.max] == pytest.approx(expected, abs=1e-12)
