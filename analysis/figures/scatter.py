"""A measure against the generalisation gap: one point per model, one panel per measure."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flatmin.analysis import frames
from flatmin.analysis.axes import independent
from flatmin.analysis.figures import theme
from flatmin.analysis.panels import Drawn

MOST_ERROR_BARS = 1000
"""Points of a panel above which error bars are left away: they would only make the page slow and black."""

MOST_POINTS = 2500
"""Points of the whole figure; of more models, some stand for all, the same ones in every panel."""

MOST_COLUMNS = 4
"""Values of a setting that have a panel of their own."""

_FIXED = ["model_id", "measure", "value", "stderr", "target", "target_value"]
_NO_SETTINGS = [*_FIXED, "models"]


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
        axes = [*independent(models), *[name for name in ("seed",) if name in models.columns]]
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
    axes = [column for column in data.columns if column not in _FIXED and not frames.is_seed(column)]
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
    keys = _points_of(data)
    if not keys:
        return data
    point = data.groupby(keys, dropna=False, sort=True).ngroup()
    order = data.assign(_point=point).groupby("_point")["target_value"].first().sort_values(kind="stable").index
    return data[point.isin(frames.spread(list(order), most))].reset_index(drop=True)


def _points_of(data: pd.DataFrame) -> list[str]:
    """The columns that tell one point of a panel from another: the model, or the settings of a configuration."""
    return ["model_id"] if "model_id" in data.columns else [name for name in data.columns if name not in _NO_SETTINGS]


def has_bars(data: pd.DataFrame) -> bool:
    """Tell whether `draw` gives the points error bars.

    Args:
        data: What `data` returned.
    """
    few = data.groupby("measure").size().max() <= MOST_ERROR_BARS
    return bool(few and data["stderr"].notna().any())


def settings_of(data: pd.DataFrame) -> list[str]:
    """Name the settings that the points of a figure may be coloured or split by.

    Args:
        data: What `data`, `averaged` or `thinned` returned.
    """
    return [name for name in data.columns if name not in _NO_SETTINGS and data[name].nunique(dropna=False) > 1]


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw one panel per measure, coloured by a setting that the reader chooses.

    Args:
        data: What `data`, `averaged` or `thinned` returned, with at least one row.

    Returns:
        The figure; buttons change the scales, and a menu the colour when more than one setting varies.
    """
    names = sorted(data["measure"].unique())
    axes = settings_of(data)
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
        figure.update_xaxes(**_fitted(part["value"]), row=place // columns + 1, col=place % columns + 1)
    figure.update_yaxes(title_text=_short(str(data["target"].iloc[0])), col=1)
    theme.layout(figure, height=90 + 290 * rows)
    if axes:
        _colours(figure, data, names, axes)
    above = {"y": 1, "yanchor": "bottom", "pad": {"b": 26}}
    scales = {"name": "scale of the axes", "type": "buttons", "direction": "right", "x": 0, "xanchor": "left", **above}
    scales["buttons"] = scale_buttons(data, {name: [place + 1] for place, name in enumerate(names)})
    figure.layout.updatemenus = [scales, *figure.layout.updatemenus]
    return figure.update_layout(margin_t=110)


def _fitted(values: pd.Series) -> dict[str, object]:
    return theme.log_ticks(values) if theme.scale_of(values) == "log" else {"exponentformat": "power"}


def scale_buttons(data: pd.DataFrame, panels: Mapping[str, Sequence[int]]) -> list[dict[str, object]]:
    """Return the buttons that make axes linear or logarithmic; what is not above zero has no place on the latter.

    Args:
        data: What `data`, `averaged` or `thinned` returned, with at least one row.
        panels: The numbers of the panels of every measure.

    Returns:
        Buttons of a plotly menu. The first one gives each measure the scale that its values ask for.
    """
    targets = data.drop_duplicates(_points_of(data) or None)["target_value"]
    hidden = int((targets <= 0).sum())
    kinds = [("fitted axes", None, "linear"), ("linear", "linear", "linear"), ("log measure", "log", "linear")]
    if hidden < len(targets):
        kinds.append((f"log both ({hidden} ≤ 0 hidden)" if hidden else "log both", "log", "log"))
    buttons: list[dict[str, object]] = []
    for label, measure, target in kinds:
        changes: dict[str, object] = {}
        for name, numbers in panels.items():
            values = data.loc[data["measure"] == name, "value"]
            # a measure that may be negative stays linear
            scale = theme.scale_of(values, decades=0 if measure else 1) if measure != "linear" else "linear"
            ticks = theme.log_ticks(values) if scale == "log" else {"type": "linear", "dtick": None}
            for number in numbers:
                suffix = "" if number == 1 else str(number)
                changes |= {f"xaxis{suffix}.{key}": ticks[key] for key in ("type", "dtick")}
                changes |= {f"xaxis{suffix}.autorange": True, f"yaxis{suffix}.autorange": True}
                changes[f"yaxis{suffix}.type"] = target
        buttons.append({"label": label, "method": "relayout", "args": [changes]})
    return buttons


def split(whole: Drawn, data: pd.DataFrame, axis: str) -> Drawn:
    """Part the panel of every measure by the values of a setting.

    Args:
        whole: The figure of the same data, as plain data.
        data: What `data`, `averaged` or `thinned` returned, with at least one row.
        axis: The setting.

    Returns:
        A row per measure, a column for each of at most `MOST_COLUMNS` values of the setting; the traces are those of
        the whole, with `pick`, the places of the points that they keep.
    """
    names = [trace["meta"] for trace in whole["data"]]
    values = frames.spread(frames.ordered(data[axis]), MOST_COLUMNS)
    words = [html.escape(f"{axis} {theme.format_value(value)}") for value in values]
    figure = make_subplots(
        rows=len(names),
        cols=len(values),
        shared_yaxes="all",
        horizontal_spacing=0.02,
        vertical_spacing=min(0.16, 75 / (290 * len(names))),
        subplot_titles=[f"{html.escape(name)}<br>{said}" for name in names for said in words],
    )
    placed: list[tuple[int, list[int]]] = []
    panels: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        part = data[data["measure"] == name]
        own = frames.hashable(part[axis])
        for column, value in enumerate(values):
            number = row * len(values) + column + 1
            picked = np.flatnonzero(own.isna() if value is None else own == value).tolist()
            placed.append((row, picked))
            panels.setdefault(name, []).append(number)
        first = row * len(values) + 1
        figure.update_xaxes(**_fitted(part["value"]), matches=f"x{first if first > 1 else ''}", row=row + 1)
        figure.update_xaxes(matches=None, row=row + 1, col=1)
    figure.update_yaxes(title_text=_short(str(data["target"].iloc[0])), col=1)
    theme.layout(figure, height=130 + 290 * len(names))
    layout = dict(json.loads(str(figure.to_json()))["layout"]) | {"margin": whole["layout"]["margin"] | {"t": 130}}
    scales, *colours = whole["layout"]["updatemenus"]
    menus = [scales | {"buttons": scale_buttons(data, panels)}, *(_picked(menu, placed) for menu in colours)]
    shown = {name: whole["layout"][name] for name in ("coloraxis",) if name in whole["layout"]}
    traces = []
    for number, (row, picked) in enumerate(placed, start=1):
        suffix = "" if number == 1 else str(number)
        traces.append(whole["data"][row] | {"pick": picked, "xaxis": f"x{suffix}", "yaxis": f"y{suffix}"})
    return {"data": traces, "layout": layout | shown | {"updatemenus": [_higher(menu) for menu in menus]}}


def _higher(menu: Mapping[str, Any]) -> dict[str, Any]:
    """A menu above titles of two lines."""
    return dict(menu) | {"pad": {"b": 44}}


def _picked(menu: Mapping[str, Any], placed: Sequence[tuple[int, list[int]]]) -> dict[str, Any]:
    """A menu of colours for traces that keep some points of others."""
    buttons = []
    for button in menu["buttons"]:
        every, layout = button["args"]
        colours = [[every["marker.color"][row][place] for place in picked] for row, picked in placed]
        buttons.append(dict(button) | {"args": [{"marker.color": colours}, layout]})
    return dict(menu) | {"buttons": buttons}


def _short(target: str) -> str:
    return {"gen_gap": "generalisation gap (fraction)", "loss_gap": "loss gap (nats)"}.get(target, theme.title(target))


def _points(part: pd.DataFrame, axes: list[str]) -> go.Scatter:
    settings = [axis for axis in part.columns if axis not in _NO_SETTINGS]
    first, heading = ("model_id", "") if "model_id" in part.columns else ("models", "models: ")
    lines = [f"{html.escape(axis)} = %{{customdata[{place + 1}]}}" for place, axis in enumerate(settings)]
    few = len(part) <= MOST_ERROR_BARS
    bars = few and part["stderr"].notna().any()
    # WebGL draws thousands of points at once; SVG prints better
    kind = go.Scatter if few else go.Scattergl
    return kind(
        # as lists of six digits, from which the page picks
        x=_digits(part["value"]),
        y=_digits(part["target_value"]),
        error_x={"array": _digits(part["stderr"].fillna(0)), "color": "#9aa4b2", "thickness": 1, "width": 0}
        if bars
        else None,
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


def _digits(values: pd.Series) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


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
    figure.update_layout(
        coloraxis={
            "colorscale": theme.SCALE,
            "colorbar": {"thickness": 12, "lenmode": "pixels", "len": 220, "y": 1, "yanchor": "top"},
        }
    )
    figure.update_layout({key.replace(".", "_"): value for key, value in first_layout.items()})
    if len(buttons) > 1:
        menu = {"name": "colour by", "buttons": buttons, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"}
        figure.update_layout(updatemenus=[menu | {"pad": {"b": 26}}])


def _ranks(values: pd.Series, order: list[object]) -> pd.Series:
    places = {value: rank for rank, value in enumerate(order) if value is not None}
    return frames.hashable(values).map(places).fillna(len(order) - 1).astype(int)
