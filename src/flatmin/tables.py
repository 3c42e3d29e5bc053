"""The tables that a study fills: their columns and types, in one place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

import pyarrow as pa

from flatmin.settings import Argument

SCHEMA_VERSION = 1
"""Counts up when a column changes its name or its meaning."""

TABLES = ("plan", "models", "epochs", "sharpness", "spectra", "failures")

_TIME = pa.timestamp("us", tz="UTC")
_KEY = [("model_id", pa.string()), ("trial_id", pa.string())]
_SCORES = [(name, pa.float64()) for name in ("train_loss", "train_acc", "val_loss", "val_acc", "test_loss", "test_acc")]

ADDED = ("train_dice", "val_dice", "test_dice")
"""Columns of `models` and `epochs` that files of earlier versions lack; null there."""

_DICE = [(name, pa.float64()) for name in ADDED]

_FIXED: Mapping[str, list[tuple[str, pa.DataType]]] = {
    "plan": [("model_id", pa.string()), ("study", pa.string()), ("planned_at", _TIME)],
    "models": [
        *_KEY,
        ("study", pa.string()),
        ("status", pa.string()),
        ("epochs_run", pa.int64()),
        ("n_params", pa.int64()),
        ("train_loss", pa.float64()),
        ("train_acc", pa.float64()),
        ("train_acc_clean", pa.float64()),
        ("val_loss", pa.float64()),
        ("val_acc", pa.float64()),
        ("test_loss", pa.float64()),
        ("test_acc", pa.float64()),
        ("best_test_acc", pa.float64()),
        ("best_test_epoch", pa.int64()),
        ("gen_gap", pa.float64()),
        ("loss_gap", pa.float64()),
        ("label_flip_rate", pa.float64()),
        ("seconds", pa.float64()),
        ("device", pa.string()),
        ("host", pa.string()),
        ("started_at", _TIME),
        ("execution", pa.string()),
        *_DICE,
    ],
    "epochs": [*_KEY, ("epoch", pa.int64()), *_SCORES, ("lr", pa.float64()), ("seconds", pa.float64()), *_DICE],
    "sharpness": [
        *_KEY,
        ("epoch", pa.int64()),
        ("measure", pa.string()),
        ("label", pa.string()),
        ("value", pa.float64()),
        ("stderr", pa.float64()),
        ("samples", pa.int64()),
        ("passes", pa.float64()),
        ("converged", pa.bool_()),
        ("metric", pa.string()),
        ("seconds", pa.float64()),
        ("settings", pa.string()),
    ],
    "spectra": [
        *_KEY,
        ("epoch", pa.int64()),
        ("kind", pa.string()),
        ("settings", pa.string()),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("value", pa.float64()),
    ],
    "failures": [
        *_KEY,
        ("attempt", pa.int64()),
        ("host", pa.string()),
        ("error", pa.string()),
        ("traceback", pa.string()),
        ("at", _TIME),
    ],
}

_ARROW = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}


def fixed_columns(table: str) -> list[str]:
    """Return the columns of a table that are not settings."""
    return [name for name, _ in _FIXED[table]]


def schema(table: str, arguments: Mapping[str, Argument] | None = None) -> pa.Schema:
    """Return a table's schema.

    Args:
        table: One of `TABLES`.
        arguments: The declarations of the settings, which become columns of `plan` and `models`.
    """
    fields = [pa.field(name, kind) for name, kind in _FIXED[table]]
    if arguments:
        names = ["dataset", "network", "optimizer"]
        columns = [pa.field(name, pa.string()) for name in names]
        columns += [pa.field(name, arrow_type(argument)) for name, argument in sorted(arguments.items())]
        place = [field.name for field in fields].index("study") + 1
        fields[place:place] = columns
    return pa.schema(fields)


def arrow_type(argument: Argument) -> pa.DataType:
    """Return the column type of a setting."""
    origin, args = get_origin(argument.annotation), get_args(argument.annotation)
    if origin is tuple:
        return pa.list_(_ARROW[args[0]])
    kinds = {type(arg) if isinstance(arg, str | int | float) else arg for arg in args} - {type(None)}
    return _ARROW[kinds.pop() if args else argument.annotation]


def to_arrow(rows: Iterable[Mapping[str, Any]], table_schema: pa.Schema) -> pa.Table:
    """Return rows as a table; what is undefined or not finite is null, never NaN.

    Raises:
        KeyError: A row has a column that the schema lacks.
    """
    names = set(table_schema.names)
    clean = []
    for row in rows:
        extra = set(row) - names
        if extra:
            raise KeyError(f"no such columns: {', '.join(sorted(extra))}")
        clean.append({name: _defined(value) for name, value in row.items()})
    return pa.Table.from_pylist(clean, schema=table_schema)


def _defined(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value
