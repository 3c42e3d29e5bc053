"""The dictionary of columns: what every column of every table and view is, its type and its unit.

From the columns' own declarations (`flatmin.tables`) and, of settings and measures, the plug-ins' signatures.
`python -m flatmin.orchestrator.columns` prints it as Markdown: that is docs/columns.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import pyarrow as pa

from flatmin.errors import RequestError
from flatmin.labels import parse_label
from flatmin.orchestrator.grid import NAMES
from flatmin.orchestrator.inspect import VIEWS, relation
from flatmin.plugins import listing
from flatmin.results import Results
from flatmin.settings import Argument
from flatmin.tables import COLUMNS, TABLES, Column, schema

WITH_SETTINGS = ("plan", "models", "wide")
"""The tables and views with a column for every setting."""

_OF_MODELS = ("network", "dataset", "optimizer", "training")

_TEXT, _WHOLE, _REAL = pa.string(), pa.int64(), pa.float64()
_OWN_UNIT = "the quantity's"
_PUBLISHED = (
    Column("study", _TEXT, "the built-in study that trains these models"),
    Column("settings", _TEXT, "JSON: the settings that tell the models of this row from the study's others"),
    Column("epoch", _WHOLE, "the epoch the number is of; null: the last", "epochs"),
    Column("quantity", _TEXT, "a column of `wide`, a rank correlation, or one of the list in published.md"),
    Column("printed", _TEXT, "the number as printed, with its unit"),
    Column("value", _REAL, "the number in our units", _OWN_UNIT),
    Column("spread", _REAL, "the number's ± in our units", _OWN_UNIT),
    Column("spread_kind", _TEXT, "what the ± is: sd, pop_sd, se, ci95, range, read-off or none"),
    Column("ci95", _REAL, "half the width of the printed 95 % interval", _OWN_UNIT),
    Column("n", _WHOLE, "models in a mean, configurations in a correlation; null where it is not recorded"),
    Column("recipe", _TEXT, "JSON: further settings, which do not choose the models"),
    Column("source", _TEXT, "where the number is from"),
    Column("note", _TEXT, "what to know before comparing it"),
    Column("stderr", _REAL, "standard error of the published number", _OWN_UNIT),
    Column("ours", _REAL, "the same quantity of the results' models: a mean, or a correlation", _OWN_UNIT),
    Column("ours_sd", _REAL, "standard deviation of ours over models (n - 1)", _OWN_UNIT),
    Column("ours_stderr", _REAL, "standard error of ours", _OWN_UNIT),
    Column("ours_n", _WHOLE, "models, or configurations, behind ours"),
    Column("difference", _REAL, "ours - value", _OWN_UNIT),
    Column("standard_errors", _REAL, "the difference in units of its standard error"),
    Column("conventions", _TEXT, "what differs in how the two were made"),
    Column("missing", _TEXT, "why there is nothing of ours; empty where there is"),
)

_SQL_TYPES = {
    pa.string(): "VARCHAR",
    pa.large_string(): "VARCHAR",
    pa.int64(): "BIGINT",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.timestamp("us", tz="UTC"): "TIMESTAMP WITH TIME ZONE",
}


@dataclass(frozen=True)
class Entry:
    """One column in the dictionary.

    Attributes:
        table: The table or view.
        column: The column's name.
        type: Its type in SQL.
        unit: The unit of its values; empty for a pure number or a name.
        about: What it says.
    """

    table: str
    column: str
    type: str
    unit: str
    about: str


def dictionary(results: Results | None = None) -> list[Entry]:
    """Return every column of every table and view.

    Args:
        results: A results directory, whose own columns are meant; None: all that there can be.
    """
    return [entry for table in (*TABLES, *VIEWS) for entry in _entries(table, results)]


def names_in(results: Results, table: str) -> list[str]:
    """Return the names of the columns of a table or view.

    Args:
        results: A results directory.
        table: The table or view.
    """
    return [column.name for column in _PUBLISHED] if table == "published" else relation(results, table).column_names


def as_table(entries: Iterable[Entry]) -> pa.Table:
    """Return the dictionary as rows."""
    names = ("table", "column", "type", "unit", "about")
    return pa.Table.from_pylist(
        [asdict(entry) for entry in entries], pa.schema([(name, pa.string()) for name in names])
    )


def markdown() -> str:
    """Return the dictionary of all that there can be as Markdown."""
    settings = _settings()
    lines = [
        "# Dictionary of columns",
        "",
        "Written from the declarations by `python -m flatmin.orchestrator.columns`; a test holds it.",
        "`flatmin-sweep query --results DIR --schema` prints it for one results directory. What a row is, and the",
        "conventions: [tables.md](tables.md).",
    ]
    for table in TABLES:
        lines += ["", f"## `{table}`", "", *(_BESIDE if table in WITH_SETTINGS else [])]
        lines += _rows(entry for entry in _entries(table, None) if entry.column not in settings)
    lines += [
        "",
        "## Settings",
        "",
        "Columns of `plan`, `models` and `wide`; null where a model's plug-ins do not take it.",
        "",
    ]
    lines += _rows(entry for entry in _entries("models", None) if entry.column in settings)
    lines += [
        "",
        "## `wide`",
        "",
        "Every column of `models`, and one per measure label, which is the measure's name with the",
    ]
    lines += ["settings that are not at their defaults:", ""]
    lines += _rows(entry for entry in _entries("wide", None) if entry.column in listing("measure"))
    lines += ["", "## `published`", "", *_rows(_entries("published", None))]
    return "\n".join(lines) + "\n"


_BESIDE = ["Beside [every setting](#settings):", ""]


def _rows(entries: Iterable[Entry]) -> list[str]:
    cells = ([f"`{entry.column}`", entry.type, entry.unit, entry.about] for entry in entries)
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return ["| column | type | unit | meaning |", "|---|---|---|---|", *rows]


def _entries(table: str, results: Results | None) -> list[Entry]:
    fields = relation(results, table).schema if results else _all_columns(table)
    declared = _PUBLISHED if table == "published" else COLUMNS["models" if table == "wide" else table]
    known = {column.name: (column.unit, column.about) for column in declared}
    if table in WITH_SETTINGS:
        known = _settings() | known
    found = ((field, known.get(field.name) or _of_measure(field.name)) for field in fields)
    return [Entry(table, field.name, _sql_type(field.type), unit, about) for field, (unit, about) in found]


def _all_columns(table: str) -> pa.Schema:
    """Return the columns that a table can have, whatever the study."""
    if table == "published":
        return pa.schema([(column.name, column.kind) for column in _PUBLISHED])
    fields = schema("models" if table == "wide" else table, _arguments() if table in WITH_SETTINGS else None)
    measures = listing("measure") if table == "wide" else ()
    return pa.schema([*fields, *((name, pa.float64()) for name in measures)])


def _arguments() -> dict[str, Argument]:
    plugins = (plugin for kind in _OF_MODELS for plugin in listing(kind).values())
    return {name: argument for plugin in plugins for name, argument in plugin.arguments.items()}


def _settings() -> dict[str, tuple[str, str]]:
    """Return unit and meaning of every setting of models."""
    named = {kind: ("", f"The {kind.replace('dataset', 'data set')}, by its name.") for kind in NAMES}
    return named | {name: (argument.setting.unit, argument.setting.about) for name, argument in _arguments().items()}


def _of_measure(label: str) -> tuple[str, str]:
    """Return unit and meaning of a measure's column; nothing of a plug-in that is not installed here."""
    try:
        return "", listing("measure")[parse_label(label).measure].about
    except (RequestError, KeyError):
        return "", "of a plug-in that is not installed here"


def _sql_type(kind: pa.DataType) -> str:
    return f"{_sql_type(kind.value_type)}[]" if pa.types.is_list(kind) else _SQL_TYPES.get(kind, str(kind).upper())


if __name__ == "__main__":
    print(markdown(), end="")
