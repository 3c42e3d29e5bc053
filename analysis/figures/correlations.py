"""The ranking of measures: Kendall's tau and the rank correlation given the settings, side by side, with intervals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flatmin.analysis.correlation import Correlations
from flatmin.analysis.figures import theme

_NUMBERS = [
    "tau",
    "tau_low",
    "tau_high",
    "partial",
    "partial_low",
    "partial_high",
    "n",
    "n_configs",
    "tau_rows",
    "spearman",
    "pearson",
    "psi_mean",
    "cmi",
    "q",
]
_COLUMNS = ["measure", "target", "control", "sign_flip", *_NUMBERS]
_PANELS = (("tau", "pooled τ"), ("partial", "partial ρ"))

_GROUPS = (
    ("measure", theme.BLUE, "circle"),
    ("measure whose sign changes given the settings", theme.VERMILLION, "diamond"),
    ("control", theme.GREY, "circle-open"),
)


def data(result: Correlations) -> pd.DataFrame:
    """List the measures by falling tau, and after them the controls.

    Args:
        result: The correlations of one target.

    Returns:
        One row per measure with the fields of `MeasureCorrelation` and whether it is a `control`; undefined is NaN and
        comes last. `sign_flip` is null where `tau` or `partial` is undefined.
    """
    rows = [
        {"measure": name, "target": result.target, "control": control, **dataclasses.asdict(one)}
        for control, group in ((False, result.measures), (True, result.controls))
        for name, one in group.items()
    ]
    frame = pd.DataFrame(rows, columns=_COLUMNS)
    frame[_NUMBERS] = frame[_NUMBERS].apply(pd.to_numeric)
    order = ["control", "tau", "measure"]
    return frame.sort_values(order, ascending=[True, False, True], na_position="last").reset_index(drop=True)


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw a point and an interval per measure on two scales from -1 to 1.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure, the largest tau on top, controls at the bottom.
    """
    figure = make_subplots(
        cols=2, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=[words for _, words in _PANELS]
    )
    several = data["n"].nunique() > 1
    names = [
        theme.wrapped(f"{row.measure} (n = {row.n})" if several else str(row.measure)) for row in data.itertuples()
    ]
    group = np.select([data["control"].to_numpy(dtype=bool), (data["sign_flip"] == True).to_numpy()], [2, 1], 0)  # noqa: E712
    for place, (column, _) in enumerate(_PANELS, start=1):
        for number, (words, colour, symbol) in enumerate(_GROUPS):
            rows = data.assign(name=names)[(group == number) & data[column].notna().to_numpy()]
            if len(rows):
                figure.add_trace(_points(rows, column, words, colour, symbol, shown=place == 1), row=1, col=place)
        for name in data.assign(name=names).loc[data[column].isna(), "name"]:
            figure.add_annotation(
                x=0, y=name, text="undefined", showarrow=False, font={"color": theme.GREY}, row=1, col=place
            )
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=names[::-1], range=[-0.7, len(names) - 0.3]
    )
    figure.update_xaxes(range=[-1.05, 1.05], zeroline=True, title_text=f"with {data['target'].iloc[0]}")
    return theme.layout(figure, height=190 + theme.rows_height(names))


def _points(rows: pd.DataFrame, column: str, words: str, colour: str, symbol: str, *, shown: bool) -> go.Scatter:
    low, high = rows[f"{column}_low"], rows[f"{column}_high"]
    hover = [
        f"{name}: {value:.3f}"
        + ("" if pd.isna(down) else f" [{down:.3f}, {up:.3f}]")
        + f"<br>n = {n}, {configs} configurations"
        for name, value, down, up, n, configs in zip(
            rows["name"], rows[column], low, high, rows["n"], rows["n_configs"], strict=True
        )
    ]
    return go.Scatter(
        x=rows[column],
        y=rows["name"],
        mode="markers",
        name=words,
        legendgroup=words,
        showlegend=shown,
        marker={"size": 10, "color": colour, "symbol": symbol},
        # a percentile interval may leave its own estimate out; a negative arm has no drawing
        error_x={
            "array": (high - rows[column]).clip(lower=0).fillna(0),
            "arrayminus": (rows[column] - low).clip(lower=0).fillna(0),
            "thickness": 1.8,
            "width": 5,
            "color": colour,
        },
        text=hover,
        hovertemplate="%{text}<extra></extra>",
    )
