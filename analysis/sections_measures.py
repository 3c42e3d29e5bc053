"""The report's figures of measures: against the gap, ranking, psi, under way, with noise, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from flatmin.analysis import panels
from flatmin.analysis.choices import View
from flatmin.analysis.conclusions import conclusions
from flatmin.analysis.figures import against_axis, correlations, cost, measures_over_epochs, noise, psi, scatter
from flatmin.analysis.panels import Drawn
from flatmin.analysis.section import Missing, Variant, axes_of, counted, lines_along, pooled, some_of

_NO_MEASURE = "no measure was taken."


def against_gap(view: View, sharpness: pd.DataFrame, target: str) -> Iterator[Variant | Missing]:
    """Yield points of every measure against the target, for all measures and for each."""
    if sharpness.empty:
        yield Missing(_NO_MEASURE)
        return
    whole = scatter.data(view.models, sharpness, target=target)
    if whole.empty:
        yield Missing(f"no model that counts has both a measure and {target}.", view.of)
        return
    whole = scatter.averaged(whole) if view.seeds == "means" else whole
    data = scatter.thinned(whole)
    caption = f"{counted(view.models)} {_points(view, whole, data)}"
    labels = sorted(data["measure"].unique())
    drawn = panels.drawn(scatter.draw(data))
    yield from _each(caption, drawn, data, labels, view.of | {"split": ""})
    for axis in axes_of(view.models):
        if axis not in scatter.settings_of(data):
            yield Missing(f"{axis} has one value among these models.", view.of | {"split": axis})
            continue
        split = scatter.split(drawn, data, axis)
        said = caption + some_of(view.models, axis, scatter.MOST_COLUMNS)
        yield from _each(said, split, data, labels, view.of | {"split": axis})


def _each(caption: str, whole: Drawn, data: pd.DataFrame, labels: list[str], of: dict[str, str]) -> Iterator[Variant]:
    """The figure of all measures, and that of each."""
    yield Variant(caption, whole, data, of=of | {"measure": ""})
    for label in labels:
        yield Variant(caption, panels.alone(whole, label), data, of=of | {"measure": label})


def _points(view: View, whole: pd.DataFrame, drawn: pd.DataFrame) -> str:
    if view.seeds == "means":
        said = "One point per configuration: the mean over its seeds; values at the last measured epoch."
        unit = "configurations"
    else:
        bars = scatter.has_bars(drawn)
        said = "One point per model; values at the last measured epoch. "
        said += "Horizontal bars: one standard error of the measure." if bars else "No error bars; the data has them."
        unit = "models"
    most, shown = (int(frame.groupby("measure").size().max()) for frame in (whole, drawn))
    if shown < most:
        said += f" Of {most} {unit}, {shown} are drawn, evenly by rank of the target."
    return f"{said} Look for a trend within one colour too: a trend only between colours belongs to the setting."


def ranking(view: View) -> Iterator[Variant | Missing]:
    """Yield the ranking of measures, with what it says in words."""
    result = view.result
    if result is None:
        yield Missing("there is nothing to correlate.", view.of)
        return
    data = correlations.data(result)
    axes = ", ".join(result.axes) or "none"
    how = (
        "on seed means over configurations. Bars: 95 % percentile interval of a bootstrap over configurations."
        if view.seeds == "means"
        else "over models; the seed is one more setting that is held fixed on the right. No intervals: the seeds of a "
        "configuration are no independent evidence."
    )
    caption = (
        f"{counted(view.models)} Left: Kendall τ-b of each measure with {result.target}, {how} Right: rank "
        f"correlation given the settings (axes: {axes}). n = {result.n}. A setting that moves both the measure and the "
        "gap shows on the left only; diamonds change their sign. Controls at the bottom: a measure has to be further "
        "from zero than these."
    )
    findings = tuple(conclusions(result, rows=view.seeds == "rows"))
    yield Variant(caption, panels.drawn(correlations.draw(data)), data, findings, view.of)


def granulated(view: View) -> Iterator[Variant | Missing]:
    """Yield the map of psi."""
    if view.result is None or not view.result.axes:
        yield Missing("there is nothing to correlate." if view.result is None else "no setting varies.", view.of)
        return
    data = psi.data(view.result)
    if data.loc[~data["control"], "psi"].isna().all():
        yield Missing("no two configurations differ in one setting only.", view.of)
        return
    what = "configurations" if view.seeds == "means" else "models of one seed"
    caption = (
        f"{counted(view.models)} Mean over groups of {what} that are equal in all settings but one: Kendall τ-a of the "
        f"measure with {view.result.target} within the group. Blank: no group to compare in. Controls at the bottom. "
        "Look for rows of one colour: a measure that follows the target whatever is varied."
    )
    yield Variant(caption, panels.drawn(psi.draw(data)), data, of=view.of)


def under_way(view: View, sharpness: pd.DataFrame) -> Iterator[Variant | Missing]:
    """Yield the measures during the training, with lines along every setting."""
    models = view.models
    if sharpness.empty:
        yield Missing(_NO_MEASURE)
        return
    if "epoch" not in sharpness.columns:
        yield Missing("the epochs of the measures are not known.")
        return
    for axis in lines_along(models):
        of = {"filter": view.filter} | ({"axis": axis} if axis else {})
        data = measures_over_epochs.data(sharpness, models, axis=axis)
        if data.empty:
            yield Missing("no measure was taken during the training (`measure_every`).")
            return
        caption = (
            f"{counted(models)} Lines: mean {pooled(models, (axis,))}; bands: lowest to highest model."
            f"{some_of(models, axis, measures_over_epochs.MOST_LINES)} Models that stopped early have no value after "
            "their end. Look for when the lines part."
        )
        yield from _each(
            caption, panels.drawn(measures_over_epochs.draw(data)), data, sorted(data["measure"].unique()), of
        )


def noise_sweep(view: View, sharpness: pd.DataFrame, target: str, axis: str) -> Iterator[Variant | Missing]:
    """Yield the target and the measures against the level of a noise, with lines along every other setting."""
    models = view.models
    for along in axes_of(models):
        of = {"filter": view.filter, "axis": along}
        by = None if along == axis else along
        data = noise.data(models, sharpness, axis=axis, target=target, by=by)
        if data.empty:
            yield Missing("no model that counts has a result.", of)
            continue
        labels = list(data.loc[data["kind"] == "measure", "quantity"].unique())
        caption = (
            f"{counted(models)} Means {pooled(models, (axis, by))}; band: lowest to highest model. Each measure is "
            "scaled so that its least mean is 0 and its greatest 1. τ: Kendall τ-b along the axis, within equal "
            f"other settings, with the level and with {target}. These are two questions: "
            f"a measure may follow the noise and not the gap.{some_of(models, by, against_axis.MOST_LINES)}"
        )
        yield from _each(caption, panels.drawn(noise.draw(data)), data, labels, of)


def costs(sharpness: pd.DataFrame) -> Iterator[Variant | Missing]:
    """Yield what the measures cost; the same for every choice."""
    if sharpness.empty:
        yield Missing(_NO_MEASURE)
        return
    data = cost.data(sharpness)
    caption = (
        f"All values in the results, n = {int(data['n'].sum())}, whatever the filter. A pass is a forward pass over "
        "the set measured: a loss is 1, a gradient 2, a Hessian-vector product 4. Short of its "
        "tolerance: the samples or steps that were allowed "
        "were used up before the value was as certain as asked."
    )
    yield Variant(caption, panels.drawn(cost.draw(data)), data)
