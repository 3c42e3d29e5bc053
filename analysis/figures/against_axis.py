"""Errors and measures against one setting: the double-descent plot, for width, noise or any other number.

A line is the mean over all models with the same value of the axis; its band runs from the lowest to the
highest of them. Belkin et al. 2019, "Reconciling modern machine-learning practice and the classical
bias-variance trade-off"; Nakkiran et al. 2020, "Deep double descent".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flatmin.analysis import frames
from flatmin.analysis.figures import theme
from flatmin.analysis.peak import SeedPeak

MOST_LINES = 6
"""More lines per quantity than this cannot be told apart."""

_HOVER = "%{x}: %{y:.4g} (%{customdata[0]:.4g} to %{customdata[1]:.4g}, n = %{customdata[2]})"
_COLUMNS = ["axis", "x", "by", "by_value", "quantity", "kind", "mean", "low", "high", "std", "n"]


def data(
    models: pd.DataFrame,
    sharpness: pd.DataFrame | None = None,
    *,
    axis: str,
    by: str | None = None,
    measures: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Average errors and measures over the models of each value of an axis.

    Args:
        models: Rows of the `models/` table; only those whose training came to an end are used.
        sharpness: Rows of the `sharpness/` table, or None.
        axis: The setting on the x axis; rows where it is null are left out.
        by: A setting that makes further lines; of many values, `MOST_LINES` evenly spread ones are used.
        measures: Labels, or numeric columns of `models`. None: all labels.

    Returns:
        One row per (quantity, `by` value, x) with `mean`, `low`, `high`, `std` (null for a single model) and
        `n` models. `quantity` is `test_error` and `train_error` (1 - accuracy), or the losses in nats where
        no accuracy is known, and the measures; `kind` is `error`, `loss` or `measure`.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    table = frames.wide(models, sharpness)
    table = table[frames.kept(table)]
    names = list(measures) if measures is not None else frames.labels(sharpness)
    frames.check_columns(table, [axis, *([by] if by else []), *names], role="figure")
    values = _scores(table) | {name: frames.numeric(table, name, role="measure") for name in names}
    kinds = {name: "measure" for name in names}
    base = {
        "x": frames.numeric(table, axis, role="axis"),
        "by_value": frames.hashable(table[by]) if by else pd.Series(None, index=table.index, dtype=object),
    }
    parts = [
        pd.DataFrame(base).assign(quantity=name, kind=kinds.get(name, name.partition("_")[2]), value=value)
        for name, value in values.items()
    ]
    rows = pd.concat(parts).dropna(subset=["x", "value"])
    if by:
        shown = frames.spread(frames.ordered(table[by]), MOST_LINES)
        rows = rows[rows["by_value"].isin([value for value in shown if value is not None])]
    keys = ["quantity", "kind", "by_value", "x"]
    out = (
        rows.groupby(keys, dropna=False, sort=False)["value"].agg(["mean", "min", "max", "std", "count"]).reset_index()
    )
    out = out.rename(columns={"min": "low", "max": "high", "count": "n"}).assign(axis=axis, by=by)
    order = pd.Categorical(out["quantity"], categories=list(values), ordered=True)
    out = out.assign(_order=order).sort_values(["_order", "by_value", "x"])
    return out[_COLUMNS].reset_index(drop=True)


def _scores(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Errors where accuracies are known, else losses."""
    for source, kind in (("acc", "error"), ("loss", "loss")):
        found = {f"{part}_{kind}": f"{part}_{source}" for part in ("test", "train") if f"{part}_{source}" in table}
        values = {name: frames.numeric(table, column, role="figure") for name, column in found.items()}
        if any(np.isfinite(value).any() for value in values.values()):
            return {name: 1 - value if kind == "error" else value for name, value in values.items()}
    return {}


