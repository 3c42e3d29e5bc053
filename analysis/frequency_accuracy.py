"""Accuracy against the errors of Fourier coefficients: correlation, and a Lasso with its stability over seeds.

A point is one recorded epoch of one optimizer, accuracy and Delta F averaged over its models. The epochs of a training
are no independent evidence, so that every interval resamples models, within each optimizer, and averages anew; and the
fit is tried on models that it has not seen. The Lasso is the published one: both sides standardised, the least
||y - X b||² / 2n + 0.01 |b|_1 (Tibshirani 1996), on the lowest ten frequencies and the last 70 % of the epochs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.linear_model import Lasso

from flatmin.analysis import bootstrap, frames, frequency
from flatmin.analysis.configurations import Floats
from flatmin.analysis.frequency import Curves

PENALTY = 0.01
FREQUENCIES = 10
AFTER = 0.3
"""Part of the training that is left out of the regression."""

FEWEST_EPOCHS = 5
MOST_EPOCHS = 300
"""Epochs that follow each other closely tell the same; of more, so many are taken, evenly spread."""

POOLED = "all optimizers"

RESAMPLES = 100


@dataclass(frozen=True)
class Panel:
    """Accuracy and errors of one line, NaN where a model has none.

    Attributes:
        epochs: Shape `(epochs,)`.
        ks: The frequencies, shape `(frequencies,)`.
        accuracy: Shape `(models, epochs)`.
        errors: Delta F, shape `(models, epochs, frequencies)`.
    """

    epochs: Floats
    ks: Floats
    accuracy: Floats
    errors: Floats


@dataclass(frozen=True)
class Association:
    """How accuracy goes with the mean error, over the epochs of one line.

    Attributes:
        line: The optimizer.
        models: How many models are averaged.
        epochs: How many points.
        pearson: The linear correlation; None where a side is constant.
        low: Lower end of its 95 % interval (Fisher's z); None for one model.
        high: The upper end.
        spearman: The rank correlation; None where a side is constant.
        slope: Of the least-squares line, accuracy per unit of error.
        intercept: Of the same.
    """

    line: str
    models: int
    epochs: int
    pearson: float | None
    low: float | None
    high: float | None
    spearman: float | None
    slope: float | None
    intercept: float | None


@dataclass(frozen=True)
class Regression:
    """The Lasso of one line or of all.

    Attributes:
        line: The optimizer, or `POOLED`.
        models: The fewest models that a line has.
        epochs: How many points.
        coefficients: One row per frequency: `k`, `coefficient` (deviations of accuracy per deviation of Delta F),
            `low`, `high` (95 %, null for one model) and `same_sign`, the share of resamples whose coefficient has the
            same sign, of one that is 0 the share that is 0.
        r2: The explained part of the variance of the points that were fitted.
        r2_low: Lower end of its 95 % interval over resamples, percentiles; None for one model.
        r2_high: The upper end.
        r2_unseen: The same of a model that was left out of the fit, mean over which; negative where the mean does
            better; None for one model.
    """

    line: str
    models: int
    epochs: int
    coefficients: pd.DataFrame
    r2: float
    r2_low: float | None
    r2_high: float | None
    r2_unseen: float | None


def accuracy_column(epochs: pd.DataFrame) -> str | None:
    """Choose the accuracy to explain.

    Args:
        epochs: Rows of the `epochs/` table.

    Returns:
        `val_acc`; `test_acc` where no model has a validation set, for a frequency study then has its validation images
        as test set; None where there is no accuracy.
    """
    known = [name for name in ("val_acc", "test_acc") if name in epochs.columns and epochs[name].notna().any()]
    return known[0] if known else None


def panels(error: pd.DataFrame, epochs: pd.DataFrame, column: str) -> dict[str, Panel]:
    """Bring accuracy and errors of the same epochs together.

    Args:
        error: `frequency.Curves.error`.
        epochs: Rows of the `epochs/` table.
        column: The accuracy.

    Returns:
        One per line that has both, of at most `MOST_EPOCHS` epochs. A frequency that some model never has is left out.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    frames.check_columns(epochs, ["model_id", "epoch", column], role="epochs table")
    wide = error.pivot(index=["line", "model_id", "epoch"], columns="k", values="value")
    wide.columns = wide.columns.astype(float)
    by_model = wide.notna().groupby("model_id", observed=True).any()
    ks = wide.columns[by_model.all()]
    own = epochs[["model_id", "epoch"]].assign(accuracy=frames.numeric(epochs, column, role="epochs table"))
    if ks.empty:
        return {}
    flat = wide[ks].reset_index().astype({"line": str, "model_id": str})
    both = flat.merge(own.astype({"model_id": str, "epoch": float}), on=["model_id", "epoch"]).dropna()
    return {str(line): _panel(part, ks.to_numpy()) for line, part in both.groupby("line")}


def _panel(rows: pd.DataFrame, ks: Floats) -> Panel:
    rows = rows[rows["epoch"].isin(frames.spread(np.sort(rows["epoch"].unique()).tolist(), MOST_EPOCHS))]
    model, ids = pd.factorize(rows["model_id"], sort=True)
    time, epochs = pd.factorize(rows["epoch"], sort=True)
    accuracy = np.full((len(ids), len(epochs)), np.nan)
    errors = np.full((len(ids), len(epochs), len(ks)), np.nan)
    accuracy[model, time] = rows["accuracy"]
    errors[model, time] = rows[list(ks)]
    return Panel(np.asarray(epochs, dtype=np.float64), ks, accuracy, errors)


def means(values: Floats, counts: Floats) -> Floats:
    """Average over models, those counted that have a value.

    Args:
        values: Shape `(models, ...)`, NaN where a model has none.
        counts: How often each model counts, shape `(models,)`.

    Returns:
        Shape `(...)`; NaN where no model that counts has a value.
    """
    known = np.isfinite(values)
    total = np.tensordot(counts, np.where(known, values, 0), axes=1)
    weight = np.tensordot(counts, known.astype(np.float64), axes=1)
    return np.asarray(np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0))


