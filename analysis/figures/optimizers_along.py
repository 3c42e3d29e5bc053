"""Optimizers along another setting: a line of test accuracy per optimizer, such as against the learning rate."""

from __future__ import annotations

import html

import pandas as pd
import plotly.graph_objects as go

from flatmin.analysis import frames, seeds
from flatmin.analysis.figures import theme

MOST_LINES = 8
"""More optimizers than this cannot be told apart."""

_FIELDS = ["n", "mean", "sd", "se", "low", "high"]
_COLOURS = (theme.BLUE, theme.VERMILLION, theme.GREEN, theme.PURPLE, theme.ORANGE, theme.SKY, theme.GREY, "#000000")


def data(models: pd.DataFrame, *, axis: str) -> pd.DataFrame:
    """Average the test accuracy (the loss, where there is none) of every optimizer at each value of a setting.

    Args:
        models: Rows of the `models/` table; only those whose training came to an end are used.
        axis: The setting.

    Returns:
        One row per optimizer and value, by falling mean of the best value: `optimizer`, `axis`, `value`, `quantity`,
        and over the `n` models there `mean`, `sd`, `se`, `low`, `high` (95 %, Student's t; null for one model). Models
        that lack the setting are left out.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    frames.check_columns(models, ["optimizer", axis], role="optimizer figure")
    known = "test_acc" if "test_acc" in models.columns and models["test_acc"].notna().any() else "test_loss"
    ended = models[frames.kept(models) & models[axis].notna()]
    table = seeds.over_seeds(ended, [known], axes=["optimizer", axis]).rename(columns={axis: "value"})
    best = table.groupby("optimizer")["mean"].transform("max" if known == "test_acc" else "min")
    order = table.assign(order=-best if known == "test_acc" else best, axis=axis)
    order = order.sort_values(["order", "optimizer", "value"], kind="stable", ignore_index=True)
    return order[["optimizer", "axis", "value", "quantity", *_FIELDS]]


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw a line with intervals per optimizer.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure, with the best `MOST_LINES` optimizers.
    """
    figure = go.Figure()
    numbers = pd.api.types.is_numeric_dtype(data["value"]) and not pd.api.types.is_bool_dtype(data["value"])
    for rank, name in enumerate(data["optimizer"].unique()[:MOST_LINES]):
        part = data[data["optimizer"] == name]
        figure.add_scatter(
            x=part["value"] if numbers else [theme.format_value(value) for value in part["value"]],
            y=part["mean"],
            error_y={"array": (part["high"] - part["mean"]).fillna(0), "thickness": 1.2, "width": 3},
            mode="lines+markers",
            name=html.escape(str(name)),
            showlegend=True,
            line={"color": _COLOURS[rank], "width": 2, "dash": theme.DASHES[rank % 6]},
            marker={"symbol": theme.SYMBOLS[rank % 6], "size": 7},
            customdata=part[["low", "high", "n"]],
            hovertemplate="%{x}: %{y:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}], n = %{customdata[2]}",
        )
    scale = theme.scale_of(data["value"], decades=0.9) if numbers else "category"
    named = theme.ticks(data["value"]) if scale == "log" else {}
    figure.update_xaxes(type=scale, title_text=theme.title(str(data["axis"].iloc[0])))
    if scale == "log":
        figure.update_xaxes(**named or theme.log_ticks(data["value"]))
    figure.update_yaxes(title_text=theme.title(str(data["quantity"].iloc[0])))
    return theme.layout(figure, height=430)
