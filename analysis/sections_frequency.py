"""The report's figures of frequencies: which are learnt first, by what, and what they tell of accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pandas as pd
import plotly.graph_objects as go

from flatmin.analysis import frames, frequency, frequency_accuracy, frequency_learning, panels
from flatmin.analysis.figures import (
    frequency_coefficients,
    frequency_correlation,
    frequency_epochs,
    frequency_errors,
    frequency_loss,
    frequency_regression,
)
from flatmin.analysis.frequency import Curves
from flatmin.analysis.section import Left, Section, Variant, counted, pooled

MOST_LABELS = 3
"""Kinds of spectrum that are drawn; the others are named."""


def sections(found: Sequence[Curves], models: pd.DataFrame, epochs: pd.DataFrame) -> Iterator[Section | Left]:
    """Yield the figures of every kind of spectrum, or why there is none.

    Args:
        found: What `frequency.read` returned.
        models: Rows of the `models/` table.
        epochs: Rows of the `epochs/` table; may be empty.
    """
    for number, curves in enumerate(found, start=1):
        said = "" if curves.label == frequency.KIND else f": {curves.label}"
        if curves.ratio.empty and curves.error.empty:
            yield Left(f"Frequencies{said}", "no model that counts has a spectrum.")
            continue
        if number > MOST_LABELS:
            yield Left(f"Frequencies{said}", f"only the first {MOST_LABELS} of this kind are drawn.")
            continue
        made: dict[str, tuple[str, Variant | str]] = {
            "coefficients": ("Fourier coefficients while training", _coefficients(curves, models)),
            "epochs": ("Epochs to learn a frequency", _epochs(curves)),
            "errors": ("Errors of Fourier coefficients", _errors(curves, models)),
            "accuracy": ("Accuracy and errors of frequencies", _accuracy(curves, epochs)),
            "regression": ("Accuracy explained by frequencies", _regression(curves, epochs)),
        }
        if number == 1:
            made["loss"] = ("Loss while training", _loss(models, epochs))
        for name, (heading, one) in made.items():
            if isinstance(one, Variant):
                yield Section(f"frequency-{name}-{number}", heading + said, (one,))
            else:
                yield Left(heading + said, one)


def _variant(caption: str, data: pd.DataFrame, draw: Callable[[pd.DataFrame], go.Figure], *findings: str) -> Variant:
    return Variant(caption, panels.drawn(draw(data)), data, findings)


def _over(models: pd.DataFrame) -> str:
    return pooled(models, ("optimizer",))


def _thinned(points: pd.DataFrame, most: int) -> str:
    """Say that not all epochs are drawn, where that is so."""
    count = points["epoch"].nunique()
    return f" Of {count} recorded epochs, about {most} are drawn, more of the early ones." if count > most else ""


def _coefficients(curves: Curves, models: pd.DataFrame) -> Variant | str:
    if curves.ratio["value"].notna().sum() == 0:
        return "no coefficient of a frequency that the truth has was recorded."
    data = frequency_coefficients.data(curves.ratio)
    caption = (
        f"{counted(models)} Learned over true amplitude of every frequency k"
        f"{'' if curves.published else ', in cycles over the range of the inputs'}. "
        f"Lines: mean {_over(models)}; bands: one sample deviation. Dotted: 1, where a frequency is learnt."
        f"{_thinned(curves.ratio, frequency_coefficients.MOST_EPOCHS)}"
        f"{_some(curves.ratio, frequency_coefficients.MOST_FREQUENCIES)}{_axis(curves)}"
        " Look for the order in which the lines reach 1."
    )
    return _variant(caption, data, frequency_coefficients.draw)


def _some(points: pd.DataFrame, most: int) -> str:
    count = points["k"].nunique()
    return f" Of {count} frequencies, {most} are drawn." if count > most else ""


def _axis(curves: Curves) -> str:
    """Say what the published axis is, where it is one."""
    if not curves.published:
        return ""
    return " k is the index of the published axis: high frequencies come first, and it is not scaled to the inputs."


def _loss(models: pd.DataFrame, epochs: pd.DataFrame) -> Variant | str:
    if epochs.empty:
        return "no epoch was recorded."
    data = frequency_loss.data(epochs, models)
    if data.empty:
        return "no model that counts has a recorded training loss."
    known = epochs[epochs["model_id"].isin(models.loc[frames.kept(models), "model_id"])]
    caption = (
        f"{counted(models)} log10 of the training loss. Lines: mean {_over(models)}; bands: one sample deviation."
        f"{_thinned(known, frequency_loss.MOST_EPOCHS)}"
    )
    return _variant(caption, data, frequency_loss.draw)


def _errors(curves: Curves, models: pd.DataFrame) -> Variant | str:
    if curves.error["value"].notna().sum() == 0:
        return "no error of a frequency that the truth has was recorded."
    data = frequency_errors.data(curves.error)
    low = "above" if curves.published else "below"
    caption = (
        f"{counted(models)} ΔF = |F − T| / |T|, the error of the coefficient of frequency k against the truth's: mean "
        f"{_over(models)}. 0 is learnt, 1 as far off as predicting nothing. Low frequencies are {low}."
        f"{_thinned(curves.error, frequency_errors.MOST_EPOCHS)}"
        f"{_some(curves.error, frequency_errors.MOST_FREQUENCIES)}{_axis(curves)}"
        f" Look for whether the rows turn dark from {low}."
    )
    return _variant(caption, data, frequency_errors.draw)


def _epochs(curves: Curves) -> Variant | str:
    if curves.published:
        return "the published axis has indices, not frequencies."
    ratio = curves.ratio[curves.ratio["k"] > 0]
    if ratio["k"].nunique() < 2:
        return "fewer than two frequencies were recorded."
    learnt = frequency_learning.epochs_to_learn(ratio)
    biases = frequency_learning.biases(learnt)
    data = frequency_epochs.data(learnt, biases)
    caption = (
        f"Points: a model and a frequency, at the first recorded epoch at which |F| / |T| is within "
        f"{frequency_learning.TOLERANCE:g} of 1; arrows: never learnt, drawn where the training ended. Lines: epochs ~ "
        "k^s, fitted by maximum likelihood; what was never learnt counts as taking longer, and a record as a bound. "
        "Intervals: 95 %, resampling models with their frequencies. The table below has other tolerances."
    )
    said = "; ".join(frequency_learning.in_words(one) for one in biases)
    finding = f"Spectral bias, the exponent s of epochs to learn frequency k ~ k^s: {said}."
    return _variant(caption, data, frequency_epochs.draw, finding)


def _panels(curves: Curves, epochs: pd.DataFrame) -> dict[str, frequency_accuracy.Panel] | str:
    column = None if epochs.empty else frequency_accuracy.accuracy_column(epochs)
    if column is None:
        return "no accuracy was recorded under way."
    found = frequency_accuracy.panels(curves.error, epochs, column)
    return found or "no epoch has both an accuracy and a spectrum."


def _whose(epochs: pd.DataFrame) -> str:
    if frequency_accuracy.accuracy_column(epochs) == "val_acc":
        return "Validation accuracy"
    return "Test accuracy (no validation set; nothing is chosen by it)"


def _accuracy(curves: Curves, epochs: pd.DataFrame) -> Variant | str:
    found = _panels(curves, epochs)
    if isinstance(found, str):
        return found
    data = frequency_correlation.data(found, frequency_accuracy.associations(found))
    caption = (
        f"{_whose(epochs)} against the mean of ΔF over all frequencies: a point per epoch, mean over models; lines by "
        "least squares. r is the linear correlation over epochs, its 95 % interval from resampling models. Epochs "
        "follow each other: both sides may move with time without one making the other."
    )
    return _variant(caption, data, frequency_correlation.draw)


def _regression(curves: Curves, epochs: pd.DataFrame) -> Variant | str:
    found = _panels(curves, epochs)
    if isinstance(found, str):
        return found
    fits = frequency_accuracy.regressions(found)
    if not fits:
        return f"there are fewer than {frequency_accuracy.FEWEST_EPOCHS} epochs to fit, or the accuracy is constant."
    data, theirs = frequency_regression.data(fits), curves.published
    which, of, axis = ("first", "indices", " of the published axis") if theirs else ("lowest", "frequencies", "")
    caption = (
        f"{_whose(epochs)} by a Lasso (penalty {frequency_accuracy.PENALTY:g}, both sides standardised) of ΔF of the "
        f"{which} {data['k'].nunique()} {of}, at the last 70 % of the epochs, mean over models. Bars: 95 % by "
        "resampling models; dark where at least 95 % of the refits have the same sign. R² of the points fitted, and of "
        "a model left out of the fit: where that is far lower, the fit is of chance."
        f"{_axis(curves)}"
    )
    first = fits[0]
    unseen = "" if first.r2_unseen is None else f", {first.r2_unseen:.2f} on a model left out"
    sure = data[(data["line"] == first.line) & (data["same_sign"] >= 0.95) & (data["coefficient"] != 0)]
    held = ", ".join(f"{k:g}" for k in sure["k"]) or "none"
    finding = (
        f"Errors of the {which} {of}{axis} explain {_whose(epochs).split(' (')[0].lower()} ({first.line}) with R² "
        f"{first.r2:.2f}{unseen}; {of} whose sign holds in 95 % of refits: {held}."
    )
    return _variant(caption, data, frequency_regression.draw, finding)
