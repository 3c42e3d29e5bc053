"""The tables that a study fills: their columns and types, in one place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args, get_origin

import pyarrow as pa

from flatmin.settings import Argument

LOST = "lost"
"""What the names of files of `failures` have that use no attempt up."""

SCHEMA_VERSION = 1
"""Counts up when a column changes its name or its meaning."""

TABLES = ("plan", "models", "epochs", "sharpness", "spectra", "failures")

_BATCH = 4096
"""Rows that are Python objects at a time while a table is made."""

_TIME = pa.timestamp("us", tz="UTC")
_TEXT, _WHOLE, _REAL = pa.string(), pa.int64(), pa.float64()


@dataclass(frozen=True)
class Column:
    """One documented column.

    Attributes:
        name: The column's name.
        kind: Its Arrow type.
        about: What it says, in a clause.
        unit: The unit of the value; empty for a pure number or a name.
    """

    name: str
    kind: pa.DataType
    about: str
    unit: str = ""


_MODEL = Column("model_id", _TEXT, "the model: a hash of its settings")
_TRIAL = Column("trial_id", _TEXT, "the trial that trained it: a hash of its members' ids")
_STUDY = Column("study", _TEXT, "the study")
_LOSS = "loss without smoothing, in eval mode over the whole set"
_ACCURACY = "correct predictions, in eval mode over the whole set"
_DICE = "mean Dice score of a segmentation, null elsewhere"

ADDED = ("train_dice", "val_dice", "test_dice")
"""Columns of `models` and `epochs` that files of earlier versions lack; null there."""

_ADDED = [Column(f"{of}_dice", _REAL, f"{_DICE}, on {of} examples", "fraction") for of in ("train", "val", "test")]


def _scores(of: str) -> list[Column]:
    return [
        Column(f"{of}_loss", _REAL, f"{_LOSS} of {of} examples", "nats"),
        Column(f"{of}_acc", _REAL, f"{_ACCURACY} of {of} examples; null in a regression", "fraction"),
    ]


COLUMNS: Mapping[str, list[Column]] = {
    "plan": [_MODEL, _STUDY, Column("planned_at", _TIME, "when it was first planned")],
    "models": [
        _MODEL,
        _TRIAL,
        _STUDY,
        Column(
            "status", _TEXT, "how training ended: converged (stop_loss reached), finished (all epochs run) or diverged"
        ),
        Column("epochs_run", _WHOLE, "epochs that were trained", "epochs"),
        Column("n_params", _WHOLE, "trainable weights of the network"),
        *_scores("train"),
        Column("train_acc_clean", _REAL, "train_acc against the true labels, whatever the label noise", "fraction"),
        *_scores("val"),
        *_scores("test"),
        Column("best_test_acc", _REAL, "highest test_acc of all epochs; for comparison with papers", "fraction"),
        Column("best_test_epoch", _WHOLE, "the first epoch with best_test_acc; nothing selects on it", "epochs"),
        Column("gen_gap", _REAL, "train_acc - test_acc", "fraction"),
        Column("loss_gap", _REAL, "test_loss - train_loss", "nats"),
        Column("label_flip_rate", _REAL, "training labels that are not the true ones", "fraction"),
        Column("seconds", _REAL, "its share of the time in which its stack was trained", "seconds"),
        Column("device", _TEXT, "what it was trained on"),
        Column("host", _TEXT, "the machine it was trained on"),
        Column("started_at", _TIME, "when its trial began"),
        Column(
            "execution",
            _TEXT,
            "JSON: stack size, halvings and why, threads, compile, retries, memory, versions, commit",
        ),
        *_ADDED,
    ],
    "epochs": [
        _MODEL,
        _TRIAL,
        Column("epoch", _WHOLE, "the evaluated epoch, from 1 on", "epochs"),
        *_scores("train"),
        *_scores("val"),
        *_scores("test"),
        Column("lr", _REAL, "learning rate of the epoch's last step"),
        Column("seconds", _REAL, "its share of the stack's time since training began", "seconds"),
        *_ADDED,
    ],
    "sharpness": [
        _MODEL,
        _TRIAL,
        Column("epoch", _WHOLE, "the epoch after which it was measured; epochs_run: at the end", "epochs"),
        Column("measure", _TEXT, "the measure's name"),
        Column("label", _TEXT, "the measure with the settings that are not at their defaults"),
        Column("value", _REAL, "the value; null where it is undefined"),
        Column("stderr", _REAL, "its standard error, or an error bound; 0 where it is exact", "the value's"),
        Column("samples", _WHOLE, "draws, steps or products behind the value"),
        Column("passes", _REAL, "cost: a loss is 1, a gradient 2, a Hessian-vector product 4", "passes over the set"),
        Column("converged", pa.bool_(), "whether the measure's tolerance was met within its budget"),
        Column("metric", _TEXT, "what scales perturbations: identity, filter or element; null where nothing does"),
        Column("seconds", _REAL, "time that measuring took; shared work counts once", "seconds"),
        Column("settings", _TEXT, "JSON: the measure's settings; `failed` or `refused` say why there is no value"),
    ],
    "spectra": [
        _MODEL,
        _TRIAL,
        Column("epoch", _WHOLE, "the epoch after which it was measured", "epochs"),
        Column("kind", _TEXT, "hessian_density, surface or fourier"),
        Column("settings", _TEXT, "JSON: the curve's label and settings"),
        Column("x", _REAL, "eigenvalue, length of the first direction, or frequency"),
        Column("y", _REAL, "length of the second direction; null on a curve"),
        Column("value", _REAL, "density, loss or amplitude at that point; null where it is not finite"),
    ],
    "failures": [
        _MODEL,
        _TRIAL,
        Column(
            "attempt",
            _WHOLE,
            "which attempt of the trial failed, from 1 on; 0 where it got on and its process was lost",
        ),
        Column("host", _TEXT, "the machine it failed on"),
        Column("error", _TEXT, "the error in one line"),
        Column("traceback", _TEXT, "where it was raised"),
        Column("at", _TIME, "when it failed"),
    ],
}
"""The columns of each table that are not settings."""

_ARROW = {int: pa.int64(), float: pa.float64(), bool: pa.bool_(), str: pa.string()}


def fixed_columns(table: str) -> list[str]:
    """Return the columns of a table that are not settings."""
    return [column.name for column in COLUMNS[table]]


def schema(table: str, arguments: Mapping[str, Argument] | None = None) -> pa.Schema:
    """Return a table's schema.

    Args:
        table: One of `TABLES`.
        arguments: The declarations of the settings, which become columns of `plan` and `models`.
    """
    fields = [pa.field(column.name, column.kind) for column in COLUMNS[table]]
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
    batches = list(arrow_batches(rows, table_schema))
    return pa.concat_tables(batches) if batches else table_schema.empty_table()


def arrow_batches(rows: Iterable[Mapping[str, Any]], table_schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield the same rows some thousands at a time.

    Raises:
        KeyError: A row has a column that the schema lacks.
    """
    names, left = set(table_schema.names), iter(rows)
    while clean := [_clean(row, names) for row in islice(left, _BATCH)]:
        yield pa.Table.from_pylist(clean, schema=table_schema)


def _clean(row: Mapping[str, Any], names: AbstractSet[str]) -> dict[str, Any]:
    extra = set(row) - names
    if extra:
        raise KeyError(f"no such columns: {', '.join(sorted(extra))}")
    return {name: _defined(value) for name, value in row.items()}


def _defined(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value
