"""Slices of loss surfaces: lines laid over each other, or contours and 3-D surfaces side by side.

Li et al. 2018, "Visualizing the loss landscape of neural nets".
"""

from __future__ import annotations

import html
import math

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flatmin.analysis import curves, frames
from flatmin.analysis.figures import theme

KIND = "surface"

_COLUMNS = ["label", "model_id", "name", "about", "x", "y", "value"]
_LINES = (theme.BLUE, theme.GREY, theme.VERMILLION)
_WIDEST = 40
_LEVELS = 14
_MOST_IN_3D = 3
_LEAST_MARKS = 4
_ROUNDING = 1e-9


def data(spectra: pd.DataFrame, models: pd.DataFrame, *, label: str, target: str = "gen_gap") -> pd.DataFrame:
    """List the points of one label's surfaces, of the few models that stand for all.

    Args:
        spectra: Rows of the `spectra/` table.
        models: Rows of the `models/` table.
        label: The measure label whose surfaces to take.
        target: The column by which models are chosen; see `flatmin.analysis.curves`.

    Returns:
        One row per point: `label`, `model_id`, `name` and `about` (which of the few the model is), `x`, `y` (null on a
        line) and `value`, the loss in nats (null where it is not finite); sorted by model, y and x.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    rows = curves.of_kind(spectra, KIND)
    rows = rows[rows["label"] == label]
    parts = []
    for chosen in curves.representatives(models, list(rows["model_id"].unique()), target=target):
        own = rows[rows["model_id"] == chosen.model_id].reset_index(drop=True)
        points = {name: frames.numeric(own, name, role="surface") for name in ("x", "y", "value")}
        part = pd.DataFrame(points).assign(label=label, model_id=chosen.model_id, name=chosen.name, about=chosen.about)
        parts.append(part.drop_duplicates(["x", "y"]).sort_values(["y", "x"], kind="stable"))
    return pd.concat(parts, ignore_index=True)[_COLUMNS] if parts else pd.DataFrame(columns=_COLUMNS)


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw lines in one panel, or a contour above a 3-D surface for each model, all in the same colours.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure. Losses are on a logarithmic scale where they are positive and span more than a power of ten.
    """
    return _lines(data) if data["y"].isna().all() else _planes(data)


def _lines(data: pd.DataFrame) -> go.Figure:
    figure = go.Figure()
    for rank, (name, part) in enumerate(data.groupby("name", sort=False)):
        about = part["about"].iloc[0]
        figure.add_scatter(
            x=part["x"],
            y=part["value"],
            name=html.escape(f"{name} ({about})" if about else str(name)),
            mode="lines+markers",
            showlegend=True,
            line={"color": _LINES[rank % len(_LINES)], "width": 2, "dash": theme.DASHES[rank % len(theme.DASHES)]},
            marker={"symbol": theme.SYMBOLS[rank % len(theme.SYMBOLS)], "size": 5},
            hovertemplate="x %{x:.3g}: %{y:.4g} nats",
        )
    scale = theme.scale_of(data["value"])
    figure.update_yaxes(title_text="loss (nats)", **(theme.log_ticks(data["value"]) if scale == "log" else {}))
    figure.update_xaxes(title_text="x (lengths of the direction; trained weights at 0)")
    return theme.layout(figure, height=400)


