"""What each measure costs: seconds, passes over the data, and how often it stopped short of its tolerance."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from flatmin.analysis import frames
from flatmin.analysis.figures import theme

_COLUMNS = ["measure", "seconds", "seconds_total", "passes", "not_converged", "n"]
_PANELS = (
    ("seconds", "seconds (median)", theme.BLUE),
    ("passes", "passes over the data (median)", theme.GREEN),
    ("not_converged", "short of its tolerance (share)", theme.VERMILLION),
)


def data(sharpness: pd.DataFrame) -> pd.DataFrame:
    """Summarise what the measures of all models cost, the dearest first.

    Args:
        sharpness: Rows of the `sharpness/` table, those from during the training too.

    Returns:
        One row per label: median `seconds` and `passes` of a value, `seconds_total`, the share of values that are
        `not_converged`, over `n` rows; null where a column is unknown.

    Raises:
        RequestError: A column is not numeric.
    """
    columns = [name for name in ("seconds", "passes") if name in sharpness.columns]
    rows = pd.DataFrame({name: frames.numeric(sharpness, name, role="cost") for name in columns})
    rows = rows.reindex(columns=["seconds", "passes"]).assign(measure=sharpness["label"].to_numpy())
    if "converged" in sharpness.columns:
        rows["short"] = 1 - pd.to_numeric(sharpness["converged"].astype("boolean").astype("Float64")).to_numpy(
            dtype=np.float64, na_value=np.nan
        )
    else:
        rows["short"] = np.nan
    groups = rows.groupby("measure", sort=True)
    out = groups.agg(
        seconds=("seconds", "median"), passes=("passes", "median"), not_converged=("short", "mean"), n=("short", "size")
    )
    out["seconds_total"] = groups["seconds"].sum(min_count=1)
    out = out.sort_values("seconds", ascending=False, kind="stable", na_position="last")
    return out.reset_index()[_COLUMNS]


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw three bars per measure.

    Args:
        data: What `data` returned, with at least one row.
    """
    figure = make_subplots(
        cols=3, shared_yaxes=True, horizontal_spacing=0.04, subplot_titles=[words for _, words, _ in _PANELS]
    )
    names = [theme.wrapped(str(name)) for name in data["measure"]]
    for place, (column, words, colour) in enumerate(_PANELS, start=1):
        figure.add_bar(
            x=data[column],
            y=names,
            orientation="h",
            marker={"color": colour},
            showlegend=False,
            customdata=data["n"],
            hovertemplate=f"%{{y}}: %{{x:.3g}} {words}, n = %{{customdata}}<extra></extra>",
            row=1,
            col=place,
        )
        scale = theme.scale_of(data[column])
        ticks = theme.log_ticks(data[column]) if scale == "log" else {"rangemode": "tozero"}
        figure.update_xaxes(**ticks, row=1, col=place)
    figure.update_xaxes(range=[0, 1], col=3)
    figure.update_yaxes(type="category", autorange="reversed")
    return theme.layout(figure, height=170 + theme.rows_height(names))
