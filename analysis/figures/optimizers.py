"""Optimizers beside each other: mean and 95 % interval over seeds, last and best epoch apart, published beside."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from flatmin.analysis import frames, seeds
from flatmin.analysis.axes import independent
from flatmin.analysis.figures import theme

MOST_LINES = 40
"""Configurations that are drawn; the table for download has all."""

_LAST_AND_BEST = ("test_acc", "best_test_acc")
_MARKS = {"last": (theme.BLUE, "circle"), "best on test": (theme.ORANGE, "diamond-open")}
_FIELDS = ["n", "mean", "sd", "se", "low", "high"]


def data(models: pd.DataFrame, compared: pd.DataFrame | None = None) -> pd.DataFrame:
    """Summarise the test accuracy (the loss, where there is none) of every configuration over its seeds.

    Args:
        models: Rows of the `models/` table; only those whose training came to an end are used.
        compared: What `published.compare` returned, or None.

    Returns:
        One row per configuration and quantity, the best mean of the last epoch first: `configuration` in words (its
        axes), the settings that vary, `quantity`, `epoch` (`last` or `best on test`), `n`, `mean`, `sd`, `se`, `low`,
        `high` (95 %, Student's t; null for one seed), `published` and `published_stderr`, null where nothing is
        published of it.

    Raises:
        RequestError: A column is not numeric.
    """
    known = [name for name in _LAST_AND_BEST if name in models.columns and models[name].notna().any()]
    ended = models[frames.kept(models)]
    axes = frames.varying(ended)
    table = seeds.over_seeds(ended, known or ["test_loss"], axes=axes)
    shown = independent(ended)
    words = [_words(row, shown) for row in table.to_dict("records")]
    table.insert(0, "configuration", words)
    ours = [_published(row, axes, compared) for row in table.to_dict("records")]
    table["published"] = [value for value, _ in ours]
    table["published_stderr"] = [stderr for _, stderr in ours]
    table[["published", "published_stderr"]] = table[["published", "published_stderr"]].astype(float)
    last = table[table["epoch"] == "last"].set_index("configuration")["mean"]
    falling = bool(known)
    order = table["configuration"].map(last[~last.index.duplicated()])
    place = table.assign(order=order).sort_values("order", ascending=not falling, kind="stable", na_position="last")
    return place.drop(columns="order").reset_index(drop=True)


def _words(row: Mapping[Hashable, object], axes: list[str]) -> str:
    """The settings of a configuration; null is what its optimizer or network does not take."""
    known = [axis for axis in axes if not frames.is_null(row[axis])]
    named = ("optimizer", "network", "dataset")
    shown = {axis: theme.format_value(row[axis]) for axis in known}
    return ", ".join(shown[axis] if axis in named else f"{axis} {shown[axis]}" for axis in known) or "all models"


def _published(
    row: Mapping[Hashable, Any], axes: list[str], compared: pd.DataFrame | None
) -> tuple[float | None, float | None]:
    """The published number of the same quantity whose settings are those of the row; none where several might be."""
    if compared is None or compared.empty:
        return None, None
    near = compared[(compared["quantity"] == row["quantity"]) & compared["ours"].notna() & compared["epoch"].isna()]
    found = [
        one
        for one in near.to_dict("records")
        if all(_same(row[name], value) for name, value in json.loads(one["settings"]).items() if name in axes)
    ]
    return (found[0]["value"], found[0]["stderr"]) if len(found) == 1 else (None, None)


def _same(ours: object, theirs: object) -> bool:
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return abs(ours - theirs) <= 1e-6 * abs(theirs)
    return ours == theirs


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw a point with its interval per configuration and epoch, and the published value as a cross.

    Args:
        data: What `data` returned, with at least one row.
    """
    names = list(data["configuration"].unique())[:MOST_LINES]
    rows = data[data["configuration"].isin(names)]
    figure = go.Figure()
    for epoch, (colour, symbol) in _MARKS.items():
        part = rows[(rows["epoch"] == epoch) & rows["mean"].notna()]
        if len(part):
            figure.add_trace(_points(part, f"{epoch} epoch" if epoch == "last" else epoch, colour, symbol))
    theirs = rows[rows["published"].notna()]
    for when, part in theirs.groupby("epoch", sort=False):
        figure.add_scatter(
            x=part["published"],
            y=[theme.wrapped(name) for name in part["configuration"]],
            error_x={"array": part["published_stderr"].fillna(0), "thickness": 1, "color": theme.GREY},
            mode="markers",
            name=f"published, {when}",
            showlegend=True,
            marker={"color": theme.GREY, "symbol": "x" if when == "last" else "x-open", "size": 9},
            hovertemplate="%{y}: %{x:.4g} published<extra></extra>",
        )
    order = [theme.wrapped(name) for name in names[::-1]]
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=order, range=[-0.7, len(order) - 0.3])
    figure.update_xaxes(title_text=theme.title(str(rows["quantity"].iloc[0])))
    return theme.layout(figure, height=170 + theme.rows_height(order))


def _points(part: pd.DataFrame, words: str, colour: str, symbol: str) -> go.Scatter:
    return go.Scatter(
        x=part["mean"],
        y=[theme.wrapped(name) for name in part["configuration"]],
        error_x={"array": (part["high"] - part["mean"]).fillna(0), "thickness": 1.6, "width": 4, "color": colour},
        mode="markers",
        name=words,
        showlegend=True,
        marker={"color": colour, "symbol": symbol, "size": 9},
        customdata=part[["low", "high", "n", "sd"]],
        hovertemplate="%{y}: %{x:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}]"
        "<br>sd %{customdata[3]:.3g}, n = %{customdata[2]}<extra></extra>",
    )
