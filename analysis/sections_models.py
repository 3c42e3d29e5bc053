"""The report's figures of models: errors along an axis, training, optimizers, coverage, published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from flatmin.analysis import frames, panels, peak, sweeps
from flatmin.analysis.choices import View
from flatmin.analysis.figures import against_axis, coverage, optimizers, optimizers_along, published, theme, training
from flatmin.analysis.section import (
    FEWEST_VALUES,
    Missing,
    Variant,
    axes_of,
    counted,
    curve_axis,
    line_axis,
    lines_along,
    main_axis,
    pooled,
    some_of,
)

NEAR = 2.0
"""Standard errors up to which a finding calls a difference small."""


def against(view: View, sharpness: pd.DataFrame) -> Iterator[Variant | Missing]:
    """Yield errors and measures against every setting that has values enough, for all measures and for each."""
    models = view.models
    few = f"no numeric setting has {FEWEST_VALUES} values or more."
    if main_axis(models) is None:
        yield Missing(few)
        return
    labels = frames.labels(sharpness)
    for axis in axes_of(models):
        of = {"filter": view.filter, "axis": axis}
        if not curve_axis(models, axis):
            yield Missing(f"{axis} has no {FEWEST_VALUES} numeric values or more.", of)
            continue
        by = line_axis(models, axis)
        data = against_axis.data(models, sharpness, axis=axis, by=by)
        if data.empty:
            yield Missing("no model that counts has a test result.", of)
            continue
        whole = _against(models, data, axis, by, of | {"measure": ""})
        yield whole
        for label in labels:
            # what the errors do is said once, whatever measure is chosen
            own = panels.alone(whole.figure, label)
            yield Variant(whole.caption, own, data, of=of | {"measure": label})


def _against(models: pd.DataFrame, data: pd.DataFrame, axis: str, by: str | None, of: dict[str, str]) -> Variant:
    error = data[data["quantity"].isin(["test_error", "test_loss"])]
    findings, peaks = [], []
    for value, curve in error.groupby("by_value", dropna=False, sort=False):
        said, found = peak.sentence(curve), _peak(models, curve)
        if found.x_low is not None and found.height_low is not None and found.height_low > 0:
            peaks.append(found)
            said += f" {peak.interval_in_words(found, axis)}"
        findings.append(f"{by} {theme.format_value(value)}: {said}" if by and said else said)
    caption = (
        f"{counted(models)} Lines: mean {pooled(models, (axis, by))}. Bands: lowest to highest model. Look "
        "for a second descent of the test error beyond the point where the training error reaches zero, and "
        "for whether the measures turn there too."
    )
    caption += some_of(models, by, against_axis.MOST_LINES)
    if peaks:
        caption += " Grey stripes: 95 % interval of the place of the peak of the mean curve, by resampling seeds."
    return Variant(caption, panels.drawn(against_axis.draw(data, peaks)), data, tuple(filter(None, findings)), of)


def _peak(models: pd.DataFrame, curve: pd.DataFrame) -> peak.SeedPeak:
    """The peak of one line of the test error or loss, with its interval over seeds, where these are known."""
    first = curve.iloc[0]
    of = pd.Series(True, index=models.index)
    if isinstance(first["by"], str):
        of = models[first["by"]] == first["by_value"]
    if "seed" not in models.columns:
        return peak.peak_over_seeds(pd.DataFrame({0: curve.set_index("x")["mean"]}))
    return peak.peak_over_seeds(sweeps.curves(models, str(first["quantity"]), axis=str(first["axis"]), of=of))


def training_curves(view: View, epochs: pd.DataFrame) -> Iterator[Variant | Missing]:
    """Yield training and test curves, with lines along every setting."""
    models = view.models
    if epochs.empty:
        yield Missing("no epoch was recorded.")
        return
    for axis in lines_along(models):
        of = {"filter": view.filter} | ({"axis": axis} if axis else {})
        data = training.data(epochs, models, axis=axis)
        if data.empty:
            yield Missing("no model that counts has a recorded epoch.", of)
            continue
        caption = (
            f"{counted(models)} Lines: mean {pooled(models, (axis,))}; no band. A model that stopped early "
            f"keeps its last value.{some_of(models, axis, training.MOST_LINES)} Look for a test error that "
            "rises and falls again while the training error only falls."
        )
        yield Variant(caption, panels.drawn(training.draw(data)), data, of=of)


def optimizer_comparison(view: View, compared: pd.DataFrame | None) -> Iterator[Variant | Missing]:
    """Yield every configuration's test accuracy, where optimizers are compared."""
    models = view.models[frames.kept(view.models)]
    of = {"filter": view.filter}
    if "optimizer" not in view.models.columns or view.models["optimizer"].nunique() < 2:
        yield Missing("there is one optimizer.")
        return
    data = optimizers.data(models, compared) if len(models) and _tested(models) else pd.DataFrame()
    if data.empty or data["mean"].isna().all():
        yield Missing("no model that counts has a test result.", of)
        return
    quantities = set(data["quantity"])
    what = "test loss" if "test_loss" in quantities else "test accuracy"
    caption = (
        f"{counted(view.models)} A line per configuration, the best mean on top. Points: mean {what} over seeds; bars: "
        "95 % interval of the mean by Student's t, none for one seed. Last: at the last weights."
    )
    if "best_test_acc" in quantities:
        caption += (
            " Best on test: the highest test accuracy of any epoch, which is chosen on the test set and is for "
            "comparison with papers only."
        )
    if data["published"].notna().any():
        caption += " Crosses: published values, with their standard error where it is known."
    count = data["configuration"].nunique()
    if count > optimizers.MOST_LINES:
        caption += f" Of {count} configurations, the best {optimizers.MOST_LINES} are drawn; the data has all."
    yield Variant(caption, panels.drawn(optimizers.draw(data)), data, of=of)


