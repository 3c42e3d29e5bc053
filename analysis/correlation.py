"""Rank correlation of sharpness measures with a target, over the configurations of any table of models.

A configuration is one value of every axis; the seeds repeat it. Seeds of one configuration are no
independent evidence about a measure, so the correlation is taken on seed means, and its interval resamples
configurations, never rows.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from flatmin.analysis import frames, kendall
from flatmin.analysis.kendall import Floats
from flatmin.errors import RequestError

FEWEST_CONFIGURATIONS = 4
"""Fewer configurations than this have too few distinct resamples for an interval to mean anything."""


@dataclass(frozen=True)
class MeasureCorrelation:
    """How one measure goes with the target; None where a number is undefined.

    Attributes:
        tau: Kendall tau-b of the seed means over configurations.
        tau_low: Lower end of its 95 % percentile interval, bootstrapped over configurations.
        tau_high: Upper end of that interval.
        n: Rows with both measure and target.
        n_configs: Configurations among them.
        tau_rows: Kendall tau-b over rows, seeds not averaged.
        spearman: Spearman's rank correlation of the seed means.
        pearson: Pearson's linear correlation of the seed means.
    """

    tau: float | None
    tau_low: float | None
    tau_high: float | None
    n: int
    n_configs: int
    tau_rows: float | None
    spearman: float | None
    pearson: float | None


@dataclass(frozen=True)
class Correlations:
    """The rank correlations of a table.

    Attributes:
        target: The column that the measures are compared with.
        axes: The settings that make a configuration, without seeds.
        n: Rows that count: training came to an end and the target is known.
        dropped: How many rows were left out, by reason.
        measures: One entry per measure.
        notes: What a reader has to know about how the numbers were made; mostly empty.
    """

    target: str
    axes: tuple[str, ...]
    n: int
    dropped: Mapping[str, int]
    measures: Mapping[str, MeasureCorrelation]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return `{target, axes, n, dropped, measures: {name: {...}}}` of plain values; undefined is None."""
        return {
            "target": self.target,
            "axes": list(self.axes),
            "n": self.n,
            "dropped": dict(self.dropped),
            "measures": {name: dataclasses.asdict(value) for name, value in self.measures.items()},
        }


def correlate(
    models: pd.DataFrame,
    sharpness: pd.DataFrame | None = None,
    *,
    target: str = "gen_gap",
    axes: Sequence[str] | None = None,
    measures: Sequence[str] | None = None,
    seed_column: str = "seed",
    bootstrap: int = 1000,
    seed: int = 0,
) -> Correlations:
    """Correlate measures with a target over configurations.

    Args:
        models: One row per model: the `models/` table, or any table whose columns hold settings, target and
            measures.
        sharpness: The `sharpness/` table, a row per model and measure; None when the measures are columns of
            `models`.
        target: The column to compare with.
        axes: The settings that make a configuration. None: every column that varies and is no known result,
            no seed, no measure. In a table with seeds, a fractional column in which no value comes twice is a
            result of somebody's own, since the seeds of a configuration share its settings; a note tells.
        measures: Columns or labels to correlate. None: all labels of `sharpness`, or, with `axes` given,
            every other numeric column that varies.
        seed_column: The column that repeats a configuration. A table with neither axes nor seeds has one
            configuration per row.
        bootstrap: Resamples of the interval; 0 for none.
        seed: Seed of the resampling. Every measure has the same one, so that a measure's interval does not
            depend on which others are asked for.

    Returns:
        The correlations, in the order of `measures`.

    Raises:
        RequestError: A column is missing or not numeric, the target is constant or unknown everywhere, or the
            measures cannot be told from the axes.
    """
    if bootstrap < 0:
        raise RequestError(f"bootstrap: {bootstrap} resamples are impossible; give 0 for no interval.")
    table = frames.wide(models, sharpness)
    frames.check_columns(table, [target], role="target")
    frames.check_columns(table, axes or (), role="axis")
    seeds = {seed_column, *frames.SEED_COLUMNS}
    names = _measures(table, frames.labels(sharpness), target, axes, measures, seeds)
    frames.check_columns(table, names, role="measure")
    others = {target, *names, *frames.labels(sharpness), *seeds}
    known, notes = (list(axes), []) if axes is not None else _settings(table, others, seed_column)
    config_axes = tuple(axis for axis in known if axis not in seeds)

    dropped = _dropped_statuses(table)
    table = table[frames.kept(table)]
    goal = numeric_target(table, target)
    missing = np.isnan(goal)
    if missing.any():
        dropped[f"{target} is null"] = int(missing.sum())
    table, goal = table[~missing], goal[~missing]
    configs = _configurations(table, config_axes, seeds)

    results: dict[str, MeasureCorrelation] = {}
    for name in names:
        values = frames.numeric(table, name, role="measure")
        known_rows = ~np.isnan(values)
        if not known_rows.all():
            dropped[f"{name} is null"] = int((~known_rows).sum())
        resamples = kendall.affordable(len(np.unique(configs[known_rows])), bootstrap)
        if resamples < bootstrap:
            notes.append(f"{name}: {resamples} resamples instead of {bootstrap}, because the table is large")
        results[name] = _one(values[known_rows], goal[known_rows], configs[known_rows], resamples, seed)
    return Correlations(target, config_axes, len(table), dropped, results, tuple(notes))


