"""Training loss against the epoch of each optimizer: log10, mean and band over models."""

from __future__ import annotations

import html

import pandas as pd
import plotly.graph_objects as go

from flatmin.analysis import frequency
from flatmin.analysis.figures import frequency_panels, theme

MOST_EPOCHS = 120


def data(epochs: pd.DataFrame, models: pd.DataFrame) -> pd.DataFrame:
    """Average log10 of the training loss over models.

    Args:
        epochs: Rows of the `epochs/` table.
        models: Rows of the `models/` table; only those whose training came to an end are used.

    Returns:
        One row per line and epoch: `line`, `epoch`, `mean` of log10, `sd` and `n`.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    return frequency.losses(epochs, models, most_epochs=MOST_EPOCHS)


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw a line and a band per optimizer.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure; buttons switch the epoch axis between linear and logarithmic.
    """
    figure = go.Figure()
    for rank, (name, part) in enumerate(data.groupby("line", sort=False)):
        colour, shown = frequency_panels.WHEEL[rank % len(frequency_panels.WHEEL)], html.escape(str(name))
        figure.add_traces(frequency_panels.band(part, colour, shown))
        figure.add_scatter(
            x=part["epoch"],
            y=part["mean"],
            name=shown,
            legendgroup=shown,
            showlegend=True,
            mode=theme.line_mode(part["epoch"]),
            line={"color": colour, "width": 1.8, "dash": theme.DASHES[rank % len(theme.DASHES)]},
            customdata=part[["sd", "n"]],
            hovertemplate="epoch %{x}: 10^%{y:.2f} (sd %{customdata[0]:.2f}, n = %{customdata[1]})",
        )
    figure.update_yaxes(title_text="log10 of the training loss")
    figure.update_xaxes(title_text="epoch")
    return theme.epoch_buttons(theme.layout(figure, height=420))
