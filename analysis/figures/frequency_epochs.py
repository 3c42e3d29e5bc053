"""Epochs to learn frequency k against k, both logarithmic: every model, and the fitted line of each optimizer."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from flatmin.analysis.figures import frequency_panels, theme
from flatmin.analysis.frequency_learning import Bias

MOST_POINTS = 2000

_APART = 0.09
"""Optimizers stand beside each other at a frequency, at most so far apart in log2 k, so that points can be told."""

_HOVER = "%{customdata[0]}, k = %{customdata[1]:g}: %{customdata[2]}<extra></extra>"


def data(learnt: pd.DataFrame, biases: Sequence[Bias]) -> pd.DataFrame:
    """List when every model learnt every frequency, DC left out, with the fitted line.

    Args:
        learnt: What `frequency_learning.epochs_to_learn` returned.
        biases: What `frequency_learning.biases` returned of it.

    Returns:
        One row per model and frequency: `line`, `model_id`, `k`, `epoch` (null: never learnt), `end` (the last record),
        `fitted` (epochs by the line; null where there is none), `slope`, `low` and `high`.
    """
    rows = learnt[learnt["k"] > 0].drop(columns="after").reset_index(drop=True)
    found = {one.line: one for one in biases}
    slope = rows["line"].map(lambda line: _number(found[line].slope))
    intercept = rows["line"].map(lambda line: _number(found[line].intercept))
    return rows.assign(
        epoch=rows["epoch"].replace(math.inf, math.nan),
        fitted=np.exp(intercept + slope * np.log(rows["k"])),
        slope=slope,
        low=rows["line"].map(lambda line: _number(found[line].low)),
        high=rows["line"].map(lambda line: _number(found[line].high)),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw a point per model and frequency, an arrow at the end of training where it was never learnt, and the lines.

    Args:
        data: What `data` returned, with at least one row.
    """
    names, figure = list(data["line"].unique()), go.Figure()
    shown, ks = max(1, MOST_POINTS // len(names)), np.sort(data["k"].unique())
    apart = min(_APART, 0.6 / len(names) * float(np.diff(np.log2(ks)).min(initial=1.0)))
    for rank, name in enumerate(names):
        colour = frequency_panels.WHEEL[rank % len(frequency_panels.WHEEL)]
        part = data[data["line"] == name]
        some = part.sample(shown, random_state=0) if len(part) > shown else part
        shift = 2 ** (apart * (rank - (len(names) - 1) / 2))
        figure.add_trace(_points(some, shift, colour, html.escape(str(name))))
        line = part.drop_duplicates("k").sort_values("k").dropna(subset=["fitted"])
        if len(line):
            figure.add_trace(_line(line, colour, rank, html.escape(str(name))))
    figure.update_xaxes(title_text="frequency k (cycles over the range of the inputs)", type="log")
    figure.update_xaxes(
        tickvals=ks if len(ks) <= 10 else None, ticktext=[f"{k:g}" for k in ks] if len(ks) <= 10 else None
    )
    drawn = pd.concat([data["epoch"], data["end"], data["fitted"]]).dropna()
    figure.update_yaxes(title_text="epochs until it is learnt", **theme.log_ticks(drawn))
    return theme.layout(figure, height=480)


def _points(part: pd.DataFrame, shift: float, colour: str, name: str) -> go.Scatter:
    never = part["epoch"].isna()
    said = np.where(never, "not by epoch " + part["end"].map("{:g}".format), part["epoch"].map("epoch {:g}".format))
    return go.Scatter(
        x=part["k"] * shift,
        y=part["epoch"].fillna(part["end"]),
        name=name,
        legendgroup=name,
        showlegend=bool(part["fitted"].isna().all()),
        mode="markers",
        marker={
            "color": colour,
            "size": np.where(never, 9, 6),
            "opacity": 0.6,
            "symbol": np.where(never, "arrow-up-open", "circle"),
        },
        customdata=np.column_stack([part["line"], part["k"], said]),
        hovertemplate=_HOVER,
    )


def _line(line: pd.DataFrame, colour: str, rank: int, name: str) -> go.Scatter:
    first = line.iloc[0]
    interval = "" if math.isnan(first["low"]) else f" [{first['low']:.2f}, {first['high']:.2f}]"
    return go.Scatter(
        x=line["k"],
        y=line["fitted"],
        name=f"{name}: k^{first['slope']:.2f}{interval}",
        legendgroup=name,
        showlegend=True,
        mode="lines",
        line={"color": colour, "width": 1.8, "dash": theme.DASHES[rank % len(theme.DASHES)]},
        hovertemplate="fitted: epoch %{y:.4g}<extra></extra>",
    )
