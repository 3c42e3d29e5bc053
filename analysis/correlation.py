"""Correlation of sharpness measures with a target, over the configurations of any table of models.

A configuration is one value of every axis; the seeds repeat it. Seeds of one configuration are no
independent evidence about a measure, so the correlation is taken on seed means, and its interval resamples
configurations, never rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import stats

from flatmin.analysis import configurations, expression, frames, kendall
from flatmin.analysis.association import MeasureCorrelation, Request, associate, defined
from flatmin.analysis.axes import fixed_by, seeds_return, unrepeated
from flatmin.analysis.configurations import Bools, Configurations, Floats
from flatmin.errors import RequestError

RANDOM = "random"
"""The control that knows nothing: normal numbers from a fixed seed, one per model."""

SEED = "seed"
"""The column that repeats a configuration, unless another one is named."""

TRAINING_LOSS = "train_loss"
"""The control that a measure has to beat to be more than a proxy of the fit."""


@dataclass(frozen=True)
class Correlations:
    """The correlations of a table.

    Attributes:
        target: The column that the measures are compared with.
        axes: The settings that make a configuration, without seeds.
        n: Rows that count: training came to an end, the filter lets them pass, and the target is known.
        dropped: How many rows were left out, by reason.
        measures: One entry per measure.
        notes: What a reader has to know about how the numbers were made; mostly empty.
        controls: The same for what a measure has to beat: a random one, and the training loss where it is known. They
            are in no q-value.
        filter: The filter, as it was given.
        convergence: What `tau_converged` is of: the filter, or the models that are `converged`; None without either.
    """

    target: str
    axes: tuple[str, ...]
    n: int
    dropped: Mapping[str, int]
    measures: Mapping[str, MeasureCorrelation]
    notes: tuple[str, ...] = ()
    controls: Mapping[str, MeasureCorrelation] = field(default_factory=dict)
    filter: str | None = None
    convergence: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return `{target, axes, n, dropped, measures: {name: {...}}}` of plain values; undefined is None."""
        return {
            "target": self.target,
            "axes": list(self.axes),
            "n": self.n,
            "dropped": dict(self.dropped),
            "measures": {name: value.to_json() for name, value in self.measures.items()},
        }