def _planes(data: pd.DataFrame) -> go.Figure:
    names = list(data["name"].unique())
    titles = [_wrapped(name, data.loc[data["name"] == name, "about"].iloc[0]) for name in names]
    figure = make_subplots(
        rows=2,
        cols=len(names),
        specs=[[{"type": "xy"}] * len(names), [{"type": "scene"}] * len(names)],
        row_heights=[0.5, 0.5],
        vertical_spacing=0.12,
        horizontal_spacing=0.06,
        subplot_titles=titles,
    )
    log = theme.scale_of(data["value"]) == "log"
    heights = data["value"].map(lambda value: _height(value, log=log))
    low, high = float(heights.min()), float(heights.max())
    marks = _marks(data["value"], log=log)
    bar = {"thickness": 12, "len": 0.9, "title": {"text": "loss<br>(nats)"}, **_marked(marks, log=log)}
    step = (high - low) / _LEVELS or 1.0
    for column, name in enumerate(names, start=1):
        rows = data[data["name"] == name].assign(height=heights)
        values, grid = (rows.pivot(index="y", columns="x", values=of) for of in ("value", "height"))
        shared = {
            "x": grid.columns,
            "y": grid.index,
            "z": [[None if math.isnan(value) else value for value in row] for row in grid.to_numpy()],
            "text": np.array([[_written(value) for value in row] for row in values.to_numpy()]),
            "colorscale": theme.SCALE,
            "hovertemplate": "x %{x:.3g}, y %{y:.3g}: %{text} nats<extra></extra>",
        }
        figure.add_contour(
            **shared,
            zmin=low,
            zmax=high,
            contours={"start": low, "end": high, "size": step},
            line={"width": 0.6},
            showscale=column == 1,
            colorbar=bar,
            row=1,
            col=column,
        )
        figure.add_surface(**shared, cmin=low, cmax=high, showscale=False, row=2, col=column)
        centre = {"symbol": "cross", "size": 9, "color": "white", "line": {"color": "black", "width": 1}}
        skipped = {"showlegend": False, "hoverinfo": "skip"}
        figure.add_scatter(x=[0], y=[0], mode="markers", marker=centre, **skipped, row=1, col=column)
    theme.layout(figure, height=680).update_layout(margin_b=10)
    level = {"tickangle": 0, "tickfont": {"size": 12}}
    few = frames.spread(marks, _MOST_IN_3D)
    figure.update_scenes(
        xaxis=level | _ends(data["x"]) | {"title": {"text": "x"}},
        yaxis=level | _ends(data["y"]) | {"title": {"text": "y"}},
        zaxis=level | _marked(few, log=log) | {"title": {"text": ""}, "range": [low, high]},
        camera={"eye": {"x": 1.45, "y": 1.35, "z": 0.75}, "center": {"x": 0.07, "y": -0.07, "z": -0.08}},
        aspectmode="manual",
        aspectratio={"x": 0.85, "y": 0.85, "z": 0.75},
    )
    figure.update_xaxes(title_text="x (lengths of d1)", row=1)
    figure.update_yaxes(title_text="y (lengths of d2)", row=1, col=1)
    return figure


def _wrapped(name: str, about: str) -> str:
    short = about if len(about) <= _WIDEST else about[: _WIDEST - 1] + "…"
    return "<br>".join(html.escape(line) for line in (name, short) if line)


def _written(value: float) -> str:
    return "not finite" if math.isnan(value) else f"{value:.4g}"


def _height(value: float, *, log: bool) -> float:
    return math.log10(value) if log else float(value)


def _ends(values: pd.Series) -> dict[str, object]:
    """Return ticks at the ends of an axis and at its middle, which is all that a small 3-D axis has room for."""
    places = [float(values.min()), 0.0, float(values.max())]
    return {"tickvals": places, "ticktext": [f"{place:.3g}" for place in places]}


def _marked(marks: list[float], *, log: bool) -> dict[str, object]:
    """Return ticks at losses."""
    return {"tickvals": [_height(mark, log=log) for mark in marks], "ticktext": [f"{mark:.3g}" for mark in marks]}


def _marks(values: pd.Series, *, log: bool) -> list[float]:
    """Return losses to mark: round ones, or 1, 2 and 5 times powers of ten; fewer where they would be many."""
    low, high = float(values.min()), float(values.max())
    if not log:
        step = _round_step(high - low)
        if step == 0:
            return [low]
        first, last = math.ceil(low / step - _ROUNDING), math.floor(high / step + _ROUNDING)
        return [step * part for part in range(first, last + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1.0, 2.0, 5.0) if len(decades) <= 4 else (1.0,)
    inside = [mark for power in decades for mark in (factor * 10.0**power for factor in factors) if low <= mark <= high]
    return frames.spread(inside, 10)


def _round_step(span: float) -> float:
    """Return the largest of 1, 2 and 5 times powers of ten that fits four times in a span; 0 for an empty one.

    >>> _round_step(2.4), _round_step(0.03), _round_step(0.0)
    (0.5, 0.005, 0.0)
    """
    if span <= 0:
        return 0.0
    power: float = 10.0 ** math.floor(math.log10(span / _LEAST_MARKS))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= span / _LEAST_MARKS * (1 + _ROUNDING))