def associations(found: Mapping[str, Panel], *, resamples: int = RESAMPLES, seed: int = 0) -> list[Association]:
    """Correlate accuracy with the mean error over the epochs of every line.

    Args:
        found: What `panels` returned.
        resamples: How many resamples of models give the interval.
        seed: Of the resamples.
    """
    return [_association(line, panel, resamples, seed) for line, panel in found.items()]


def _association(line: str, panel: Panel, resamples: int, seed: int) -> Association:
    models = len(panel.accuracy)
    x, y = _mean_error(panel, np.ones(models))
    r = _pearson(x, y)
    if math.isnan(r):
        return Association(line, models, len(x), None, None, None, None, None, None)
    draws = bootstrap.draw(models, resamples, seed).counts
    drawn = np.array([_pearson(*_mean_error(panel, counts)) for counts in draws])
    with np.errstate(divide="ignore"):
        low, high = frequency.interval(float(np.arctanh(r)), np.arctanh(drawn), models)
    if low is not None and high is not None:
        low, high = math.tanh(low), math.tanh(high)
    fitted = stats.linregress(x, y)
    rank = float(stats.spearmanr(x, y).statistic)
    return Association(line, models, len(x), r, low, high, rank, float(fitted.slope), float(fitted.intercept))


def _mean_error(panel: Panel, counts: Floats) -> tuple[Floats, Floats]:
    """Mean error and accuracy of every epoch that some model has."""
    x, y = means(panel.errors.mean(axis=2), counts), means(panel.accuracy, counts)
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def _pearson(x: Floats, y: Floats) -> float:
    """The linear correlation; NaN where a side is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def regressions(found: Mapping[str, Panel], *, resamples: int = RESAMPLES, seed: int = 0) -> list[Regression]:
    """Fit the Lasso on all lines together, and on each.

    Args:
        found: What `panels` returned.
        resamples: How many resamples of models tell the stability.
        seed: Of the resamples.

    Returns:
        The pooled one first, where there are several lines; none for lines with a constant accuracy, or with fewer than
        five epochs.
    """
    late = {line: _late(panel) for line, panel in found.items()}
    groups = [(line, [panel]) for line, panel in late.items()]
    if len(late) > 1:
        groups.insert(0, (POOLED, list(late.values())))
    return [one for line, some in groups if (one := _regression(line, some, resamples, seed)) is not None]


def as_published(found: Sequence[Curves], epochs: pd.DataFrame) -> dict[str, float]:
    """Return what the published Lasso says, of our models: the numbers `lasso_r2` and `lasso_coefficient(i)`.

    It is the pooled one of the published axis, i its index, less the epochs at which the accuracy of an optimizer is
    more than one deviation below its mean; coefficients are divided by the largest one.

    Args:
        found: What `frequency.read` returned.
        epochs: Rows of the `epochs/` table; may be empty.

    Returns:
        Numbers by name; empty where no spectrum has the published axis, or there is too little to fit.
    """
    column = None if epochs.empty else accuracy_column(epochs)
    theirs = [one.error for one in found if one.published and len(one.error)]
    if column is None or not theirs:
        return {}
    late = [_without_falls(_late(panel)) for panel in panels(theirs[0], epochs, column).values()]
    if not late or min(len(panel.epochs) for panel in late) < FEWEST_EPOCHS:
        return {}
    x, y = _points(late, [np.ones(len(panel.accuracy)) for panel in late])
    if np.ptp(y) == 0:
        return {}
    fitted = _fit(x, y)
    largest = np.abs(fitted.coefficients).max()
    scaled = fitted.coefficients / largest if largest > 0 else fitted.coefficients
    named = {f"lasso_coefficient({k:g})": float(value) for k, value in zip(late[0].ks, scaled, strict=True)}
    return {"lasso_r2": fitted.r2, **named}


def _without_falls(panel: Panel) -> Panel:
    accuracy = means(panel.accuracy, np.ones(len(panel.accuracy)))
    kept = accuracy >= accuracy.mean() - accuracy.std()
    return Panel(panel.epochs[kept], panel.ks, panel.accuracy[:, kept], panel.errors[:, kept])


def _late(panel: Panel) -> Panel:
    kept = panel.epochs > AFTER * panel.epochs.max()
    ks = np.sort(panel.ks)[:FREQUENCIES]
    return Panel(panel.epochs[kept], ks, panel.accuracy[:, kept], panel.errors[:, kept][..., np.isin(panel.ks, ks)])


def _regression(line: str, some: list[Panel], resamples: int, seed: int) -> Regression | None:
    sizes = [len(panel.accuracy) for panel in some]
    x, y = _points(some, [np.ones(size) for size in sizes])
    if min(len(panel.epochs) for panel in some) < FEWEST_EPOCHS or np.ptp(y) == 0:
        return None
    fitted = _fit(x, y)
    table = pd.DataFrame({"k": some[0].ks, "coefficient": fitted.coefficients})
    drawn = [] if min(sizes) < 2 else _refits(some, sizes, resamples, seed)
    if 2 * len(drawn) < max(1, resamples):
        table = table.assign(low=math.nan, high=math.nan, same_sign=math.nan)
        return Regression(line, min(sizes), len(y), table, fitted.r2, None, None, None)
    repeated = np.array([one.coefficients for one in drawn])
    ends = [
        frequency.interval(float(own), others, min(sizes))
        for own, others in zip(fitted.coefficients, repeated.T, strict=True)
    ]
    table[["low", "high"]] = np.array(ends, dtype=np.float64)
    table["same_sign"] = (np.sign(repeated) == np.sign(fitted.coefficients)).mean(axis=0)
    low, high = np.nanquantile([one.r2 for one in drawn], [0.025, 0.975])
    unseen = _unseen(some, sizes)
    return Regression(line, min(sizes), len(y), table, fitted.r2, float(low), float(high), unseen)


def _refits(some: list[Panel], sizes: list[int], resamples: int, seed: int) -> list[_Fitted]:
    """Fit resamples of models; fewer where models stopped early, and those that are drawn have too few late epochs."""
    draws = [bootstrap.draw(size, resamples, seed + place).counts for place, size in enumerate(sizes)]
    points = [_points(some, list(counts)) for counts in zip(*draws, strict=True)]
    return [_fit(*own) for own in points if len(own[1]) >= FEWEST_EPOCHS]


def _points(some: list[Panel], counts: list[Floats]) -> tuple[Floats, Floats]:
    """The epochs of all lines below each other: errors and accuracy."""
    x = np.concatenate([means(panel.errors, own) for panel, own in zip(some, counts, strict=True)])
    y = np.concatenate([means(panel.accuracy, own) for panel, own in zip(some, counts, strict=True)])
    known = np.isfinite(y) & np.isfinite(x).all(axis=1)
    return x[known], y[known]


@dataclass(frozen=True)
class _Fitted:
    """A Lasso of standardised columns, and the means and deviations that they were standardised with."""

    coefficients: Floats
    r2: float
    centre: Floats
    scale: Floats

    def r2_of(self, x: Floats, y: Floats) -> float:
        """R² of points that were not fitted, whose accuracy has its own mean."""
        found = self._standardised(x, y)
        own = found[:, -1]
        rest = own - found[:, :-1] @ self.coefficients
        return float(1 - (rest @ rest) / ((own - own.mean()) @ (own - own.mean()))) if np.ptp(own) else math.nan

    def _standardised(self, x: Floats, y: Floats) -> Floats:
        return np.asarray((np.column_stack([x, y]) - self.centre) / self.scale)


def _fit(x: Floats, y: Floats) -> _Fitted:
    both = np.column_stack([x, y])
    centre, scale = both.mean(axis=0), both.std(axis=0)
    # a constant column has nothing to tell, and gets the coefficient 0
    scale = np.where(np.ptp(both, axis=0) > 0, scale, 1.0)
    z = (both - centre) / scale
    model = Lasso(alpha=PENALTY, fit_intercept=False, max_iter=100_000).fit(z[:, :-1], z[:, -1])
    unfitted = _Fitted(model.coef_, math.nan, centre, scale)
    return _Fitted(model.coef_, unfitted.r2_of(x, y), centre, scale)


def _unseen(some: list[Panel], sizes: list[int]) -> float | None:
    """Fit without one model of each line, and explain its own curve; the mean over which is left out."""
    found = []
    for place in range(min(sizes)):
        rest = [np.where(np.arange(size) == place, 0.0, 1.0) for size in sizes]
        alone = [1 - own for own in rest]
        fitted, other = _points(some, rest), _points(some, alone)
        if min(len(fitted[1]), len(other[1])) >= FEWEST_EPOCHS:
            found.append(_fit(*fitted).r2_of(*other))
    known = [value for value in found if math.isfinite(value)]
    return float(np.mean(known)) if known else None
