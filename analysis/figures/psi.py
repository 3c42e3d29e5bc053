"""Granulated coefficients as a map: does a measure follow the target when one setting varies and all others are fixed?

Psi of Jiang et al. 2020, section 2.2.2; see `analysis/granulated.py`.
"""

from __future__ import annotations

import html

import pandas as pd
import plotly.graph_objects as go

from flatmin.analysis.correlation import Correlations
from flatmin.analysis.figures import theme

_COLUMNS = ["measure", "axis", "psi", "groups", "undefined", "alone", "tied", "control"]


def data(result: Correlations) -> pd.DataFrame:
    """List psi of every measure and axis, the measures by falling mean over axes, the controls last.

    Args:
        result: The correlations of one target.

    Returns:
        One row per measure and axis: `psi`, null where undefined; `groups` in its mean, `undefined` groups,
        configurations `alone`, `tied` pairs; whether it is a `control`.
    """
    rows = []
    for control, group in ((False, result.measures), (True, result.controls)):
        # an undefined mean comes last
        known = sorted(group.items(), key=lambda item: -(item[1].psi_mean if item[1].psi_mean is not None else -2))
        for name, one in known:
            for axis, psi in one.psi.items():
                counts = [psi.groups, psi.undefined, psi.alone, psi.tied]
                rows.append([name, axis, psi.value, *counts, control])
    return pd.DataFrame(rows, columns=_COLUMNS).astype({"psi": float})


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw a cell per measure and axis, from -1 to 1; undefined cells are blank.

    Args:
        data: What `data` returned, with at least one row.
    """
    names, axes = (list(data[column].unique()) for column in ("measure", "axis"))
    cells = {(row["measure"], row["axis"]): row for row in data.to_dict("records")}
    table = [[cells[name, axis] for axis in axes] for name in names]
    labels = [theme.wrapped(name) for name in names]
    figure = go.Figure()
    figure.add_heatmap(
        x=[html.escape(axis) for axis in axes],
        y=labels,
        z=[[None if pd.isna(cell["psi"]) else cell["psi"] for cell in row] for row in table],
        text=[["" if pd.isna(cell["psi"]) else f"{cell['psi']:.2f}" for cell in row] for row in table],
        customdata=[[[cell["groups"], cell["undefined"], cell["alone"]] for cell in row] for row in table],
        texttemplate="%{text}",
        hovertemplate="%{y} along %{x}: ψ = %{z:.3f}<br>%{customdata[0]} groups, %{customdata[1]} undefined, "
        "%{customdata[2]} configurations alone<extra></extra>",
        hoverongaps=False,
        colorscale="RdBu_r",
        zmin=-1,
        zmax=1,
        xgap=2,
        ygap=2,
        colorbar={"title": {"text": "ψ"}, "thickness": 12},
    )
    theme.layout(figure, height=150 + theme.rows_height(labels))
    figure.update_xaxes(type="category", showgrid=False, zeroline=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, zeroline=False)
    return figure.update_layout(margin_t=44)
