"""Training and test curves over epochs: one mean line per value of a setting."""

from __future__ import annotations

import html

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from flatmin.analysis import frames
from flatmin.analysis.figures import lines, theme

MOST_LINES = 8
MOST_EPOCHS = 80

_PANELS = ("train_error", "test_error", "train_loss", "test_loss")
_COLUMNS = ["axis", "value", "quantity", "epoch", "mean", "n"]


def data(
    epochs: pd.DataFrame,
    models: pd.DataFrame,
    *,
    axis: str | None = None,
    most_epochs: int = MOST_EPOCHS,
) -> pd.DataFrame:
    """Average errors and losses over the models of each value of a setting, epoch by epoch.

    A model that stops early is frozen, so it keeps its last value; else a line would jump when models leave
    it.

    Args:
        epochs: Rows of the `epochs/` table.
        models: Rows of the `models/` table; only those whose training came to an end are used.
        axis: The setting that makes the lines, of at most `MOST_LINES` evenly spread values. None: one line.
        most_epochs: Epochs to keep: half of them evenly, half evenly on a logarithmic scale.

    Returns:
        One row per (quantity, value of the setting, epoch) with `mean` over `n` models. `quantity` is
        `train_error`, `test_error` (fractions), `train_loss`, `test_loss` (nats); those never recorded are
        missing. A line begins where all of its models have been evaluated.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    frames.check_columns(epochs, ["model_id", "epoch"], role="epochs table")
    owners = lines.owners(models, epochs, axis, MOST_LINES).rename(columns={"line": "value"})
    rows = epochs.merge(owners, on=[name for name in owners.columns if name != "value"])
    if rows.empty:
        return pd.DataFrame(columns=_COLUMNS)
    sampled = _sample(rows, frames.thin(rows["epoch"], most_epochs))
    quantities = _quantities(sampled)
    wide = sampled[["value", "epoch"]].assign(**quantities)
    long = wide.melt(["value", "epoch"], list(quantities), "quantity", "amount").dropna(subset=["amount"])
    out = long.groupby(["quantity", "value", "epoch"], dropna=False)["amount"].agg(["mean", "count"]).reset_index()
    # models that stop early are evaluated then, between the epochs of the others: a mean of them alone would be no line
    whole = out.groupby(["quantity", "value"], dropna=False)["count"].transform(lambda n: n.cummax() == n.max())
    return out[whole].rename(columns={"count": "n"}).assign(axis=axis).reset_index(drop=True)[_COLUMNS]


def _sample(rows: pd.DataFrame, shown: list[int]) -> pd.DataFrame:
    """The last evaluation of every model at or before every shown epoch."""
    owners = rows[["model_id", "value"]].drop_duplicates("model_id")
    grid = pd.DataFrame({"epoch": shown}).merge(owners, how="cross").astype({"epoch": "int64"})
    known = rows.drop(columns=["value"]).astype({"epoch": "int64"}).sort_values("epoch", kind="stable")
    return pd.merge_asof(grid.sort_values("epoch", kind="stable"), known, on="epoch", by="model_id")


def _quantities(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    out = {}
    for quantity in _PANELS:
        part, kind = quantity.split("_")
        column = f"{part}_acc" if kind == "error" else quantity
        if column in rows.columns:
            values = frames.numeric(rows, column, role="figure")
            out[quantity] = 1 - values if kind == "error" else values
    return out


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw training on the left and test on the right, errors above losses.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure; buttons switch the epoch axis between linear and logarithmic.
    """
    present = [name for name in _PANELS if name in set(data["quantity"])]
    rows = -(-len(present) // 2)
    figure = make_subplots(
        rows=rows,
        cols=min(2, len(present)),
        shared_xaxes=True,
        horizontal_spacing=0.09,
        vertical_spacing=0.1,
        subplot_titles=[theme.title(name) for name in present],
    )
    values = frames.ordered(data["value"])
    colours = sample_colorscale(theme.SCALE, [0.9 * rank / max(1, len(values) - 1) for rank in range(len(values))])
    for place, name in enumerate(present):
        part = data[data["quantity"] == name]
        for rank, value in enumerate(values):
            line = part[part["value"] == value] if value is not None else part[part["value"].isna()]
            _line(figure, line, value, colours[rank], dash=theme.DASHES[rank % 6], panel=place)
        scale = theme.scale_of(part["mean"]) if name.endswith("loss") else "linear"
        ticks = theme.log_ticks(part["mean"]) if scale == "log" else {}
        figure.update_yaxes(**ticks, row=place // 2 + 1, col=place % 2 + 1)
    figure.update_xaxes(title_text="epoch", row=rows)
    theme.layout(figure, height=170 + 260 * rows)
    return theme.epoch_buttons(figure)


def _line(figure: go.Figure, line: pd.DataFrame, value: object, colour: str, *, dash: str, panel: int) -> None:
    if line.empty:
        return
    axis = line["axis"].iloc[0]
    shown = theme.format_value(value)
    figure.add_scatter(
        x=line["epoch"],
        y=line["mean"],
        name=html.escape(f"{axis} {shown}" if isinstance(axis, str) else shown),
        legendgroup=str(value),
        showlegend=panel == 0,
        mode=theme.line_mode(line["epoch"]),
        line={"color": colour, "width": 1.8, "dash": dash},
        customdata=line["n"],
        hovertemplate="epoch %{x}: %{y:.4g} (n = %{customdata})",
        row=panel // 2 + 1,
        col=panel % 2 + 1,
    )
