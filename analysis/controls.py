"""The report's controls: what a reader may choose, and which parts of the page belong to which choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pandas as pd

from flatmin.analysis import choices, frames, page
from flatmin.analysis.choices import View
from flatmin.analysis.section import axes_of

ALL_MEASURES = ""
"""The choice of no single measure."""

UNSPLIT = ""
"""The choice of no setting that parts the points."""


def options(views: Sequence[View], models: pd.DataFrame, sharpness: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Return the values of every control with their words, the first one chosen at the beginning.

    Args:
        views: The tables of every choice.
        models: Rows of the `models/` table.
        sharpness: Rows of the `sharpness/` table; may be empty.
    """
    labels = frames.labels(sharpness)
    return {
        "filter": {name: words for name, words in choices.FILTERS.items() if name in {view.filter for view in views}},
        "seeds": {name: words for name, words in choices.SEEDS.items() if name in {view.seeds for view in views}},
        "axis": {axis: axis for axis in axes_of(models)},
        "split": {UNSPLIT: "not at all"} | {axis: axis for axis in axes_of(models)},
        "measure": {ALL_MEASURES: "all measures"} | {label: label for label in labels},
    }


def first(views: Sequence[View], models: pd.DataFrame, sharpness: pd.DataFrame) -> dict[str, str]:
    """Return what is chosen at the beginning.

    Args:
        views: The tables of every choice.
        models: Rows of the `models/` table.
        sharpness: Rows of the `sharpness/` table; may be empty.
    """
    return {name: next(iter(values), "") for name, values in options(views, models, sharpness).items()}


def bar(views: Sequence[View], models: pd.DataFrame, sharpness: pd.DataFrame) -> str:
    """Return the controls as HTML; one without a choice is hidden.

    Args:
        views: The tables of every choice.
        models: Rows of the `models/` table.
        sharpness: Rows of the `sharpness/` table; may be empty.
    """
    words = {"filter": "Models", "seeds": "Seeds", "axis": "Setting", "split": "Split points by", "measure": "Measure"}
    parts = []
    for name, values in options(views, models, sharpness).items():
        listed = "".join(
            f'<option value="{page.text(value)}">{page.text(said)}</option>' for value, said in values.items()
        )
        hidden = " hidden" if len(values) < 2 else ""
        parts.append(f'<label{hidden}>{words[name]} <select data-control="{name}">{listed}</select></label>')
    theme = '<button type="button" id="theme" aria-pressed="false">Dark</button>'
    return f'<form class="controls" aria-label="What is shown">{"".join(parts)}{theme}</form>'


def fits(of: Mapping[str, str], state: Mapping[str, str]) -> bool:
    """Tell whether a part of the page belongs to a choice.

    Args:
        of: The controls that the part follows, with their values.
        state: What is chosen.
    """
    return all(state[name] == value for name, value in of.items())


def only(of: Mapping[str, str], state: Mapping[str, str]) -> str:
    """Return the HTML attributes of a part that is shown for one choice only.

    Args:
        of: The controls that the part follows, with their values; none: the part is always shown.
        state: What is chosen at the beginning.
    """
    if not of:
        return ""
    hidden = "" if fits(of, state) else " hidden"
    return f' data-of="{page.text(json.dumps(dict(of)))}"{hidden}'
