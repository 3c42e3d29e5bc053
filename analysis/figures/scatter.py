"""A measure against the generalisation gap: one point per model, one panel per measure."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flatmin.analysis import frames
from flatmin.analysis.figures import theme

MOST_ERROR_BARS = 1000
"""Points of a panel above which error bars are left away: they would only make the page slow and black."""

MOST_POINTS = 2500
"""Points of the whole figure; of more models, some stand for all, the same ones in every panel."""

_FIXED = ["model_id", "measure", "value", "stderr", "target", "target_value"]


def data(
    models: pd.DataFrame,
    sharpness: pd.DataFrame,
    *,
    target: str = "gen_gap",
    axes: Sequence[str] | None = None,
) -> pd.DataFrame:
    """List every model's measures beside its target and settings.

    Args:
        models: Rows of the `models/` table; only those whose training came to an end are used.
        sharpness: Rows of the `sharpness/` table.
        target: The column on the y axis.
        axes: Settings to carry along for colour and hover text. None: all that vary, and the seed.

    Returns:
        One row per model and measure: `model_id`, `measure` (the label), `value`, `stderr` (null where
        unknown), `target`, `target_value`, then one column per setting. Rows without value or target are
        left out.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    frames.check_columns(models, ["model_id", target], role="target")
    if axes is None:
        axes = [*frames.varying(models), *[name for name in ("seed",) if name in models.columns]]
    frames.check_columns(models, axes, role="axis")
    rows = frames.final(models, sharpness)
    keys = [key for key in ("model_id", "trial_id") if key in rows.columns and key in models.columns]
    stderr = frames.numeric(rows, "stderr", role="figure") if "stderr" in rows.columns else np.nan
    values = frames.numeric(rows, "value", role="figure")
    rows = rows[keys].assign(measure=rows["label"], value=values, stderr=stderr)
    # rows from several tables may share index values, and a join would then multiply them
    table = models[frames.kept(models)].reset_index(drop=True)
    settings = pd.DataFrame({axis: frames.hashable(table[axis]) for axis in axes}, index=table.index)
    table = table[keys].assign(target=target, target_value=frames.numeric(table, target, role="target")).join(settings)
    joined = rows.merge(table, on=keys).dropna(subset=["value", "target_value"])
    return joined[[*_FIXED, *axes]].sort_values(["measure", "model_id"]).reset_index(drop=True)


def averaged(data: pd.DataFrame) -> pd.DataFrame:
    """Average over the seeds of every configuration.

    Args:
        data: What `data` returned.

    Returns:
        One row per configuration and measure: the same columns without the seed, `models` (how many) in place of
        `model_id`; no `stderr`.
    """
    axes = [column for column in data.columns if column not in (*_FIXED, *frames.SEED_COLUMNS)]
    groups = data.groupby(["measure", *axes], dropna=False, sort=False)
    means = groups.agg(
        models=("model_id", "nunique"),
        value=("value", "mean"),
        target=("target", "first"),
        target_value=("target_value", "mean"),
    ).reset_index()
    return means.assign(stderr=np.nan)[["models", *_FIXED[1:], *axes]]