def _tested(models: pd.DataFrame) -> bool:
    return not {"test_acc", "test_loss"}.isdisjoint(models.columns)


def optimizers_along_settings(view: View) -> Iterator[Variant | Missing]:
    """Yield every optimizer's test accuracy along every other setting."""
    if "optimizer" not in view.models.columns or view.models["optimizer"].nunique() < 2:
        yield Missing("there is one optimizer.")
        return
    for axis in axes_of(view.models):
        of = {"filter": view.filter, "axis": axis}
        if axis == "optimizer":
            yield Missing("it is along another setting than the optimizer; choose one above.", of)
            continue
        data = optimizers_along.data(view.models, axis=axis) if _tested(view.models) else pd.DataFrame()
        if data.empty or data["mean"].isna().all():
            yield Missing("no model that counts has a test result.", of)
            continue
        caption = (
            f"{counted(view.models)} Points: mean {pooled(view.models, ('optimizer', axis))}; bars: 95 % interval of "
            "that mean by Student's t. At the last weights."
        )
        caption += some_of(view.models, "optimizer", optimizers_along.MOST_LINES)
        yield Variant(caption, panels.drawn(optimizers_along.draw(data)), data, of=of)


def grid(view: View, plan: pd.DataFrame | None, failures: pd.DataFrame | None) -> Iterator[Variant | Missing]:
    """Yield what became of the planned models, along every axis."""
    data = coverage.data(view.models, plan, failures)
    counts = data[data["axis"] == data["axis"].iloc[0]].groupby("outcome")["n"].sum()
    listed = ", ".join(f"{int(counts[name])} {name}" for name in coverage.OUTCOMES if name in counts)
    caption = (
        f"All planned models: n = {int(counts.sum())}; {listed}. Attempt failed: tried, and no result so "
        "far. Filtered out: it ended above stop_loss and does not count for this choice. Look for settings whose "
        "models are missing: what is said of the others may not hold for them."
    )
    count = data["axis"].nunique()
    if count > coverage.MOST_AXES:
        caption += f" Of {count} axes, {coverage.MOST_AXES} are drawn."
    yield Variant(caption, panels.drawn(coverage.draw(data)), data, of={"filter": view.filter})


def beside_published(compared: pd.DataFrame) -> Iterator[Variant | Missing]:
    """Yield ours beside the published numbers; the same for every choice."""
    data = published.data(compared)
    if data.empty:
        yield Missing("no published number has a counterpart in these results.")
        return
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
    yield Variant(caption, panels.drawn(published.draw(data)), data, (finding,) if len(errors) else ())
