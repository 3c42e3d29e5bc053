"""One section of the report: a figure in every variant that a reader can choose, and the words that captions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from flatmin.analysis import frames
from flatmin.analysis.axes import independent
from flatmin.analysis.panels import Drawn

MAIN_AXES = ("width", "label_noise", "data_noise")
"""The settings that a study most likely is about, in this order."""

FEWEST_VALUES = 5
"""An axis with fewer values than this gives a table, not a curve."""


@dataclass(frozen=True)
class Variant:
    """A figure for one choice of the reader.

    Attributes:
        caption: What is averaged over what, what the band is, what to look for.
        figure: The picture.
        data: The numbers in it.
        findings: What the numbers say, a sentence each; may be empty.
        of: The controls that it follows, with the value of each (`filter`, `seeds`, `axis`, `measure`).
    """

    caption: str
    figure: Drawn
    data: pd.DataFrame
    findings: tuple[str, ...] = ()
    of: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Missing:
    """No figure for one choice of the reader.

    Attributes:
        reason: Why.
        of: The choice.
    """

    reason: str
    of: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A figure of the report in all its variants.

    Attributes:
        name: A plain word: the figure's id and the name of its download.
        heading: What the figure is, in a few words.
        variants: At least one of them a figure; the first one that fits a choice is shown.
    """

    name: str
    heading: str
    variants: tuple[Variant | Missing, ...]


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
    axes = independent(models)
    ranked = [axis for axis in MAIN_AXES if axis in axes] + [axis for axis in axes if axis not in MAIN_AXES]
    for axis in ranked:
        if curve_axis(models, axis):
            return axis
    return None


def curve_axis(models: pd.DataFrame, axis: str) -> bool:
    """Tell whether a setting has numbers enough for a curve.

    Args:
        models: Rows of the `models/` table.
        axis: The setting.
    """
    return pd.api.types.is_numeric_dtype(models[axis]) and models[axis].nunique() >= FEWEST_VALUES


def line_axis(models: pd.DataFrame, main: str | None) -> str | None:
    """Choose the setting that makes further lines in a figure.

    Args:
        models: Rows of the `models/` table.
        main: The setting on the x axis; None: none is.
    """
    axes = [axis for axis in independent(models) if axis != main]
    named = ("label_noise", "data_noise", "optimizer", "network", "dataset")
    for axis in [axis for axis in named if axis in axes]:
        if models[axis].notna().all():
            return axis
    return None


def axes_of(models: pd.DataFrame) -> list[str]:
    """Return the settings that a reader may choose to look along, the one to begin with first.

    Args:
        models: Rows of the `models/` table.
    """
    axes = independent(models)
    first = main_axis(models) or line_axis(models, None)
    return [first, *[axis for axis in axes if axis != first]] if first else axes


def lines_along(models: pd.DataFrame) -> list[str | None]:
    """Return the settings that lines may be drawn for; None, which is one line for all, where nothing varies.

    Args:
        models: Rows of the `models/` table.
    """
    return [*axes_of(models)] or [None]


def counted(models: pd.DataFrame) -> str:
    """Say which models count, and how many are left out why.

    Args:
        models: Rows of the `models/` table, those that a filter keeps out marked so in `status`.
    """
    kept = frames.kept(models)
    out: dict[object, int] = {}
    if not kept.all():
        out = models.loc[~kept, "status"].fillna("of unknown status").value_counts().to_dict()
    what = "Models converged" if "filtered out" in out else "Models converged or finished"
    rest = [f"{count} {'diverged' if status == 'diverged' else status}" for status, count in out.items()]
    if not rest:
        return f"{what}: n = {int(kept.sum())}."
    said = " and ".join(one.replace("filtered out", "that missed stop_loss") for one in rest)
    return f"{what}: n = {int(kept.sum())}; {said} left out."


def pooled(models: pd.DataFrame, used: Sequence[str | None]) -> str:
    """Say what a mean is taken over: seeds, and every axis that is not drawn.

    Args:
        models: Rows of the `models/` table.
        used: The settings that are drawn.
    """
    others = [axis for axis in independent(models) if axis not in used]
    return "over seeds" + (f" and, pooled, over {', '.join(others)}" if others else "")


def some_of(models: pd.DataFrame, axis: str | None, most: int) -> str:
    """Say that a figure shows a part of an axis, where it does.

    Args:
        models: Rows of the `models/` table.
        axis: The setting, or None.
        most: How many of its values are drawn.
    """
    count = len(frames.ordered(models[axis])) if axis else 0
    return f" Of {count} values of {axis}, {most} are drawn." if count > most else ""
