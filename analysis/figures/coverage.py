"""Coverage of the grid: what ran, diverged, failed, is still missing, or is filtered out, along every axis."""

from __future__ import annotations

import html

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flatmin.analysis import configurations, frames
from flatmin.analysis.axes import independent
from flatmin.analysis.figures import theme

MOST_AXES = 8
"""More panels than this are no overview."""

OUTCOMES = {
    "converged": theme.GREEN,
    "finished": theme.BLUE,
    "filtered out": theme.SKY,
    "diverged": theme.VERMILLION,
    "attempt failed": theme.PURPLE,
    "not trained": "#b8c0cb",
}
"""What became of a planned model, with its colour; `attempt failed` has no result so far, though it was tried."""

_COLUMNS = ["axis", "value", "outcome", "n"]


def data(
    models: pd.DataFrame,
    plan: pd.DataFrame | None = None,
    failures: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Count what became of the models, at every value of every axis.

    Args:
        models: Rows of the `models/` table; a status `filtered out` stays, another unknown one counts as finished.
        plan: Rows of the `plan/` table; None: nothing but `models` was planned.
        failures: Rows of the `failures/` table, or None.

    Returns:
        One row per axis, value and outcome (`OUTCOMES`) that occurs, with `n` models: of a setting that some optimizers
        only have, the models that have it. Without an axis, one of `all`.
    """
    status = models["status"] if "status" in models.columns else pd.Series("finished", index=models.index)
    whole = models.assign(outcome=status.where(status.isin(OUTCOMES), "finished"))
    if plan is not None and len(plan):
        missing = plan[~plan["model_id"].isin(models["model_id"])]
        tried: list[str] = list(failures["model_id"]) if failures is not None and len(failures) else []
        words = np.where(missing["model_id"].isin(tried), "attempt failed", "not trained")
        settings = [column for column in missing.columns if column in whole.columns]
        whole = pd.concat([whole, missing[settings].assign(outcome=words)]) if len(missing) else whole
    axes = independent(whole, exclude={"outcome"})
    found = configurations.of(whole, axes, repeated=True)
    rows = []
    for place, axis in enumerate(axes):
        having = whole[found.having(place)[found.rows]]
        rows += _counts(axis, frames.hashable(having[axis]), having["outcome"])
    if not axes:
        rows = _counts("all", pd.Series("all models", index=whole.index), whole["outcome"])
    return pd.DataFrame(rows, columns=_COLUMNS)


def _counts(axis: str, values: pd.Series, outcomes: pd.Series) -> list[list[object]]:
    rows: list[list[object]] = []
    for value in frames.ordered(values):
        counts = outcomes[values.isna() if value is None else values == value].value_counts()
        rows += [[axis, value, name, int(counts[name])] for name in OUTCOMES if name in counts]
    return rows


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw stacked bars, a panel per axis.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure, with the first `MOST_AXES` axes.
    """
    axes = list(data["axis"].unique())[:MOST_AXES]
    columns = min(2, len(axes))
    count = -(-len(axes) // columns)
    figure = make_subplots(
        rows=count,
        cols=columns,
        subplot_titles=[html.escape(axis) for axis in axes],
        vertical_spacing=0.32 / count,
        horizontal_spacing=0.09,
    )
    outcomes = [name for name in OUTCOMES if name in set(data["outcome"])]
    for place, axis in enumerate(axes):
        part = data[data["axis"] == axis].assign(
            words=lambda rows: [html.escape(theme.format_value(value)) for value in rows["value"]]
        )
        for name in outcomes:
            bars = part[part["outcome"] == name]
            figure.add_bar(
                x=bars["words"],
                y=bars["n"],
                name=name,
                legendgroup=name,
                # the first panel may lack an outcome that another one has, so its legend entry is always there
                showlegend=place == 0,
                marker={"color": OUTCOMES[name]},
                hovertemplate=f"{html.escape(axis)} %{{x}}: %{{y}} {name}<extra></extra>",
                row=place // columns + 1,
                col=place % columns + 1,
            )
        order = list(dict.fromkeys(part["words"]))
        figure.update_xaxes(
            type="category",
            categoryorder="array",
            categoryarray=order,
            row=place // columns + 1,
            col=place % columns + 1,
        )
    figure.update_yaxes(title_text="models", col=1, rangemode="tozero")
    theme.layout(figure, height=130 + 210 * count)
    return figure.update_layout(barmode="stack")
