"""Ours beside the published values, a panel per quantity: accuracies and correlations by their differences."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flatmin.analysis.figures import theme
from flatmin.analysis.published import in_words

MOST_PANELS = 6
"""Quantities that are drawn, those with the most numbers; the table has all."""

CORRELATION = "rank correlation τ"
"""The panel that all correlations share."""

_COLUMNS = 2
_PANEL = 330
"""Height of a row of panels in pixels."""

_HOVER = "%{customdata[0]}<br>theirs %{customdata[1]}<br>ours %{customdata[2]:.4g}, n = %{customdata[3]}<extra></extra>"


def data(compared: pd.DataFrame) -> pd.DataFrame:
    """Return the pairs that are known on both sides.

    Args:
        compared: What `analysis.published.compare` returned.

    Returns:
        `panel`, `quantity`, `settings` (in words), `printed`, `theirs`, `theirs_stderr`, `ours`, `ours_stderr`,
        `ours_n` and `difference` (ours - theirs). Standard errors are null where they are not known.
    """
    rows = compared[compared["ours"].notna()]
    return pd.DataFrame(
        {
            "panel": rows["quantity"].mask(rows["quantity"].str.startswith("tau("), CORRELATION),
            "quantity": rows["quantity"],
            "settings": rows["settings"].map(in_words),
            "printed": rows["printed"],
            "theirs": rows["value"],
            "theirs_stderr": rows["stderr"],
            "ours": rows["ours"],
            "ours_stderr": rows["ours_stderr"],
            "ours_n": rows["ours_n"],
            "difference": rows["difference"],
        }
    ).reset_index(drop=True)


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw ours, or its difference from theirs, against theirs: a point per published number.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure, with the `MOST_PANELS` quantities that have the most numbers.
    """
    panels = list(data["panel"].value_counts().index[:MOST_PANELS])
    columns = min(_COLUMNS, len(panels))
    count = -(-len(panels) // columns)
    figure = make_subplots(
        rows=count,
        cols=columns,
        subplot_titles=[theme.title(panel).replace("(", "<br>(", 1) for panel in panels],
        vertical_spacing=0.3 / count,
        horizontal_spacing=0.12,
    )
    for number, panel in enumerate(panels):
        rows, row, column = data[data["panel"] == panel], number // columns + 1, number % columns + 1
        # a fraction's differences are too small to be seen beside its range; other values differ by factors
        if panel == CORRELATION or panel.endswith(("_acc", "_gap")):
            _differences(figure, rows, row, column)
        else:
            _values(figure, rows, row, column)
        figure.update_xaxes(title_text="theirs", row=row, col=column)
    return theme.layout(figure, height=90 + _PANEL * count)


def _differences(figure: go.Figure, rows: pd.DataFrame, row: int, column: int) -> None:
    _line(figure, [rows["theirs"].min(), rows["theirs"].max()], [0, 0], row, column)
    both = pd.Series(np.hypot(rows["theirs_stderr"], rows["ours_stderr"]), index=rows.index)
    _points(figure, rows, rows["difference"], None, both, row, column)
    figure.update_yaxes(title_text="ours − theirs", row=row, col=column)


def _values(figure: go.Figure, rows: pd.DataFrame, row: int, column: int) -> None:
    values = pd.concat([rows["theirs"], rows["ours"]])
    _line(figure, [values.min(), values.max()], [values.min(), values.max()], row, column)
    _points(figure, rows, rows["ours"], rows["theirs_stderr"], rows["ours_stderr"], row, column)
    figure.update_yaxes(title_text="ours", row=row, col=column)
    if theme.scale_of(values) == "log":
        figure.update_xaxes(**theme.log_ticks(values), row=row, col=column)
        figure.update_yaxes(**theme.log_ticks(values), row=row, col=column)


def _line(figure: go.Figure, x: list[float], y: list[float], row: int, column: int) -> None:
    """Where ours is equal to theirs."""
    style = {"color": theme.GREY, "width": 1, "dash": "dot"}
    figure.add_scatter(x=x, y=y, mode="lines", line=style, hoverinfo="skip", showlegend=False, row=row, col=column)


def _points(
    figure: go.Figure,
    rows: pd.DataFrame,
    y: pd.Series,
    x_error: pd.Series | None,
    y_error: pd.Series,
    row: int,
    column: int,
) -> None:
    what = rows["quantity"] + " " + rows["settings"]
    figure.add_scatter(
        x=rows["theirs"],
        y=y,
        error_x=None if x_error is None else {"array": x_error.fillna(0), "thickness": 1},
        error_y={"array": y_error.fillna(0), "thickness": 1},
        mode="markers",
        marker={"color": theme.BLUE, "size": 7},
        customdata=pd.DataFrame({"what": what, "printed": rows["printed"], "ours": rows["ours"], "n": rows["ours_n"]}),
        hovertemplate=_HOVER,
        showlegend=False,
        row=row,
        col=column,
    )
