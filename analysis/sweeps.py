"""Sweeps of one axis, such as noise or width: how measures go with its level, and with the target, and these differ.

Kendall's tau-b along the axis, of seed means, within each level of all other axes, averaged over those (the granulated
coefficient of `granulated.py` with the level in place of the target). Published noise sweeps print tau between the
measure and the noise level; whether a measure follows the generalisation gap is another question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from flatmin.analysis import configurations, frames
from flatmin.analysis.axes import independent
from flatmin.analysis.configurations import Floats
from flatmin.analysis.granulated import Psi, granulated

TEST_ERROR = "test_error"
"""A target that stands for 1 - test_acc."""

_COLUMNS = ["measure", "axis", "target", "tau_level", "tau_target", "groups", "n", "n_configs"]


def along(
    models: pd.DataFrame,
    sharpness: pd.DataFrame | None = None,
    *,
    axis: str,
    target: str = "gen_gap",
    measures: Sequence[str] | None = None,
    axes: Sequence[str] | None = None,
    seed_column: str = "seed",
) -> pd.DataFrame:
    """Correlate measures with the level of an axis and with a target, along that axis.

    Args:
        models: Rows of the `models/` table; only those whose training came to an end are used.
        sharpness: Rows of the `sharpness/` table, or None.
        axis: The numeric setting that is swept: `label_noise`, `data_noise`, `width`.
        target: A column of `models`, or `test_error`.
        measures: Columns or labels. None: all labels.
        axes: The settings that make a configuration. None: all that vary.
        seed_column: The column that repeats a configuration.

    Returns:
        One row per measure, and one of the target itself, whose `tau_target` is 1: `tau_level` and `tau_target`, null
        where undefined; `groups`, the levels of the other axes in the means; `n` models and `n_configs` configurations.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    table = frames.wide(models, sharpness)
    names = list(measures) if measures is not None else frames.labels(sharpness)
    frames.check_columns(table, [axis, *names], role="sweep")
    table = table[frames.kept(table)].reset_index(drop=True)
    goal = _goal(table, target)
    left_out = {seed_column, *filter(frames.is_seed, table.columns)}
    known = independent(table, exclude={target, *names, *left_out}) if axes is None else axes
    settings = [name for name in dict.fromkeys([*known, axis]) if name not in left_out]
    level = frames.numeric(table, axis, role="axis")
    whole = configurations.of(table, settings, repeated=True)
    rows = []
    for name in [*names, target]:
        values = goal if name == target else frames.numeric(table, name, role="measure")
        there = np.isfinite(values) & np.isfinite(goal) & np.isfinite(level)
        part = whole.take(there)
        mean = part.means(values[there])

        def tau(other: Floats, part: configurations.Configurations = part, mean: Floats = mean) -> Psi:
            return granulated(part, mean, part.means(other), variant="b")[axis]

        by_level, by_goal = tau(level[there]), tau(goal[there])
        rows.append([name, axis, target, by_level.value, by_goal.value, by_goal.groups, int(there.sum()), len(part)])
    return pd.DataFrame(rows, columns=_COLUMNS).astype({"tau_level": float, "tau_target": float})


def curves(
    models: pd.DataFrame, column: str, *, axis: str, seed_column: str = "seed", of: pd.Series[bool] | None = None
) -> pd.DataFrame:
    """Return a column against an axis, seed by seed, for `peak.peak_over_seeds`.

    Args:
        models: Rows of the `models/` table; only those whose training came to an end are used.
        column: A column, or `test_error`.
        axis: The numeric setting that is swept.
        seed_column: The column of the seeds; models that share seed and level are averaged.
        of: Which models; all when None.

    Returns:
        One row per level, one column per seed.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    frames.check_columns(models, [axis, seed_column], role="sweep")
    table = models[frames.kept(models) & (True if of is None else of)]
    found = pd.DataFrame(
        {
            "value": _goal(table, column),
            "level": frames.numeric(table, axis, role="axis"),
            "seed": table[seed_column].to_numpy(),
        }
    )
    return found.pivot_table(index="level", columns="seed", values="value", aggfunc="mean")


def _goal(table: pd.DataFrame, target: str) -> Floats:
    if target == TEST_ERROR and TEST_ERROR not in table.columns:
        frames.check_columns(table, ["test_acc"], role="target")
        return 1 - frames.numeric(table, "test_acc", role="target")
    frames.check_columns(table, [target], role="target")
    return frames.numeric(table, target, role="target")
