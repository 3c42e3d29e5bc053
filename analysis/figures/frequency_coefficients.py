"""Fourier coefficients against the epoch: learned over true amplitude, a line per frequency, a panel per optimizer.

After the figures of "aryol/CS-439-project", synthetic_task; Rahaman et al. 2019, figure 1.
"""

from __future__ import annotations

import html

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from flatmin.analysis import frequency
from flatmin.analysis.figures import frequency_panels, theme

MOST_EPOCHS = 100
MOST_FREQUENCIES = 8

_HIGHEST = 2.2
"""The published axis ends here; a coefficient far above 1 at the beginning would hide the rest."""


def data(ratio: pd.DataFrame) -> pd.DataFrame:
    """Average the coefficients over models.

    Args:
        ratio: `frequency.Curves.ratio`.

    Returns:
        One row per line, frequency and epoch: `line`, `k`, `epoch`, `mean`, `sd` and `n`.
    """
    return frequency.over_models(ratio, most_epochs=MOST_EPOCHS, most_frequencies=MOST_FREQUENCIES)


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw mean and band of every frequency, and a dotted line at 1, where it is learnt.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure; buttons switch the epoch axis between linear and logarithmic.
    """
    names, ks = list(data["line"].unique()), sorted(data["k"].unique())
    figure = frequency_panels.panels(names)
    colours = sample_colorscale(theme.SCALE, [0.9 * rank / max(1, len(ks) - 1) for rank in range(len(ks))])
    for number, name in enumerate(names):
        for rank, k in enumerate(ks):
            part = data[(data["line"] == name) & (data["k"] == k)]
            for trace in _line(part, k, rank, colours[rank], first=number == 0):
                figure.add_trace(trace, **frequency_panels.place(number))
    top = float((data["mean"] + data["sd"].fillna(0)).max())
    figure.update_yaxes(range=[-0.1, min(_HIGHEST, max(1.2, 1.05 * top))])
    figure.add_hline(y=1, line={"color": theme.GREY, "width": 1, "dash": "dot"})
    figure.update_yaxes(title_text="|F(k)| / |T(k)|", col=1)
    return frequency_panels.over_epochs(figure, names)


def _line(part: pd.DataFrame, k: float, rank: int, colour: str, *, first: bool) -> list[go.Scatter]:
    name = html.escape(f"k = {k:g}")
    mean = go.Scatter(
        x=part["epoch"],
        y=part["mean"],
        name=name,
        legendgroup=name,
        showlegend=first,
        mode=theme.line_mode(part["epoch"]),
        line={"color": colour, "width": 1.8, "dash": theme.DASHES[rank % len(theme.DASHES)]},
        customdata=part[["sd", "n"]],
        hovertemplate="epoch %{x}: %{y:.3f} (sd %{customdata[0]:.3f}, n = %{customdata[1]})",
    )
    return [*frequency_panels.band(part, colour, name), mean]
