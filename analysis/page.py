"""Pieces of a self-contained HTML page: escaped text, tables, embedded data, and the file itself."""

from __future__ import annotations

import base64
import gzip
import html
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import pandas as pd
from plotly.offline import get_plotlyjs

from flatmin.analysis import frames
from flatmin.analysis.section import Missing, Variant

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; "
    "img-src data: blob:; worker-src blob:; base-uri 'none'; form-action 'none'"
)
"""The browser itself refuses any request: only what is in the file runs. WebGL points need `unsafe-eval`."""

PACKED_FROM = 50_000
"""Characters of JSON that are worth packing: to a third."""

_OWN = ("xaxis", "yaxis", "showlegend", "pick")
"""What a trace has from its place in a figure; traces that differ in these only are kept once."""


def text(value: object) -> str:
    """Return a value as HTML text: numbers short, null as a dash, everything escaped.

    >>> text("<b>"), text(None), text(0.123456)
    ('&lt;b&gt;', '–', '0.1235')
    """
    if frames.is_null(value):
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{text(key)}: {text(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(text(item) for item in value)
    return html.escape(str(value))


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, kind: str = "") -> str:
    """Return an HTML table; the first column heads its row.

    Args:
        header: Column names.
        rows: Values, escaped here.
        kind: The CSS class.
    """
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{text(value)}</td>" for value in rest)
        lines.append(f'<tr><th scope="row">{text(first)}</th>{cells}</tr>')
    body = "".join(lines)
    whole = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{whole}</div>'


def embed(name: str, payload: str) -> str:
    """Return JSON as an inert element of the page.

    Args:
        name: The element's id, a plain word.
        payload: JSON. Characters that could end the element are written as JSON escapes; what is long is packed, as
            gzip in base64, which the page's script unpacks.
    """
    if len(payload) >= PACKED_FROM:
        packed = base64.b64encode(gzip.compress(payload.encode(), mtime=0)).decode()
        return f'<script type="application/octet-stream" data-packed="gzip" id="{name}">{packed}</script>'
    for character in "<>&\u2028\u2029":
        payload = payload.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{payload}</script>'


def embed_figures(name: str, variants: Sequence[Variant | Missing]) -> str:
    """Return the variants of a figure and their tables in two inert elements, what they share only once.

    `plot-NAME` holds `traces`, and `variants` of `{of, caption, layout, traces, table}` or `{of, reason}`; a variant's
    traces are `[number, what is its own]`. `data-NAME` holds the tables that `table` counts.

    Args:
        name: A plain word.
        variants: What a reader may choose from.
    """
    traces: dict[str, int] = {}
    tables: list[pd.DataFrame] = []
    listed: list[dict[str, object]] = []
    for variant in variants:
        entry: dict[str, object] = {"of": dict(variant.of)}
        if isinstance(variant, Missing):
            listed.append(entry | {"reason": variant.reason})
            continue
        placed = []
        for trace in variant.figure["data"]:
            own = {key: value for key, value in trace.items() if key in _OWN}
            shared = json.dumps({key: value for key, value in trace.items() if key not in _OWN}, sort_keys=True)
            placed.append([traces.setdefault(shared, len(traces)), own])
        if not any(table is variant.data for table in tables):
            tables.append(variant.data)
        place = next(place for place, table in enumerate(tables) if table is variant.data)
        listed.append(
            entry | {"caption": variant.caption, "layout": variant.figure["layout"], "traces": placed, "table": place}
        )
    figures = f'{{"traces":[{",".join(traces)}],"variants":{_json(listed)}}}'
    return f"{embed(f'plot-{name}', figures)}\n{embed(f'data-{name}', _json([_cells(table) for table in tables]))}"


def embed_frame(name: str, frame: pd.DataFrame) -> str:
    """Return a table as `{columns: [...], data: [[...], ...]}` in an inert element.

    Args:
        name: The element's id, a plain word.
        frame: Any table; null and NaN become null.
    """
    return embed(name, _json(_cells(frame)))


def _json(payload: object) -> str:
    return json.dumps(payload, separators=(",", ":"), allow_nan=False)


def _cells(frame: pd.DataFrame) -> dict[str, object]:
    return {
        "columns": [str(column) for column in frame.columns],
        "data": [[_plain(value) for value in row] for row in frame.to_numpy(dtype=object)],
    }


def _plain(value: object) -> object:
    if not pd.api.types.is_scalar(value):
        return str(value)
    if frames.is_null(value):
        return None
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) != float("inf") else str(value)
    return value if isinstance(value, str | int | bool) else str(value)


def document(title: str, body: str, *, refresh: float | None = None) -> str:
    """Return a whole page with the style, plotly.js and the page's script inside.

    Args:
        title: Plain text, escaped here.
        body: HTML.
        refresh: Seconds after which the page's script loads it again; None: never.
    """
    again = "" if refresh is None else f' data-refresh="{refresh:g}"'
    folder = resources.files("flatmin.analysis")
    style = folder.joinpath("report.css").read_text(encoding="utf-8")
    scripts = "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in ("layout.js", "report.js"))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n"
        f"<body{again}>\n{body}\n<script>\n{scripts}</script>\n</body>\n</html>\n"
    )


def write(path: Path, content: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Args:
        path: Where; its directory is made.
        content: Text, written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        # a temporary file is private to its maker; a report is meant to be passed on
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
