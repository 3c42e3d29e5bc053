"""Accuracy against the mean error of the Fourier coefficients: a point per epoch, a fitted line per optimizer.

After the figures of "aryol/CS-439-project", image_classification and image_segmentation.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from flatmin.analysis import frames
from flatmin.analysis.figures import frequency_panels, theme
from flatmin.analysis.frequency_accuracy import Association, Panel, means

MOST_EPOCHS = 80


def data(found: Mapping[str, Panel], associations: Sequence[Association]) -> pd.DataFrame:
    """List the points, means over models.

    Args:
        found: What `frequency_accuracy.panels` returned.
        associations: What `frequency_accuracy.associations` returned of it.

    Returns:
        One row per line and epoch: `line`, `epoch`, `error` (mean of Delta F over frequencies and models), `accuracy`,
        and of the line `pearson`, `low`, `high`, `spearman` and `fitted` (by least squares, all epochs); null where
        undefined.
    """
    parts = []
    for one in associations:
        panel = found[one.line]
        every = np.ones(len(panel.accuracy))
        part = pd.DataFrame(
            {
                "epoch": panel.epochs,
                "error": means(panel.errors.mean(axis=2), every),
                "accuracy": means(panel.accuracy, every),
            }
        ).assign(pearson=one.pearson, low=one.low, high=one.high, spearman=one.spearman)
        part["fitted"] = np.nan
        if one.slope is not None and one.intercept is not None:
            part["fitted"] = one.intercept + one.slope * part["error"]
        parts.append(part[part["epoch"].isin(frames.thin(part["epoch"], MOST_EPOCHS))].assign(line=one.line))
    numbers = ["pearson", "low", "high", "spearman", "fitted"]
    return pd.concat(parts, ignore_index=True).astype(dict.fromkeys(numbers, "float64"))


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw points and lines, one colour per optimizer.

    Args:
        data: What `data` returned, with at least one row.
    """
    figure = go.Figure()
    for rank, (line, part) in enumerate(data.groupby("line", sort=False)):
        colour, name = frequency_panels.WHEEL[rank % len(frequency_panels.WHEEL)], html.escape(str(line))
        first = part.iloc[0]
        interval = (
            "" if np.isnan(first["low"]) else f" [{theme.format_tau(first['low'])}, {theme.format_tau(first['high'])}]"
        )
        figure.add_scatter(
            x=part["error"],
            y=part["accuracy"],
            name=f"{name}: r {theme.format_tau(first['pearson'])}{interval}",
            legendgroup=name,
            showlegend=True,
            mode="markers",
            marker={"color": colour, "size": 6, "symbol": theme.SYMBOLS[rank % len(theme.SYMBOLS)], "opacity": 0.7},
            customdata=part["epoch"],
            hovertemplate="epoch %{customdata}: %{y:.4g} at mean ΔF %{x:.3g}<extra></extra>",
        )
        ends = (
            part.dropna(subset=["fitted"]).sort_values("error").iloc[[0, -1]]
            if part["fitted"].notna().any()
            else part[:0]
        )
        figure.add_scatter(
            x=ends["error"],
            y=ends["fitted"],
            legendgroup=name,
            showlegend=False,
            mode="lines",
            line={"color": colour, "width": 1.5},
            hoverinfo="skip",
        )
    figure.update_xaxes(title_text="mean of ΔF over frequencies")
    figure.update_yaxes(title_text="accuracy (fraction)")
    return theme.layout(figure, height=440)