def numeric_target(table: pd.DataFrame, target: str) -> Floats:
    """Return the target of rows that count, NaN where null.

    Args:
        table: Rows whose training came to an end.
        target: The name of the column.

    Returns:
        Shape `(rows,)`.

    Raises:
        RequestError: No row is left, or all have the same value: nothing can be ranked.
    """
    if table.empty:
        raise RequestError("no model is converged or finished, so there is nothing to correlate.")
    goal = frames.numeric(table, target, role="target")
    if np.isnan(goal).all():
        raise RequestError(f"target: column '{target}' is null for all {len(goal)} models that count.")
    if len(goal) > 1 and np.nanmin(goal) == np.nanmax(goal):
        raise RequestError(f"target: column '{target}' is constant ({np.nanmin(goal):g}), so nothing can be ranked.")
    return goal


def _measures(
    table: pd.DataFrame,
    labels: list[str],
    target: str,
    axes: Sequence[str] | None,
    measures: Sequence[str] | None,
    seeds: set[str],
) -> list[str]:
    """Those asked for, else all labels, else what is neither axis, seed nor result."""
    if measures is not None:
        return list(dict.fromkeys(measures))
    if labels:
        return labels
    others = frames.varying(table, exclude={target, *seeds, *(axes or ())})
    candidates = [column for column in others if pd.api.types.is_numeric_dtype(table[column])]
    if axes is not None and candidates:
        return candidates
    listing = f" Numeric columns that vary: {', '.join(candidates)}." if candidates else ""
    raise RequestError(f"measures: the table does not say which columns are measures; name them.{listing}")


def _settings(table: pd.DataFrame, others: set[str], seed_column: str) -> tuple[list[str], list[str]]:
    """The columns that make a configuration, and a note on those that look like settings and are none."""
    settings = frames.varying(table, exclude=others)
    unrepeated = frames.unrepeated(table, settings, seed_column)
    if not unrepeated:
        return settings, []
    listing = ", ".join(unrepeated)
    note = f"taken as results, not as axes, because no two seeds share a value: {listing}"
    return [setting for setting in settings if setting not in unrepeated], [note]


def _dropped_statuses(table: pd.DataFrame) -> dict[str, int]:
    out = table[~frames.kept(table)]
    if out.empty:
        return {}
    counts = out["status"].fillna("null").value_counts()
    return {f"status {status}": int(count) for status, count in counts.sort_index().items()}


def _configurations(table: pd.DataFrame, axes: Sequence[str], seeds: set[str]) -> npt.NDArray[np.int64]:
    """Number the configuration of every row."""
    if axes:
        keys = pd.DataFrame({axis: frames.hashable(table[axis]) for axis in axes})
        return np.asarray(keys.groupby(list(axes), dropna=False, sort=False).ngroup(), dtype=np.int64)
    if seeds & set(table.columns):
        return np.zeros(len(table), dtype=np.int64)
    return np.arange(len(table), dtype=np.int64)


def _one(values: Floats, goal: Floats, configs: npt.NDArray[np.int64], resamples: int, seed: int) -> MeasureCorrelation:
    means = pd.DataFrame({"x": values, "y": goal}).groupby(configs).mean()
    x, y = means["x"].to_numpy(), means["y"].to_numpy()
    low, high = _interval(x, y, resamples, seed)
    return MeasureCorrelation(
        tau=_defined(kendall.tau_b(x, y)),
        tau_low=low,
        tau_high=high,
        n=len(values),
        n_configs=len(x),
        tau_rows=_defined(kendall.tau_b(values, goal)),
        spearman=_defined(_scipy("spearmanr", x, y)),
        pearson=_defined(_scipy("pearsonr", x, y)),
    )


def _interval(x: Floats, y: Floats, resamples: int, seed: int) -> tuple[float | None, float | None]:
    if resamples == 0 or len(x) < FEWEST_CONFIGURATIONS or np.isnan(kendall.tau_b(x, y)):
        return None, None
    taus = kendall.bootstrap_tau(x, y, resamples=resamples, rng=np.random.default_rng(seed))
    low, high = np.nanquantile(taus, [0.025, 0.975])
    return float(low), float(high)


def _scipy(name: str, x: Floats, y: Floats) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    with warnings.catch_warnings():
        # a nearly constant measure is reported through the value itself, which the caller checks
        warnings.simplefilter("ignore")
        return float(getattr(stats, name)(x, y).statistic)


def _defined(value: float) -> float | None:
    return value if np.isfinite(value) else None