def draw(data: pd.DataFrame, peaks: Sequence[SeedPeak] = ()) -> go.Figure:
    """Draw errors on the top panel and each measure on a panel below, all with the same x axis.

    Args:
        data: What `data` returned, with at least one row.
        peaks: Peaks of the test error with intervals; those of their places are stripes.

    Returns:
        The figure.
    """
    scores = data[data["kind"] != "measure"]
    names = sorted(data.loc[data["kind"] == "measure", "quantity"].unique())
    panels = ([list(scores["quantity"].unique())] if len(scores) else []) + [[name] for name in names]
    heights = [2.2 if panel[0] not in names else 1.0 for panel in panels]
    figure = make_subplots(
        rows=len(panels),
        shared_xaxes=True,
        row_heights=heights,
        vertical_spacing=min(0.09, 0.3 / len(panels)),
        subplot_titles=[", ".join(theme.title(name).split(" (")[0] for name in panel) for panel in panels],
    )
    for row, panel in enumerate(panels, start=1):
        for quantity in panel:
            _lines(figure, data[data["quantity"] == quantity], theme.colour(quantity, names), row)
        rows = data[data["quantity"].isin(panel)]
        _style_y(figure, rows, row, measure=panel[0] in names)
    scale = theme.scale_of(data["x"], decades=0.9)
    figure.update_xaxes(type=scale)
    if scale == "log":
        figure.update_xaxes(**theme.ticks(data["x"]) or theme.log_ticks(data["x"]))
    figure.update_xaxes(title_text=theme.title(str(data["axis"].iloc[0])), row=len(panels))
    for one in peaks if len(scores) else ():
        stripe = {"fillcolor": "rgba(95,107,122,0.15)", "line_width": 0, "layer": "below"}
        figure.add_vrect(x0=one.x_low, x1=one.x_high, **stripe, row=1, col=1)
        figure.add_vline(x=one.x, line={"color": theme.GREY, "width": 1, "dash": "dot"}, row=1, col=1)
    return theme.layout(figure, height=170 + int(125 * sum(heights)))


def _style_y(figure: go.Figure, rows: pd.DataFrame, row: int, *, measure: bool) -> None:
    if measure:
        scale = theme.scale_of(rows["mean"])
        figure.update_yaxes(row=row, **(theme.log_ticks(rows["mean"]) if scale == "log" else {"nticks": 5}))
        return
    unit = "error (fraction)" if rows["kind"].iloc[0] == "error" else "loss (nats)"
    figure.update_yaxes(title_text=unit, rangemode="tozero", row=row)


def _lines(figure: go.Figure, rows: pd.DataFrame, colour: str, row: int) -> None:
    """One line and one band per value of `by`."""
    groups = list(rows.groupby("by_value", dropna=False, sort=False))
    for rank, (value, group) in enumerate(groups):
        shade = theme.shade(colour, rank, len(groups))
        first = str(group["quantity"].iloc[0])
        name = theme.title(first).split(" (")[0]
        if group["by"].notna().iloc[0]:
            name = f"{name}, {group['by'].iloc[0]} {theme.format_value(value)}"
        own = {"meta": first} if group["kind"].iloc[0] == "measure" else {}
        link = own | {"legendgroup": f"{first} {value}", "showlegend": False, "hoverinfo": "skip", "mode": "lines"}
        edge = {"width": 0, "color": shade}
        figure.add_scatter(x=group["x"], y=group["high"], line=edge, **link, row=row, col=1)
        fill = {"fill": "tonexty", "fillcolor": theme.transparent(shade, 0.18)}
        figure.add_scatter(x=group["x"], y=group["low"], line=edge, **fill, **link, row=row, col=1)
        figure.add_scatter(
            x=group["x"],
            y=group["mean"],
            name=name,
            **own,
            legendgroup=f"{first} {value}",
            showlegend=group["kind"].iloc[0] != "measure",
            mode="lines+markers",
            line={"color": shade, "width": 2},
            marker={"symbol": theme.SYMBOLS[rank % len(theme.SYMBOLS)], "size": 6},
            customdata=group[["low", "high", "n"]],
            hovertemplate=_HOVER,
            row=row,
            col=1,
        )
