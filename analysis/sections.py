"""The report's figures: which ones fit the data, each with its caption, and a reason for each left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd
import plotly.graph_objects as go

from flatmin.analysis import curves, frames, peak
from flatmin.analysis.correlation import Correlations
from flatmin.analysis.figures import (
    against_axis,
    correlations,
    density,
    published,
    scatter,
    surface,
    theme,
    training,
)

MAIN_AXES = ("width", "label_noise", "data_noise")
"""The settings that a study most likely is about, in this order."""

FEWEST_VALUES = 5
"""An axis with fewer values than this gives a table, not a curve."""

MOST_LABELS = 4
"""Measures of one kind of curve that are drawn; the others are named."""


PUBLISHED = "Beside the published numbers"
"""The heading of the figure, and of its table."""

NEAR = 2.0
"""Standard errors up to which a finding calls a difference small."""


@dataclass(frozen=True)
class Section:
    """One figure of the report.

    Attributes:
        name: A plain word: the figure's id and the name of its download.
        heading: What the figure is, in a few words.
        caption: What is averaged over what, what the band is, what to look for.
        figure: The picture.
        data: The numbers in it.
        findings: What the numbers say, a sentence per line of the figure; may be empty.
    """

    name: str
    heading: str
    caption: str
    figure: go.Figure
    data: pd.DataFrame
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Left:
    """A figure that does not fit the data.

    Attributes:
        heading: The figure that is not there.
        reason: Why.
    """

    heading: str
    reason: str


def main_axis(models: pd.DataFrame) -> str | None:
    """Choose the setting that the errors are drawn against.

    Args:
        models: Rows of the `models/` table.

    Returns:
        Width, label noise or data noise, else any numeric setting, with at least `FEWEST_VALUES` values;
        None where there is none.
    """
    axes = frames.varying(models)
    ranked = [axis for axis in MAIN_AXES if axis in axes] + [axis for axis in axes if axis not in MAIN_AXES]
    for axis in ranked:
        if pd.api.types.is_numeric_dtype(models[axis]) and models[axis].nunique() >= FEWEST_VALUES:
            return axis
    return None


def line_axis(models: pd.DataFrame, main: str) -> str | None:
    """Choose the setting that makes further lines in the figure against the main axis.

    Args:
        models: Rows of the `models/` table.
        main: The setting on the x axis.
    """
    axes = [axis for axis in frames.varying(models) if axis != main]
    named = ("label_noise", "data_noise", "optimizer", "network", "dataset")
    for axis in [axis for axis in named if axis in axes]:
        if models[axis].notna().all():
            return axis
    return None


def figures(
    models: pd.DataFrame,
    epochs: pd.DataFrame,
    sharpness: pd.DataFrame,
    result: Correlations | None,
    *,
    target: str,
    spectra: pd.DataFrame | None = None,
    compared: pd.DataFrame | None = None,
) -> tuple[list[Section], list[Left]]:
    """Make every figure that fits, in reading order.

    Args:
        models: Rows of the `models/` table.
        epochs: Rows of the `epochs/` table; may be empty.
        sharpness: Rows of the `sharpness/` table; may be empty.
        result: The correlations, or None where there are none.
        target: The column that measures are compared with.
        spectra: Rows of the `spectra/` table; None or empty leave its figures out without a word.
        compared: What `published.compare` returned; None or empty leave its figure out without a word.

    Returns:
        The figures, and those left out with the reason.
    """
    shown: list[Section] = []
    left: list[Left] = []
    makers: list[tuple[str, Callable[[], Section | str]]] = [
        ("Errors and measures against the main setting", lambda: _against(models, sharpness)),
        ("Measures against the gap", lambda: _scatter(models, sharpness, target)),
        ("Rank correlation", lambda: _correlations(result)),
        *(_curves(spectra, models, target) if spectra is not None and len(spectra) else ()),
        ("Training curves", lambda: _training(epochs, models)),
        *([(PUBLISHED, lambda: _published(compared))] if compared is not None and len(compared) else ()),
    ]
    for heading, make in makers:
        made = make()
        if isinstance(made, Section):
            shown.append(made)
        else:
            left.append(Left(heading, made))
    return shown, left


def _filter(models: pd.DataFrame) -> str:
    kept = int(frames.kept(models).sum())
    rest = len(models) - kept
    return f"Models converged or finished: n = {kept}" + (f"; {rest} diverged left out." if rest else ".")


def _pooled(models: pd.DataFrame, used: tuple[str | None, ...]) -> str:
    """What a mean is taken over: seeds, and every axis that is not drawn."""
    others = [axis for axis in frames.varying(models) if axis not in used]
    return "over seeds" + (f" and, pooled, over {', '.join(others)}" if others else "")


def _some_of(models: pd.DataFrame, axis: str | None, most: int) -> str:
    """Say that a figure shows a part of an axis, where it does."""
    count = len(frames.ordered(models[axis])) if axis else 0
    return f" Of {count} values of {axis}, {most} are drawn." if count > most else ""


def _against(models: pd.DataFrame, sharpness: pd.DataFrame) -> Section | str:
    axis = main_axis(models)
    if axis is None:
        return f"no numeric setting has {FEWEST_VALUES} values or more."
    by = line_axis(models, axis)
    data = against_axis.data(models, sharpness, axis=axis, by=by)
    if data.empty:
        return "no model that counts has a test result."
    error = data[data["quantity"].isin(["test_error", "test_loss"])]
    findings = []
    for value, curve in error.groupby("by_value", dropna=False, sort=False):
        said = peak.sentence(curve)
        findings.append(f"{by} {theme.format_value(value)}: {said}" if by and said else said)
    caption = (
        f"{_filter(models)} Lines: mean {_pooled(models, (axis, by))}. Bands: lowest to highest model. Look "
        "for a second descent of the test error beyond the point where the training error reaches zero, and "
        "for whether the measures turn there too."
    )
    caption += _some_of(models, by, against_axis.MOST_LINES)
    heading = f"Errors and measures against {axis}"
    return Section("against-axis", heading, caption, against_axis.draw(data), data, tuple(filter(None, findings)))


def _scatter(models: pd.DataFrame, sharpness: pd.DataFrame, target: str) -> Section | str:
    if sharpness.empty:
        return "no measure was taken."
    data = scatter.data(models, sharpness, target=target)
    if data.empty:
        return f"no model that counts has both a measure and {target}."
    bars = (
        "Horizontal bars: one standard error of the measure."
        if data.groupby("measure").size().max() <= scatter.MOST_ERROR_BARS and data["stderr"].notna().any()
        else "Standard errors are in the data, not drawn."
    )
    caption = (
        f"{_filter(models)} One point per model, seeds not averaged; values at the last measured epoch. "
        f"{bars} Look for a trend that holds within one colour too: a trend only between colours belongs to "
        "the setting."
    )
    return Section("scatter", f"Measures against {target}", caption, scatter.draw(data), data)


def _correlations(result: Correlations | None) -> Section | str:
    if result is None:
        return "there is nothing to correlate."
    data = correlations.data(result)
    axes = ", ".join(result.axes) or "none"
    caption = (
        f"Kendall τ-b of each measure with {result.target}, on seed means over configurations (axes: "
        f"{axes}). Models converged or finished: n = {result.n}. Bars: 95 % percentile interval of a "
        "bootstrap that resamples configurations. Look for intervals clear of zero. All configurations are "
        "pooled, so a setting that moves both the measure and the gap shows as correlation."
    )
    return Section("correlations", f"Rank correlation with {result.target}", caption, correlations.draw(data), data)


def _curves(
    spectra: pd.DataFrame, models: pd.DataFrame, target: str
) -> Iterator[tuple[str, Callable[[], Section | str]]]:
    """Yield a heading and the maker of a figure for every label of every kind of curve."""
    kinds = ((surface.KIND, "Loss surface", _surface), (density.KIND, "Hessian spectral density", _density))
    for kind, words, make in kinds:
        rows = curves.of_kind(spectra, kind)
        for number, label in enumerate(sorted(rows["label"].unique()), start=1):
            name, heading, own = f"{kind.replace('_', '-')}-{number}", f"{words}: {label}", rows[rows["label"] == label]
            if number <= MOST_LABELS:
                yield heading, partial(make, name, heading, label, own, models, target)
            else:
                yield heading, partial(str, f"only the first {MOST_LABELS} measures of this kind are drawn.")


def _surface(
    name: str, heading: str, label: str, rows: pd.DataFrame, models: pd.DataFrame, target: str
) -> Section | str:
    data = surface.data(rows, models, label=label, target=target)
    if data["value"].isna().all():
        return "no model that counts has a finite one."
    point, whats, look = (
        ("w + x d", "d is", "Look for how wide the valley is, and whether its walls differ between the models.")
        if data["y"].isna().all()
        else ("w + x d1 + y d2", "d1 and d2 are", "White crosses: w. Look for how far the low region reaches.")
    )
    caption = (
        f"{_representing(rows, models, data['model_id'].nunique(), target)} The loss of the training set (unless the "
        f"label says another) at {point} around the trained weights w; what {whats}, the label says (random and "
        f"filter-normalised by default). {look} A slice shows one or two of very many directions."
    )
    return Section(name, heading, caption, surface.draw(data), data)


def _density(
    name: str, heading: str, label: str, rows: pd.DataFrame, models: pd.DataFrame, target: str
) -> Section | str:
    axis = main_axis(models)
    data = density.data(rows, models, label=label, axis=axis, target=target)
    if not (data["density"] > 0).any():
        return "no model that counts has one."
    having = models["model_id"].isin(rows["model_id"].unique())
    whose = (
        f"{_filter(models[having])} Lines: mean {_pooled(models, (axis,))}.{_some_of(models, axis, density.MOST_LINES)}"
        if axis
        else _representing(rows, models, data["line"].nunique(), target)
    )
    caption = (
        f"{whose} Density of the Hessian's eigenvalues, smoothed, on a logarithmic axis. Look for the bulk at zero, "
        "for eigenvalues that stand apart from it on the right, and for negative ones."
    )
    return Section(name, heading, caption, density.draw(data), data)


def _representing(rows: pd.DataFrame, models: pd.DataFrame, drawn: int, target: str) -> str:
    """Say which models a figure of curves shows, and of how many."""
    count = int((frames.kept(models) & models["model_id"].isin(rows["model_id"].unique())).sum())
    if count <= drawn:
        return f"All models that have it: n = {count}."
    return f"Of n = {count} models that have it, those with the lowest, the median and the highest {target}."


def _training(epochs: pd.DataFrame, models: pd.DataFrame) -> Section | str:
    if epochs.empty:
        return "no epoch was recorded."
    axes = frames.varying(models)
    axis = main_axis(models) or (axes[0] if axes else None)
    data = training.data(epochs, models, axis=axis)
    if data.empty:
        return "no model that counts has a recorded epoch."
    caption = (
        f"{_filter(models)} Lines: mean {_pooled(models, (axis,))}; no band. A model that stopped early "
        f"keeps its last value.{_some_of(models, axis, training.MOST_LINES)} Look for a test error that "
        "rises and falls again while the training error only falls."
    )
    return Section("training", "Training curves", caption, training.draw(data), data)


def _published(compared: pd.DataFrame) -> Section | str:
    data = published.data(compared)
    if data.empty:
        return "no published number has a counterpart in these results."
    errors = compared["standard_errors"].dropna().abs()
    near = int((errors <= NEAR).sum())
    finding = (
        f"{near} of {len(errors)} published numbers whose error is known lie within {NEAR:g} standard errors of ours."
    )
    caption = (
        "One point per published number; on the dotted line ours is equal. Bars: one standard error (of the "
        "difference, where that is drawn), where n and spread are known. Ours: mean over seeds of models converged or "
        "finished, the same quantity as theirs: best epoch beside best epoch, last beside last. The table below says "
        "what differs."
    )
    drawn = min(published.MOST_PANELS, data["panel"].nunique())
    if drawn < data["panel"].nunique():
        caption += f" Of {data['panel'].nunique()} quantities, {drawn} are drawn."
    return Section("published", PUBLISHED, caption, published.draw(data), data, (finding,) if len(errors) else ())
