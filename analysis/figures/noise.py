"""Noise sweeps: the generalisation gap and the measures against the level of noise, each measure scaled to [0, 1].

The published sweeps draw min-max scaled measures and print Kendall's tau with the level; tau with the gap, which may
differ, stands beside it (Bisla et al. 2022, figures of label and data noise). See `analysis/sweeps.py`.
"""

from __future__ import annotations

import html
from collections.abc import Iterator

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flatmin.analysis import frames, sweeps
from flatmin.analysis.figures import against_axis, theme

LEVELS = ("label_noise", "data_noise")
"""The settings that are levels of noise."""

_COLUMNS = ["axis", "by", "by_value", "quantity", "kind", "x", "mean", "low", "high", "std", "n"]
_OF_QUANTITY = ["scaled", "tau_level", "tau_target"]
_HOVER = "%{x}: %{customdata[0]:.4g} (%{customdata[1]:.4g} to %{customdata[2]:.4g}, n = %{customdata[3]})"


def data(
    models: pd.DataFrame, sharpness: pd.DataFrame, *, axis: str, target: str = "gen_gap", by: str | None = None
) -> pd.DataFrame:
    """Average the target and every measure at each level of noise.

    Args:
        models: Rows of the `models/` table; only those whose training came to an end are used.
        sharpness: Rows of the `sharpness/` table; may be empty.
        axis: The level: `label_noise` or `data_noise`.
        target: The column that measures are compared with.
        by: A setting that makes further lines, as in `against_axis`; None: one line per quantity.

    Returns:
        One row per quantity (`kind` is `target` or `measure`), `by_value` and level `x`: `mean`, `low`, `high`, `std`
        over `n` models; `scaled`, the mean as a part of the way from the least to the greatest mean, null for a
        constant; `tau_level` and `tau_target`, Kendall's tau-b along the axis within the others, the same in all rows
        of a quantity.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    names = [target, *frames.labels(sharpness)]
    rows = against_axis.data(models, sharpness, axis=axis, by=by, measures=names)
    rows = rows[rows["quantity"].isin(names) & (rows["kind"] == "measure")]
    rows = rows.assign(kind=rows["quantity"].map(lambda name: "target" if name == target else "measure"))
    means = rows.groupby("quantity", sort=False)["mean"]
    least, most = means.transform("min"), means.transform("max")
    scaled = ((rows["mean"] - least) / (most - least)).where(most > least)
    taus = sweeps.along(models, sharpness, axis=axis, target=target).set_index("measure")
    beside = {name: rows["quantity"].map(taus[name]) for name in ("tau_level", "tau_target")}
    return rows.assign(scaled=scaled, **beside)[[*_COLUMNS, *_OF_QUANTITY]].reset_index(drop=True)


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw the target on the left and the scaled measures on the right.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure; the legend has tau with the level and with the target of every measure.
    """
    goal, measures = (data[data["kind"] == kind] for kind in ("target", "measure"))
    names = sorted(measures["quantity"].unique())
    columns = 2 if names else 1
    target = str(goal["quantity"].iloc[0]) if len(goal) else "target"
    titles = [theme.title(target).split(",")[0], "measures, scaled to [0, 1]"][:columns]
    figure = make_subplots(cols=columns, horizontal_spacing=0.1, subplot_titles=titles)
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    for colour, words, part in _by_value(goal, theme.VERMILLION):
        figure.add_scatter(x=part["x"], y=part["high"], **edge, row=1, col=1)
        fill = {"fill": "tonexty", "fillcolor": theme.transparent(colour, 0.18)}
        figure.add_scatter(x=part["x"], y=part["low"], **fill, **edge, row=1, col=1)
        figure.add_trace(_line(part, "mean", colour, "solid", f"{target}{words}"), row=1, col=1)
    for rank, name in enumerate(names):
        of_measure = measures[measures["quantity"] == name]
        level, gap = (theme.format_tau(of_measure[column].iloc[0]) for column in ("tau_level", "tau_target"))
        said = f"{name}: τ {level} with level, {gap} with {target}"
        for place, (colour, words, part) in enumerate(_by_value(of_measure, theme.colour(name, names))):
            line = _line(part, "scaled", colour, theme.DASHES[rank % 6], said if place == 0 else f"{name}{words}")
            figure.add_trace(line.update(meta=name, legendgroup=name, showlegend=place == 0), row=1, col=2)
    figure.update_xaxes(title_text=theme.title(str(data["axis"].iloc[0])).split(" (")[0])
    return theme.layout(figure, height=430)


def _by_value(rows: pd.DataFrame, base: str) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield colour, words and rows of every line of a quantity."""
    groups = list(rows.groupby("by_value", dropna=False, sort=False))
    for rank, (value, part) in enumerate(groups):
        by = part["by"].iloc[0]
        words = f", {by} {theme.format_value(value)}" if isinstance(by, str) else ""
        yield theme.shade(base, rank, len(groups)), words, part


def _line(rows: pd.DataFrame, column: str, colour: str, dash: str, words: str) -> go.Scatter:
    return go.Scatter(
        x=rows["x"],
        y=rows[column],
        name=html.escape(words),
        showlegend=True,
        mode="lines+markers",
        line={"color": colour, "width": 2, "dash": dash},
        customdata=rows[["mean", "low", "high", "n"]],
        hovertemplate=_HOVER,
    )
