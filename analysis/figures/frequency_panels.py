"""What the figures of frequencies share: a panel per optimizer, a band of one deviation, a colour per optimizer."""

from __future__ import annotations

import html
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flatmin.analysis.figures import theme

WHEEL = (theme.BLUE, theme.VERMILLION, theme.GREEN, theme.PURPLE, theme.ORANGE, theme.SKY)

_PANEL = 270
"""Height of a row of panels in pixels."""


def panels(names: Sequence[str]) -> go.Figure:
    """Return an empty figure with a panel per name, two to a row.

    Args:
        names: Optimizers, at least one.
    """
    count = rows(names)
    return make_subplots(
        rows=count,
        cols=min(2, len(names)),
        shared_yaxes=True,
        horizontal_spacing=0.06,
        vertical_spacing=min(0.2, 75 / (_PANEL * count)),
        subplot_titles=[html.escape(name) for name in names],
    )


def rows(names: Sequence[str]) -> int:
    """Return how many rows `panels` makes."""
    return -(-len(names) // 2)


def place(number: int) -> dict[str, int]:
    """Return row and column of a panel, counted from 0."""
    return {"row": number // 2 + 1, "col": number % 2 + 1}


def over_epochs(figure: go.Figure, names: Sequence[str]) -> go.Figure:
    """Lay out a figure of panels against the epoch, and return it.

    Args:
        figure: What `panels` returned, drawn in; changed in place.
        names: Its panels.
    """
    for number in range(max(0, len(names) - 2), len(names)):
        figure.update_xaxes(title_text="epoch", **place(number))
    return theme.epoch_buttons(theme.layout(figure, height=150 + _PANEL * rows(names)))


def band(part: pd.DataFrame, colour: str, group: str) -> list[go.Scatter]:
    """Return the traces of mean ± one sample deviation; none of a single model.

    Args:
        part: With `epoch`, `mean` and `sd`.
        colour: Hexadecimal or `rgb(...)`.
        group: The legend group of its line.
    """
    known = part.dropna(subset=["sd"])
    if known.empty:
        return []
    fill = theme.transparent(colour, 0.15) if colour.startswith("#") else f"rgba({colour[4:-1]}, 0.15)"
    edge = {"x": known["epoch"], "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    high = go.Scatter(y=known["mean"] + known["sd"], legendgroup=group, **edge)
    low = go.Scatter(y=known["mean"] - known["sd"], legendgroup=group, fill="tonexty", fillcolor=fill, **edge)
    return [high, low]
