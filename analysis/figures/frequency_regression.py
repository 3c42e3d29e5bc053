"""Lasso of accuracy on the errors of single frequencies: coefficients with intervals, a panel per fit."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from flatmin.analysis.figures import frequency_panels, theme
from flatmin.analysis.frequency_accuracy import Regression


def data(regressions: Sequence[Regression]) -> pd.DataFrame:
    """List the coefficients of every fit.

    Args:
        regressions: What `frequency_accuracy.regressions` returned, at least one.

    Returns:
        One row per fit and frequency: `line`, `k`, `coefficient`, `low`, `high`, `same_sign`, and of the fit `r2`,
        `r2_low`, `r2_high`, `r2_unseen`, `epochs` and `models`.
    """
    parts = [
        one.coefficients.assign(
            line=one.line,
            r2=one.r2,
            r2_low=one.r2_low,
            r2_high=one.r2_high,
            r2_unseen=one.r2_unseen,
            epochs=one.epochs,
            models=one.models,
        )
        for one in regressions
    ]
    return pd.concat(parts, ignore_index=True).astype(dict.fromkeys(["r2_low", "r2_high", "r2_unseen"], "float64"))


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw a bar per frequency with its interval, blue where at least 95 % of the refits have the same sign.

    Args:
        data: What `data` returned, with at least one row.
    """
    names = list(data["line"].unique())
    figure = frequency_panels.panels([_title(data[data["line"] == name]) for name in names])
    for number, name in enumerate(names):
        part = data[data["line"] == name]
        sure = (part["same_sign"] >= 0.95) & (part["coefficient"] != 0)
        figure.add_bar(
            x=[f"{k:g}" for k in part["k"]],
            y=part["coefficient"],
            error_y={
                "array": (part["high"] - part["coefficient"]).fillna(0),
                "arrayminus": (part["coefficient"] - part["low"]).fillna(0),
                "thickness": 1.2,
                "width": 3,
                "color": theme.GREY,
            },
            marker={"color": [theme.BLUE if one else theme.SKY for one in sure]},
            customdata=part["same_sign"],
            hovertemplate="k = %{x}: %{y:.3f}, same sign in %{customdata:.0%} of refits<extra></extra>",
            showlegend=False,
            **frequency_panels.place(number),
        )
        figure.update_xaxes(type="category", title_text="frequency k", **frequency_panels.place(number))
    figure.update_yaxes(title_text="coefficient (sd per sd)", col=1)
    return theme.layout(figure, height=150 + 290 * frequency_panels.rows(names))


def _title(part: pd.DataFrame) -> str:
    first = part.iloc[0]
    unseen = "" if pd.isna(first["r2_unseen"]) else f", of a model left out {theme.format_tau(first['r2_unseen'])}"
    return f"{first['line']}: R² {theme.format_tau(first['r2'])}{unseen}"
