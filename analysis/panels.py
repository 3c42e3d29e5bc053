"""A figure of one measure out of a figure of all: drawn once and cut as plain data, because drawing is slow.

A trace that belongs to a measure says so in `meta`; every other one belongs to all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

Drawn = Mapping[str, Any]
"""A figure as plotly.js takes it: `data` and `layout`."""

_AXIS = re.compile(r"[xy]axis\d*")
_HEIGHTS: Mapping[int, list[list[float]]] = {1: [[0, 1]], 2: [[0.45, 1], [0, 0.33]]}
"""Where the panels of a cut figure are, from the top, as fractions of the plot."""

_PIXELS = 340
"""Height of one panel."""


def drawn(figure: go.Figure) -> Drawn:
    """Return a figure as plain data.

    Args:
        figure: What a `draw` returned.
    """
    return dict(json.loads(str(figure.to_json())))


def alone(whole: Drawn, measure: str) -> Drawn:
    """Return the part of a figure that is about one measure.

    Args:
        whole: A figure of several measures; if it has more panels than the part needs, each has a title.
        measure: The `meta` of the traces to keep, beside those of no measure.

    Returns:
        The figure with the panels that are still in use, below each other and over the whole width.
    """
    places = [place for place, trace in enumerate(whole["data"]) if trace.get("meta") in (None, measure)]
    traces = [whole["data"][place] for place in places]
    layout = dict(whole["layout"])
    used = sorted({_number(trace["yaxis"]) for trace in traces})
    if len(used) < len([name for name in layout if name.startswith("yaxis")]):
        beside = len({tuple(layout[f"yaxis{_suffix(number)}"]["domain"]) for number in used}) == 1 < len(used)
        layout = _row(layout, used) if beside else _cut(layout, used)
    menus = [_chosen(menu, places, used) for menu in layout.get("updatemenus", [])]
    return {"data": traces, "layout": layout | ({"updatemenus": menus} if menus else {})}


def _number(axis: str) -> int:
    return int(axis[1:] or 1)


def _suffix(number: int) -> str:
    return "" if number == 1 else str(number)


def _cut(layout: Mapping[str, Any], used: list[int]) -> dict[str, Any]:
    out = {name: value for name, value in layout.items() if not _AXIS.fullmatch(name)}
    titles = {side: _title(layout, side) for side in "xy"}
    bottom = _suffix(used[-1])
    for number, domain in zip(used, _HEIGHTS[len(used)], strict=True):
        suffix = _suffix(number)
        x, y = (dict(layout[f"{side}axis{suffix}"]) for side in "xy")
        x.pop("matches", None)
        y.pop("matches", None)
        y["title"] = y.get("title") or titles["y"] if len(used) == 1 else y.get("title", {})
        if suffix == bottom:
            x |= {"showticklabels": True, "title": titles["x"]}
        else:
            x["matches"] = f"x{bottom}"
        out[f"xaxis{suffix}"] = x | {"domain": [0, 1]}
        out[f"yaxis{suffix}"] = y | {"domain": domain, "showticklabels": True}
    notes = layout.get("annotations", [])
    tops = [domain[1] for domain in _HEIGHTS[len(used)]]
    out["annotations"] = [
        notes[number - 1] | {"x": 0.5, "y": top} for number, top in zip(used, tops, strict=True) if number <= len(notes)
    ]
    margin = layout["margin"]
    out["height"] = margin["t"] + margin["b"] + _PIXELS * len(used)
    return out


def _row(layout: Mapping[str, Any], used: list[int]) -> dict[str, Any]:
    """The layout of panels that are a row of the whole: they stay beside each other, over the whole height."""
    out = {name: value for name, value in layout.items() if not _AXIS.fullmatch(name)}
    first = _suffix(used[0])
    for number in used:
        suffix = _suffix(number)
        y = dict(layout[f"yaxis{suffix}"]) | {"domain": [0, 1]}
        y.pop("matches", None)
        out[f"xaxis{suffix}"] = layout[f"xaxis{suffix}"]
        out[f"yaxis{suffix}"] = y | ({} if suffix == first else {"matches": f"y{first}"})
    notes = layout.get("annotations", [])
    out["annotations"] = [notes[number - 1] | {"y": 1} for number in used if number <= len(notes)]
    margin = layout["margin"]
    out["height"] = margin["t"] + margin["b"] + _PIXELS
    return out


def _title(layout: Mapping[str, Any], side: str) -> dict[str, Any]:
    axes = [value for name, value in layout.items() if re.fullmatch(rf"{side}axis\d*", name)]
    return next((dict(axis["title"]) for axis in axes if axis.get("title", {}).get("text")), {})


def _chosen(menu: Mapping[str, Any], places: list[int], used: list[int]) -> dict[str, Any]:
    """A menu of the kept traces and axes: its buttons give each its own values."""
    kept = {f"{side}axis{_suffix(number)}" for side in "xy" for number in used}
    buttons = []
    for button in menu["buttons"]:
        first, *rest = button["args"]
        if button["method"] == "update":
            first = {name: [values[place] for place in places] for name, values in first.items()}
        else:
            parts = {name: name.partition(".")[0] for name in first}
            first = {name: first[name] for name, part in parts.items() if part in kept or not _AXIS.fullmatch(part)}
        buttons.append(dict(button) | {"args": [first, *rest]})
    return dict(menu) | {"buttons": buttons}