def correlate(
    models: pd.DataFrame,
    sharpness: pd.DataFrame | None = None,
    *,
    target: str = "gen_gap",
    axes: Sequence[str] | None = None,
    measures: Sequence[str] | None = None,
    seed_column: str = SEED,
    filter: str | None = None,
    test_examples: int | None = None,
    controls: bool = True,
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
            no seed, no measure, and that the choice of plug-ins does not fix (`axes.fixed_by`). In a table with seeds,
            a fractional column in which no value comes twice is a result of somebody's own, since the seeds of a
            configuration share its settings. Notes tell.
        measures: Columns or labels to correlate. None: all labels of `sharpness`, or, with `axes` given,
            every other numeric column that varies.
        seed_column: The column that repeats a configuration. A table with neither axes nor seeds has one
            configuration per row.
        filter: Which models count, such as `train_loss <= 0.01`; see `expression.matches`.
        test_examples: The number of test examples behind the target, a gap of accuracy in fractions: the sign error
            then leaves out differences that may be chance. None: every pair of seeds weighs the same.
        controls: Whether a random measure and the training loss are correlated too.
        bootstrap: Resamples of the intervals; 0 for none.
        seed: Seed of the resampling. Every measure has the same one, so that a measure's interval does not
            depend on which others are asked for.

    Returns:
        The correlations, in the order of `measures`.

    Raises:
        RequestError: A column is missing or not numeric, the target is constant or unknown everywhere, the filter
            cannot be read or leaves nothing, or the measures cannot be told from the axes.
    """
    if bootstrap < 0:
        raise RequestError(f"bootstrap: {bootstrap} resamples are impossible; give 0 for no interval.")
    table = frames.wide(models, sharpness)
    frames.check_columns(table, [target], role="target")
    frames.check_columns(table, axes or (), role="axis")
    seeds = {seed_column, *(name for name in table.columns if frames.is_seed(name))}
    names = _measures(table, frames.labels(sharpness), target, axes, measures, seeds)
    frames.check_columns(table, names, role="measure")
    _check_roles(table, target, axes or (), names, seed_column)
    others = {target, *names, *frames.labels(sharpness), *seeds}
    known, notes = (list(axes), []) if axes is not None else _settings(table, others, seed_column)
    config_axes = tuple(dict.fromkeys(axis for axis in known if axis not in seeds))
    if left := [axis for axis in known if axis in seeds]:
        notes.append(f"no axis, because the runs of a configuration differ in it: {', '.join(left)}")

    dropped = _dropped_statuses(table)
    table = table[frames.kept(table)]
    passed = np.ones(len(table), dtype=np.bool_) if filter is None else _passed(table, filter)
    if not passed.all():
        dropped[f"filter {filter}"] = int((~passed).sum())
    goal = numeric_target(table, target)
    _check_test_examples(test_examples, goal, target)
    missing = np.isnan(goal)
    if (missing & passed).any():
        dropped[f"{target} is null"] = int((missing & passed).sum())
    rows = _Rows(table, configurations.of(table, config_axes, repeated=bool(seeds & set(table.columns))), goal)

    if axes is None and len(rows.configurations) == len(table) and seeds_return(table, seed_column):
        notes.append(
            f"no configuration has two models, although values of '{seed_column}' come again: if one of the axes is a "
            "result, name the axes (--axes)"
        )
    values = {name: frames.numeric(table, name, role="measure") for name in names}
    for name in names:
        unknown = int((np.isnan(values[name]) & passed & ~missing).sum())
        dropped |= {f"{name} is null": unknown} if unknown else {}
    beside = _controls(table, names) if controls else {}
    request = Request(bootstrap, seed, test_examples)
    found, told = _associate(rows, values | beside, passed & ~missing, request)
    if test_examples is not None and not any(error.environments for one in found.values() for error in one.sign_error):
        told.append(f"sign error: {test_examples} test examples tell no two configurations apart from chance")
    convergence, converged = _convergence(table, passed, filter)
    found = {name: _both_ways(one, rows, (values | beside)[name], passed, converged) for name, one in found.items()}
    return Correlations(
        target,
        config_axes,
        int((passed & ~missing).sum()),
        dropped,
        _with_q({name: found[name] for name in names}),
        tuple([*notes, *_mixed(table), *told]),
        {name: found[name] for name in beside},
        filter,
        convergence,
    )


@dataclass(frozen=True)
class _Rows:
    """The models whose training came to an end."""

    table: pd.DataFrame
    configurations: Configurations
    goal: Floats


def _passed(table: pd.DataFrame, filter: str) -> Bools:
    passed = expression.matches(table, filter)
    if len(table) and not passed.any():
        raise RequestError(f"filter '{filter}': none of {len(table)} models passes it.")
    return passed


def _check_roles(table: pd.DataFrame, target: str, axes: Sequence[str], names: Sequence[str], seed_column: str) -> None:
    """Refuse a column that plays two parts, and a seed column that was named and is not there."""
    if target in names:
        raise RequestError(f"measures: '{target}' is the target; give measures that may predict it.")
    if target in axes:
        raise RequestError(f"axes: '{target}' is the target; give settings that tell configurations apart.")
    if seed_column != SEED:
        frames.check_columns(table, [seed_column], role="seed column")


def _check_test_examples(test_examples: int | None, goal: Floats, target: str) -> None:
    if test_examples is None:
        return
    if test_examples < 1:
        raise RequestError(f"test examples: {test_examples} is impossible; give the size of the test set.")
    if np.nanmax(np.abs(goal)) > 1:
        raise RequestError(
            f"test examples: column '{target}' is no gap of accuracy in fractions (it reaches "
            f"{np.nanmax(np.abs(goal)):g}), so the weights of the sign error are not known; leave them out."
        )


def _controls(table: pd.DataFrame, names: Sequence[str]) -> dict[str, Floats]:
    found = {RANDOM: random_control(len(table))}
    if TRAINING_LOSS in table.columns and pd.api.types.is_numeric_dtype(table[TRAINING_LOSS]):
        found[TRAINING_LOSS] = frames.numeric(table, TRAINING_LOSS, role="control")
    return {name: values for name, values in found.items() if name not in names}


def random_control(count: int) -> Floats:
    """Return the control that knows nothing.

    Args:
        count: How many models' training came to an end.

    Returns:
        Standard normal numbers, the same for the same count.
    """
    return np.random.default_rng(0).standard_normal(count)


def _associate(
    rows: _Rows, values: Mapping[str, Floats], counts: Bools, request: Request
) -> tuple[dict[str, MeasureCorrelation], list[str]]:
    """Take together the measures that are known for the same models, for they share most of the work."""
    alike: dict[bytes, list[str]] = {}
    known = {name: counts & ~np.isnan(column) for name, column in values.items()}
    for name, mask in known.items():
        alike.setdefault(mask.tobytes(), []).append(name)
    found: dict[str, MeasureCorrelation] = {}
    told: dict[str, None] = {}
    for names in alike.values():
        mask = known[names[0]]
        part = rows.configurations.take(mask)
        some, notes = associate(part, {name: values[name][mask] for name in names}, rows.goal[mask], request)
        found |= some
        told |= dict.fromkeys(notes)
    return found, list(told)


def _convergence(table: pd.DataFrame, passed: Bools, filter: str | None) -> tuple[str | None, Bools | None]:
    """What says that a model converged: the filter, else our own statuses."""
    if filter is not None:
        return filter, passed
    if "status" in table.columns and table["status"].isin(frames.STATUSES).any():
        return "status is converged", (table["status"] == "converged").to_numpy(dtype=np.bool_)
    return None, None


def _both_ways(
    one: MeasureCorrelation, rows: _Rows, values: Floats, passed: Bools, converged: Bools | None
) -> MeasureCorrelation:
    """Add tau with and without the convergence filter."""
    known = ~np.isnan(values) & ~np.isnan(rows.goal)
    found: list[tuple[float | None, int | None]] = []
    for mask in (None if converged is None else known & converged, known):
        if mask is None:
            found.append((None, None))
        elif np.array_equal(mask, known & passed):
            found.append((one.tau, one.n))
        else:
            part = rows.configurations.take(mask)
            tau = kendall.tau_b(part.means(values[mask]), part.means(rows.goal[mask])) if mask.any() else float("nan")
            found.append((defined(tau), int(mask.sum())))
    (tau_converged, n_converged), (tau_all, n_all) = found
    return dataclasses.replace(one, tau_converged=tau_converged, n_converged=n_converged, tau_all=tau_all, n_all=n_all)


def _with_q(found: Mapping[str, MeasureCorrelation]) -> dict[str, MeasureCorrelation]:
    """Add Benjamini-Hochberg q-values over the measures that have a p-value."""
    p = {name: one.p for name, one in found.items() if one.p is not None}
    q = dict(zip(p, stats.false_discovery_control(list(p.values())), strict=True)) if p else {}
    return {name: dataclasses.replace(one, q=float(q[name])) if name in q else one for name, one in found.items()}


def _mixed(table: pd.DataFrame) -> list[str]:
    if "study" not in table.columns or table["study"].nunique() < 2:
        return []
    studies = [str(study) for study in table["study"].dropna().unique()]
    return [f"models of {len(studies)} studies are mixed: {', '.join(studies)}"]


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
    """The columns that make a configuration, and notes on the others that vary."""
    settings = frames.varying(table, exclude=others)
    if "study" in table.columns and table["study"].nunique() > 1:
        settings = ["study", *settings]
    notes = []
    if results := unrepeated(table, settings, seed_column):
        notes.append(f"taken as results, not as axes, because no two seeds share a value: {', '.join(results)}")
    settings = [setting for setting in settings if setting not in results]
    fixed = fixed_by(table, settings)
    for by in dict.fromkeys(fixed.values()):
        named = ", ".join(setting for setting in fixed if fixed[setting] == by)
        notes.append(f"no axis of its own, because fixed by {' and '.join(by)}: {named}")
    return [setting for setting in settings if setting not in fixed], notes


def _dropped_statuses(table: pd.DataFrame) -> dict[str, int]:
    out = table[~frames.kept(table)]
    if out.empty:
        return {}
    counts = out["status"].fillna("null").value_counts()
    return {f"status {status}": int(count) for status, count in counts.sort_index().items()}