def thinned(data: pd.DataFrame) -> pd.DataFrame:
    """Keep points that stand for all, where there are more than `MOST_POINTS`: evenly by rank of the target.

    Args:
        data: What `data` or `averaged` returned.

    Returns:
        Some of the rows; a model or configuration that is kept is kept for every measure.
    """
    most = max(2, MOST_POINTS // max(1, data["measure"].nunique()))
    settings = [column for column in data.columns if column not in (*_FIXED, "models")]
    keys = ["model_id"] if "model_id" in data.columns else settings
    if not keys:
        return data
    point = data.groupby(keys, dropna=False, sort=True).ngroup()
    order = data.assign(_point=point).groupby("_point")["target_value"].first().sort_values(kind="stable").index
    return data[point.isin(frames.spread(list(order), most))].reset_index(drop=True)


def has_bars(data: pd.DataFrame) -> bool:
    """Tell whether `draw` gives the points error bars.

    Args:
        data: What `data` returned.
    """
    few = data.groupby("measure").size().max() <= MOST_ERROR_BARS
    return bool(few and data["stderr"].notna().any())


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw one panel per measure, coloured by a setting that the reader chooses.

    Args:
        data: What `data`, `averaged` or `thinned` returned, with at least one row.

    Returns:
        The figure; a menu changes the colour when more than one setting varies.
    """
    names = sorted(data["measure"].unique())
    axes = [
        column
        for column in data.columns
        if column not in (*_FIXED, "models") and data[column].nunique(dropna=False) > 1
    ]
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        shared_yaxes=True,
        horizontal_spacing=0.05,
        vertical_spacing=min(0.16, 75 / (290 * rows)),
        subplot_titles=[html.escape(name) for name in names],
    )
    for place, name in enumerate(names):
        part = data[data["measure"] == name]
        figure.add_trace(_points(part, axes), row=place // columns + 1, col=place % columns + 1)
        scale = theme.scale_of(part["value"])
        ticks = theme.log_ticks(part["value"]) if scale == "log" else {"exponentformat": "power"}
        figure.update_xaxes(**ticks, row=place // columns + 1, col=place % columns + 1)
    figure.update_yaxes(title_text=_short(str(data["target"].iloc[0])), col=1)
    theme.layout(figure, height=90 + 290 * rows)
    if axes:
        _colours(figure, data, names, axes)
    return figure


def _short(target: str) -> str:
    return {"gen_gap": "generalisation gap (fraction)", "loss_gap": "loss gap (nats)"}.get(target, theme.title(target))


def _points(part: pd.DataFrame, axes: list[str]) -> go.Scatter:
    settings = [axis for axis in part.columns if axis not in (*_FIXED, "models")]
    first, heading = ("model_id", "") if "model_id" in part.columns else ("models", "models: ")
    lines = [f"{html.escape(axis)} = %{{customdata[{place + 1}]}}" for place, axis in enumerate(settings)]
    few = len(part) <= MOST_ERROR_BARS
    bars = few and part["stderr"].notna().any()
    # WebGL draws thousands of points at once; SVG prints better
    kind = go.Scatter if few else go.Scattergl
    return kind(
        x=part["value"],
        y=part["target_value"],
        error_x={"array": part["stderr"].fillna(0), "color": "#9aa4b2", "thickness": 1, "width": 0} if bars else None,
        mode="markers",
        meta=str(part["measure"].iloc[0]),
        showlegend=False,
        marker={
            "size": 7 if few else 4,
            "color": theme.GREY,
            "line": {"width": 0.5 if few else 0, "color": "white"},
        },
        customdata=[[_plain(value) for value in row] for row in part[[first, *settings]].to_numpy(dtype=object)],
        hovertemplate="<br>".join([f"{heading}%{{customdata[0]}}", "%{x:.4g}, %{y:.4f}", *lines]) + "<extra></extra>",
    )


def _plain(value: object) -> object:
    """A value as it may stand in hover text, which understands tags."""
    if isinstance(value, str):
        return html.escape(value)
    return "none" if frames.is_null(value) else value


def _colours(figure: go.Figure, data: pd.DataFrame, names: list[str], axes: list[str]) -> None:
    """Colour by rank of the setting's value, so that names, numbers and powers of ten all read alike."""
    buttons: list[dict[str, object]] = []
    starts: list[tuple[list[list[int]], dict[str, object]]] = []
    for axis in axes:
        values = frames.ordered(data[axis])
        ranks = _ranks(data[axis], values)
        marked = frames.spread(list(range(len(values))), 12)
        layout: dict[str, object] = {
            "coloraxis.cmin": 0,
            "coloraxis.cmax": max(1, len(values) - 1),
            "coloraxis.colorbar.title.text": html.escape(axis),
            "coloraxis.colorbar.tickvals": marked,
            "coloraxis.colorbar.ticktext": [html.escape(theme.format_value(values[rank])) for rank in marked],
        }
        colours = [ranks[data["measure"] == name].tolist() for name in names]
        buttons.append({"label": axis, "method": "update", "args": [{"marker.color": colours}, layout]})
        starts.append((colours, layout))
    first_colours, first_layout = starts[0]
    for trace, ranked in zip(figure.data, first_colours, strict=True):
        trace.marker.update(color=ranked, coloraxis="coloraxis")
    figure.update_layout(coloraxis={"colorscale": theme.SCALE, "colorbar": {"thickness": 12, "len": 0.9}})
    figure.update_layout({key.replace(".", "_"): value for key, value in first_layout.items()})
    if len(buttons) > 1:
        menu = {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": 26}}
        figure.update_layout(updatemenus=[menu], margin_t=110)


def _ranks(values: pd.Series, order: list[object]) -> pd.Series:
    places = {value: rank for rank, value in enumerate(order) if value is not None}
    return frames.hashable(values).map(places).fillna(len(order) - 1).astype(int)
