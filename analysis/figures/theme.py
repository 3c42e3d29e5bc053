"""What all figures share: one colour per quantity, axis titles with units, and the layout.

The colours are those of Okabe and Ito 2008, "Color Universal Design", which people with any of the common
colour vision deficiencies can tell apart.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#5F6B7A",
)

SCALE = "Cividis"
"""The scale for settings with an order; its lightness rises evenly, so it survives a grey print."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")

_BOTTOM = 60

_LABEL = 34
"""Characters of a tick label to a line."""

_TITLES = {
    "test_error": "test error (fraction)",
    "train_error": "training error (fraction)",
    "test_loss": "test loss (nats)",
    "train_loss": "training loss (nats)",
    "gen_gap": "generalisation gap, train − test accuracy (fraction)",
    "loss_gap": "loss gap, test − train loss (nats)",
    "test_acc": "test accuracy (fraction)",
    "train_acc": "training accuracy (fraction)",
    "width": "width (units or channels)",
    "label_noise": "label noise (fraction of training labels redrawn)",
    "data_noise": "data noise (standard deviation added to inputs)",
    "lr": "learning rate",
    "batch_size": "batch size (examples)",
    "epoch": "epoch",
}


def title(name: str) -> str:
    """Return the words for a column as an axis title, with its unit where it has one.

    Args:
        name: A column, setting, quantity or measure label.

    Returns:
        The title; the name itself where there are no better words.

    >>> title("test_loss")
    'test loss (nats)'
    """
    return _TITLES.get(name, name)


def colour(quantity: str, labels: Sequence[str] = ()) -> str:
    """Return the colour of a quantity, the same in every figure.

    Args:
        quantity: `test_error`, `train_loss`, ... or a measure label.
        labels: All measure labels of the page, sorted, so that each keeps its colour from figure to figure.

    Returns:
        A hexadecimal colour.
    """
    if quantity.startswith("test_"):
        return VERMILLION
    if quantity.startswith("train_"):
        return BLUE
    wheel = (GREEN, PURPLE, ORANGE, SKY)
    return wheel[list(labels).index(quantity) % len(wheel)] if quantity in labels else GREY


def shade(base: str, rank: int, count: int) -> str:
    """Return a lighter shade of a colour for the lower ranks of a series.

    Args:
        base: Hexadecimal colour, which the last rank has.
        rank: From 0 to `count` - 1.
        count: How many shades there are.

    Returns:
        A hexadecimal colour.

    >>> shade("#0072B2", 1, 2)
    '#0072b2'
    """
    light = 0.0 if count < 2 else 0.6 * (1 - rank / (count - 1))
    channels = [int(base[place : place + 2], 16) for place in (1, 3, 5)]
    return "#" + "".join(f"{round(channel + (255 - channel) * light):02x}" for channel in channels)


