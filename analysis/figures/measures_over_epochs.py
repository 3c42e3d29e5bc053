"""Measures during the training: value against epoch, one line per optimizer or other setting, one panel per measure."""

from __future__ import annotations

import html
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from flatmin.analysis import frames
from flatmin.analysis.figures import lines, theme

MOST_LINES = 8
MOST_EPOCHS = 80

_COLUMNS = ["measure", "axis", "value", "epoch", "mean", "low", "high", "std", "n"]
_HOVER = "epoch %{x}: %{y:.4g} (%{customdata[0]:.4g} to %{customdata[1]:.4g}, n = %{customdata[2]})"


def data(
    sharpness: pd.DataFrame,
    models: pd.DataFrame,
    *,
    axis: str | None = None,
    measures: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Average every measure over the models of each value of a setting, epoch by epoch.

    A model that stopped early has no value after its end, so `n` may fall along a line.

    Args:
        sharpness: Rows of the `sharpness/` table.
        models: Rows of the `models/` table; only those whose training came to an end are used.
        axis: The setting that makes the lines, of at most `MOST_LINES` evenly spread values. None: one line.
        measures: Labels. None: all that were taken at more than one epoch.

    Returns:
        One row per measure, value of the setting and epoch: `mean`, `low`, `high`, `std` (null for a single model) over
        `n` models; of many epochs, `MOST_EPOCHS` evenly spread ones. Empty where no measure was taken under way.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    frames.check_columns(sharpness, ["model_id", "label", "value", "epoch"], role="sharpness table")
    owners = lines.owners(models, sharpness, axis, MOST_LINES).rename(columns={"line": "setting"})
    keys = [name for name in owners.columns if name != "setting"]
    rows = sharpness[[*keys, "label", "epoch"]].assign(amount=frames.numeric(sharpness, "value", role="figure"))
    rows = rows.dropna(subset=["amount", "epoch"]).merge(owners, on=keys)
    # the last epoch of models that stop at different times is no course of any of them
    under_way = rows.groupby([*keys, "label"])["epoch"].nunique().groupby("label").max()
    names = [name for name in under_way.index[under_way > 1] if measures is None or name in measures]
    rows = rows[rows["label"].isin(names)]
    rows = rows[rows["epoch"].isin(frames.spread(sorted(rows["epoch"].unique()), MOST_EPOCHS))]
    groups = rows.groupby(["label", "setting", "epoch"], dropna=False)["amount"]
    out = groups.agg(["mean", "min", "max", "std", "count"]).reset_index()
    out = out.rename(columns={"label": "measure", "setting": "value", "min": "low", "max": "high", "count": "n"})
    return out.assign(axis=axis)[_COLUMNS]


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw a panel per measure, with a line and a band per value of the setting.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure; an axis is logarithmic where positive values span more than a decade.
    """
    names, values = sorted(data["measure"].unique()), frames.ordered(data["value"])
    columns = min(2, len(names))
    count = -(-len(names) // columns)
    figure = make_subplots(
        rows=count,
        cols=columns,
        horizontal_spacing=0.1,
        vertical_spacing=min(0.2, 75 / (270 * count)),
        subplot_titles=[html.escape(name) for name in names],
    )
    colours = sample_colorscale(theme.SCALE, [0.9 * rank / max(1, len(values) - 1) for rank in range(len(values))])
    for place, name in enumerate(names):
        row, column = place // columns + 1, place % columns + 1
        part = data[data["measure"] == name]
        for rank, value in enumerate(values):
            line = part[part["value"].isna() if value is None else part["value"] == value]
            if len(line):
                for trace in _line(line, value, colours[rank], theme.DASHES[rank % 6], first=place == 0):
                    figure.add_trace(trace, row=row, col=column)
        scale = theme.scale_of(part["mean"])
        figure.update_yaxes(**(theme.log_ticks(part["mean"]) if scale == "log" else {}), row=row, col=column)
    figure.update_xaxes(title_text="epoch", row=count)
    return theme.layout(figure, height=130 + 270 * count)


def _line(line: pd.DataFrame, value: object, colour: str, dash: str, *, first: bool) -> list[go.Scatter]:
    axis, shown = line["axis"].iloc[0], theme.format_value(value)
    name = html.escape(f"{axis} {shown}" if isinstance(axis, str) else shown)
    rgb = colour.removeprefix("rgb(").removesuffix(")")
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "legendgroup": name}
    edge["meta"] = str(line["measure"].iloc[0])
    mean = go.Scatter(
        x=line["epoch"],
        y=line["mean"],
        name=name,
        legendgroup=name,
        meta=edge["meta"],
        showlegend=first,
        mode="lines+markers",
        marker={"size": 4},
        line={"color": colour, "width": 1.8, "dash": dash},
        customdata=line[["low", "high", "n"]],
        hovertemplate=_HOVER,
    )
    if line["n"].max() < 2:
        return [mean]
    low = go.Scatter(x=line["epoch"], y=line["low"], fill="tonexty", fillcolor=f"rgba({rgb}, 0.15)", **edge)
    return [go.Scatter(x=line["epoch"], y=line["high"], **edge), low, mean]
