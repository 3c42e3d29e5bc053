"""Heat map of Delta F, |F - T| / |T|, over frequency and epoch: a panel per optimizer, low frequencies below."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from flatmin.analysis import frequency
from flatmin.analysis.figures import frequency_panels, theme

MOST_EPOCHS = 100
MOST_FREQUENCIES = 40

_LOWEST = -3
"""The logarithmic colours end at this power of ten."""


def data(error: pd.DataFrame) -> pd.DataFrame:
    """Average Delta F over models.

    Args:
        error: `frequency.Curves.error`.

    Returns:
        One row per line, frequency and epoch: `line`, `k`, `epoch`, `mean`, `sd` and `n`.
    """
    return frequency.over_models(error, most_epochs=MOST_EPOCHS, most_frequencies=MOST_FREQUENCIES)


def draw(data: pd.DataFrame) -> go.Figure:
    """Draw a cell per frequency and epoch.

    Args:
        data: What `data` returned, with at least one row.

    Returns:
        The figure; buttons switch the colours between linear, 0 to 1, and logarithmic.
    """
    names, ks = list(data["line"].unique()), sorted(data["k"].unique())
    figure, linear = frequency_panels.panels(names), []
    for number, name in enumerate(names):
        cells = data[data["line"] == name].pivot(index="k", columns="epoch", values="mean").reindex(ks)
        linear.append(cells.to_numpy())
        figure.add_heatmap(
            x=cells.columns,
            y=[f"{k:g}" for k in ks],
            z=linear[-1],
            customdata=linear[-1],
            coloraxis="coloraxis",
            hovertemplate="k = %{y}, epoch %{x}: %{customdata:.3g}<extra></extra>",
            **frequency_panels.place(number),
        )
    figure.update_yaxes(type="category")
    figure.update_yaxes(title_text="frequency k", title_standoff=6, col=1)
    frequency_panels.over_epochs(figure, names)
    figure.update_layout(coloraxis=_colours([0, 0.5, 1], ["0", "0.5", "≥ 1"]), margin_r=90)
    logarithmic = [np.log10(np.maximum(cells, 10.0**_LOWEST)) for cells in linear]
    powers = list(range(_LOWEST, 1))
    buttons = [
        _button("linear colours", linear, figure.layout.coloraxis.to_plotly_json()),
        _button("log colours", logarithmic, _colours(powers, ["≤ 0.001", "0.01", "0.1", "≥ 1"])),
    ]
    menu = figure.layout.updatemenus[0].to_plotly_json()
    figure.update_layout(updatemenus=[menu, menu | {"name": "colours", "buttons": buttons, "x": 0, "xanchor": "left"}])
    return figure


def _button(label: str, cells: list[np.ndarray], colours: dict[str, object]) -> dict[str, object]:
    # JSON has no NaN
    numbers = [[[value if np.isfinite(value) else None for value in row] for row in one.tolist()] for one in cells]
    return {"label": label, "method": "update", "args": [{"z": numbers}, {"coloraxis": colours}]}


def _colours(ticks: Sequence[float], words: Sequence[str]) -> dict[str, object]:
    bar = {"title": {"text": "ΔF"}, "tickvals": ticks, "ticktext": words, "thickness": 14}
    return {"colorscale": theme.SCALE, "cmin": ticks[0], "cmax": ticks[-1], "colorbar": bar}