def transparent(base: str, alpha: float) -> str:
    """Return a hexadecimal colour as `rgba(...)`.

    >>> transparent("#0072B2", 0.2)
    'rgba(0,114,178,0.2)'
    """
    red, green, blue = (int(base[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def scale_of(values: pd.Series, *, decades: float = 1.0) -> str:
    """Return `log` for positive values that span more than so many decades, else `linear`.

    Args:
        values: The numbers on the axis; nulls are ignored.
        decades: How many powers of ten make a logarithmic axis worthwhile.

    >>> scale_of(pd.Series([1, 256]))
    'log'
    """
    numbers = values.dropna().to_numpy(dtype=np.float64)
    if len(numbers) == 0 or numbers.min() <= 0:
        return "linear"
    return "log" if numbers.max() / numbers.min() > 10**decades else "linear"


def log_ticks(values: pd.Series) -> dict[str, object]:
    """Return tick settings for a logarithmic axis: powers of ten, with 2 and 5 between if they are few.

    Args:
        values: The positive numbers on the axis.

    Returns:
        Keyword arguments of a plotly axis.
    """
    decades = np.log10(values.max() / values.min())
    return {
        "type": "log",
        "dtick": "D2" if decades < 2 else max(1, round(decades / 5)),
        "exponentformat": "power",
    }


def format_value(value: object) -> str:
    """Return a setting's value as a reader wants it in a legend.

    >>> format_value(0.20), format_value(None), format_value("mlp")
    ('0.2', 'none', 'mlp')
    """
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def wrapped(name: str) -> str:
    """Return a name as a tick label: escaped, and broken where it is long, so that the plot keeps its room.

    >>> wrapped("lpf"), wrapped("lpf(max_samples=16, metric=identity)")
    ('lpf', 'lpf(max_samples=16,<br>metric=identity)')
    """
    return "<br>".join(html.escape(line) for line in textwrap.wrap(name, _LABEL, break_on_hyphens=False) or [name])


def rows_height(names: Sequence[str], *, least: int = 32) -> int:
    """Return the pixels that rows with these labels need, all of equal height.

    Args:
        names: What `wrapped` returned.
        least: The height of a row of one line.
    """
    return len(names) * max([least, *(18 * (name.count("<br>") + 1) for name in names)])


def format_tau(value: float | None) -> str:
    """Return a correlation as papers print it: two digits, no zero before the point.

    >>> format_tau(0.614), format_tau(-0.5), format_tau(1.0), format_tau(None)
    ('.61', '−.50', '1.00', 'undefined')
    """
    if value is None or np.isnan(value):
        return "undefined"
    digits = f"{abs(value):.2f}"
    return ("−" if value < 0 and float(digits) else "") + (digits[1:] if digits.startswith("0") else digits)


def ticks(values: pd.Series) -> dict[str, object]:
    """Return tick settings for an axis whose values were chosen by hand: name them, if they are few.

    Args:
        values: The numbers on the axis.

    Returns:
        Keyword arguments of a plotly axis.
    """
    numbers = sorted(values.dropna().unique())
    if not 1 < len(numbers) <= 16:
        return {}
    return {"tickvals": numbers, "ticktext": [f"{number:g}" for number in numbers]}


def legend_height(figure: go.Figure) -> int:
    """Return the pixels that a legend above the plot needs, at three names to a line.

    Args:
        figure: With all its traces.
    """
    names = sum(1 for trace in figure.data if trace.showlegend)
    return 20 * -(-names // 3)


def line_mode(epochs: pd.Series) -> str:
    """Return how a line over epochs is drawn: with markers where it has one epoch, for a line alone shows nothing then.

    Args:
        epochs: The epochs of its points.

    >>> line_mode(pd.Series([1, 2])), line_mode(pd.Series([1]))
    ('lines', 'lines+markers')
    """
    return "lines" if epochs.nunique() > 1 else "lines+markers"


def layout(figure: go.Figure, *, height: int) -> go.Figure:
    """Give a figure the page's fonts, grid and margins, and return it.

    Args:
        figure: Changed in place.
        height: In pixels; the width follows the page.
    """
    top = 72 + legend_height(figure)
    above = 1 + 24 / max(1, height - top - _BOTTOM)
    line = {"gridcolor": "#e8ebf0", "linecolor": "#9aa4b2", "zerolinecolor": "#c3cad4", "ticks": "outside"}
    line["exponentformat"] = "power"
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 70, "r": 20, "t": top, "b": _BOTTOM},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1f2933"},
        # the legend stands above the panel titles and below the row of buttons
        legend={"orientation": "h", "yanchor": "bottom", "y": above, "x": 0, "font": {"size": 12}},
        hoverlabel={"align": "left"},
        paper_bgcolor="white",
        plot_bgcolor="white",
    )
    figure.update_xaxes(**line, showline=True, automargin=True)
    figure.update_yaxes(**line, showline=False, automargin=True)
    figure.update_annotations(font_size=13)
    return figure


def epoch_buttons(figure: go.Figure) -> go.Figure:
    """Give a figure buttons that switch its epoch axes between linear and logarithmic, and return it.

    Args:
        figure: Laid out; changed in place.
    """
    axes = [name for name in figure.layout.to_plotly_json() if name.startswith("xaxis")]
    buttons = [
        {"label": f"{scale} epochs", "method": "relayout", "args": [{f"{name}.type": scale for name in axes}]}
        for scale in ("linear", "log")
    ]
    rise = legend_height(figure) + 34
    menu: dict[str, Any] = {"name": "epochs", "type": "buttons", "direction": "right", "buttons": buttons}
    menu |= {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": rise}}
    figure.update_layout(updatemenus=[menu], margin_t=rise + 76)
    return figure
