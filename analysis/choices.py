"""What a reader of the report may choose: which models count, and how seeds are handled; all computed beforehand.

The filter is `all` (training came to an end) or `converged` (`stop_loss` was reached). Seeds are averaged (`means`: a
configuration counts once, intervals resample configurations), or every model counts (`rows`: no intervals, for the
seeds of a configuration are no independent evidence).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from flatmin.analysis import configurations, frames, kendall
from flatmin.analysis.association import MeasureCorrelation, defined
from flatmin.analysis.configurations import Configurations, Floats
from flatmin.analysis.correlation import RANDOM, Correlations, correlate, random_control
from flatmin.analysis.granulated import granulated
from flatmin.analysis.granulated import mean as psi_mean
from flatmin.analysis.partial import partial_rank
from flatmin.errors import RequestError

FILTERS: Mapping[str, str] = {"all": "all that ended", "converged": "those that reached stop_loss"}
SEEDS: Mapping[str, str] = {"means": "mean over seeds", "rows": "every model"}

_SEED = "seed of the row"
"""The seed as one more axis, under a name that no setting has."""


@dataclass(frozen=True)
class View:
    """The tables of one choice.

    Attributes:
        filter: A key of `FILTERS`.
        seeds: A key of `SEEDS`.
        models: All models, with those that the filter keeps out marked as another status.
        result: The correlations, or None.
        reason: Why there are none; else empty.
    """

    filter: str
    seeds: str
    models: pd.DataFrame
    result: Correlations | None
    reason: str

    @property
    def of(self) -> dict[str, str]:
        """The choice, as the page's controls say it."""
        return {"filter": self.filter, "seeds": self.seeds}


def views(models: pd.DataFrame, sharpness: pd.DataFrame, target: str) -> list[View]:
    """Compute every choice that makes a difference, the default one first.

    Args:
        models: Rows of the `models/` table.
        sharpness: Rows of the `sharpness/` table; may be empty.
        target: The column that measures are compared with.
    """
    kept = frames.kept(models)
    filters = {"all": models}
    if "status" in models.columns:
        converged = models["status"] == "converged"
        if 0 < converged.sum() < kept.sum():
            filters["converged"] = models.assign(status=models["status"].mask(kept & ~converged, "filtered out"))
    found = []
    for name, table in filters.items():
        result, reason = _correlations(table, sharpness, target)
        found.append(View(name, "means", table, result, reason))
        if _repeats(models[kept]):
            rows = None if result is None else _on_rows(table, sharpness, result)
            found.append(View(name, "rows", table, rows, reason))
    return found


def _correlations(models: pd.DataFrame, sharpness: pd.DataFrame, target: str) -> tuple[Correlations | None, str]:
    if sharpness.empty:
        return None, "no measure was taken."
    try:
        return correlate(models, sharpness, target=target), ""
    except RequestError as problem:
        return None, str(problem)


def _repeats(models: pd.DataFrame) -> bool:
    """Tell whether some configuration has several models."""
    return len(configurations.of(models, frames.varying(models), repeated=True)) < len(models)


def _on_rows(models: pd.DataFrame, sharpness: pd.DataFrame, result: Correlations) -> Correlations:
    """The same with every model for itself; the seed is one more setting that partial and psi hold fixed."""
    table = frames.wide(models, sharpness)
    table = table[frames.kept(table)].reset_index(drop=True)
    goal = frames.numeric(table, result.target, role="target")
    axes = list(result.axes)
    if "seed" in table.columns and table["seed"].nunique() > 1:
        table, axes = table.assign(**{_SEED: table["seed"]}), [*axes, _SEED]
    whole = configurations.of(table, axes, repeated=True)
    absent = None if whole.absent is None else whole.absent[whole.rows]
    each = Configurations(whole.axes, whole.levels[whole.rows], np.arange(len(table)), absent)

    def one(name: str, known: MeasureCorrelation) -> MeasureCorrelation:
        control = name == RANDOM and RANDOM not in result.measures
        values = random_control(len(table)) if control else frames.numeric(table, name, role="measure")
        there = np.isfinite(values) & np.isfinite(goal)
        return _row_statistics(each.take(there), values[there], goal[there], known)

    return dataclasses.replace(
        result,
        measures={name: one(name, known) for name, known in result.measures.items()},
        controls={name: one(name, known) for name, known in result.controls.items()},
    )


def _row_statistics(rows: Configurations, x: Floats, y: Floats, known: MeasureCorrelation) -> MeasureCorrelation:
    tau = kendall.tau_b(x, y)
    partial = partial_rank(x, y, rows.levels) if rows.axes else math.nan
    psi = {axis: found for axis, found in granulated(rows, x, y).items() if axis != _SEED}
    return MeasureCorrelation(
        tau=defined(tau),
        tau_low=None,
        tau_high=None,
        n=len(x),
        n_configs=known.n_configs,
        tau_rows=defined(tau),
        spearman=None,
        pearson=None,
        partial=defined(partial),
        sign_flip=bool(tau * partial < 0) if math.isfinite(tau * partial) else None,
        psi=psi,
        psi_mean=psi_mean(psi),
    )
