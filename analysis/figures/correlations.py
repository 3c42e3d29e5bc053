"""Kendall's tau of every measure with its interval, best first."""

from __future__ import annotations

import dataclasses
import html

import pandas as pd
import plotly.graph_objects as go

from flatmin.analysis.correlation import Correlations
from flatmin.analysis.figures import theme

_COLUMNS = [
    "measure",
    "target",
    "tau",
    "tau_low",
    "tau_high",
    "n",
    "n_configs",
    "tau_rows",
    "spearman",
    "pearson",
]


def data(result: Correlations) -> pd.DataFrame:
    """List the measures by falling tau.

    Args:
        result: The correlations of one target.

    Returns:
        One row per measure with the fields of `MeasureCorrelation`; undefined is NaN and comes last.
    """
    rows = [
        {"measure": name, "target": result.target, **dataclasses.asdict(one)} for name, one in result.measures.items()
    ]
    frame = pd.DataFrame(rows, columns=_COLUMNS)
    numbers = [column for column in _COLUMNS if column not in ("measure", "target")]
    frame[numbers] = frame[numbers].apply(pd.to_numeric)
    return frame.sort_values(["tau", "measure"], ascending=[False, True], na_position="last").reset_index(drop=True)


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw a point and an interval per measure on a scale from -1 to 1.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure, the largest tau on top.
    """
    names = sorted(data["measure"])
    figure = go.Figure()
    for _, row in data.iterrows():
        name = str(row["measure"])
        defined = pd.notna(row["tau"])
        text = f"n = {row['n']}<br>{row['n_configs']} configurations" + ("" if defined else ", undefined")
        figure.add_scatter(
            x=[row["tau"] if defined else 0],
            y=[html.escape(name)],
            mode="markers",
            showlegend=False,
            marker={
                "size": 11,
                "color": theme.colour(name, names),
                "symbol": "circle" if defined else "x-thin-open",
            },
            error_x=_interval(row),
            hovertemplate=f"%{{y}}: {row['tau']:.3f}<br>{text}<extra></extra>",
        )
        figure.add_annotation(x=1.01, y=html.escape(name), text=text, showarrow=False, xanchor="left", xref="paper")
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(
        title_text=f"Kendall τ with {data['target'].iloc[0]} (−1 to 1)",
        range=[-1.02, 1.02],
        zeroline=True,
    )
    theme.layout(figure, height=130 + 42 * len(data))
    figure.update_layout(margin_r=125, margin_t=40)
    return figure


def _interval(row: pd.Series) -> dict[str, object] | None:
    if pd.isna(row["tau_low"]):
        return None
    up, down = row["tau_high"] - row["tau"], row["tau"] - row["tau_low"]
    # a percentile interval may leave its own estimate out; a negative arm has no drawing
    return {"array": [max(0.0, up)], "arrayminus": [max(0.0, down)], "thickness": 1.8, "width": 5}
