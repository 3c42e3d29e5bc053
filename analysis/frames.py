"""Tables of models: reading them, joining measures to them, telling settings from results.

Everything here takes and returns pandas data frames with the columns of the results tables (`models/`,
`epochs/`, `sharpness/`), or of anybody's own table.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from flatmin.errors import RequestError, nearest
from flatmin.tables import fixed_columns

T = TypeVar("T")

KEPT_STATUSES = ("converged", "finished")
"""A model with another status (`diverged`) has no end of training to compare."""

STATUSES = (*KEPT_STATUSES, "diverged")

RESULT_COLUMNS = frozenset([*fixed_columns("models"), *fixed_columns("plan")])
"""The columns of `models/` that are no settings."""

_SAME = 1e-6
"""Fractions that differ by less than this part of themselves are one level of a setting."""


def check_columns(frame: pd.DataFrame, names: Iterable[str], *, role: str) -> None:
    """Refuse names that are not columns of the frame.

    Args:
        frame: Any table.
        names: Column names to look for.
        role: What the names are for, as the message shall say: `target`, `axis`, `measure`.

    Raises:
        RequestError: A name is missing; says the nearest one and all valid ones.
    """
    valid = [str(column) for column in frame.columns]
    for name in names:
        if name in frame.columns:
            continue
        hint = nearest(name, valid)
        listing = "" if hint.startswith(" Valid:") else f" Valid: {', '.join(sorted(valid))}."
        raise RequestError(f"{role}: the table has no column '{name}'.{hint}{listing}")


def numeric(frame: pd.DataFrame, column: str, *, role: str) -> npt.NDArray[np.float64]:
    """Return a column as floats, with NaN where it is null or not finite.

    Args:
        frame: Any table.
        column: The name of one of its columns.
        role: What the column is for, as the message shall say.

    Returns:
        Array of shape `(rows,)`.

    Raises:
        RequestError: The column holds something that is not a number.
    """
    values = frame[column]
    if pd.api.types.is_datetime64_any_dtype(values.dtype) or pd.api.types.is_timedelta64_dtype(values.dtype):
        raise RequestError(f"{role}: column '{column}' holds times, not numbers.")
    try:
        numbers = pd.to_numeric(values)
    except (ValueError, TypeError):
        example = next(value for value in values if isinstance(value, str) or not pd.api.types.is_scalar(value))
        raise RequestError(f"{role}: column '{column}' is not numeric (it holds {example!r}).") from None
    array = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(array), array, np.nan)


def kept(frame: pd.DataFrame) -> pd.Series[bool]:
    """Mark the rows whose training came to an end: `converged` or `finished`.

    A table without a `status` column, or with one that never uses our words, is somebody's own: all its rows
    count.

    Args:
        frame: Any table of models.

    Returns:
        A boolean series with the frame's index.
    """
    if "status" not in frame.columns or not frame["status"].isin(STATUSES).any():
        return pd.Series(True, index=frame.index)
    return frame["status"].isin(KEPT_STATUSES)


def is_seed(column: object) -> bool:
    """Tell whether a column repeats a configuration instead of making another one: `seed`, `order_seed`, `split_seed`.

    Args:
        column: The name of a column.
    """
    return str(column) == "seed" or str(column).endswith("_seed")


def varying(frame: pd.DataFrame, *, exclude: Collection[str] = ()) -> list[str]:
    """Name the settings that differ between rows, seeds left out: the axes of the table.

    A null counts as a value of its own, because a setting that only some plug-ins take is null for the
    others.

    Args:
        frame: A table of models.
        exclude: Columns that are no settings although they are not known results, such as measures.

    Returns:
        Column names, in the frame's order.

    >>> varying(pd.DataFrame({"width": [1, 2], "lr": [0.1, 0.1], "seed": [0, 1], "gen_gap": [0.2, 0.3]}))
    ['width']
    """
    left_out = RESULT_COLUMNS | set(exclude)
    columns = [str(column) for column in frame.columns if column not in left_out and not is_seed(column)]
    return [column for column in columns if len(frame) and levels(frame[column]).max() > 0]


def levels(values: pd.Series) -> npt.NDArray[np.int64]:
    """Number the levels of a setting: equal values, and fractions that differ in the last digits only.

    Numbers within one part in a million of their lower neighbour are one level, because the same setting comes as
    0.1 and, from another machine or a 32-bit file, as 0.10000000149. Null is a level of its own.

    Args:
        values: One column, of any type.

    Returns:
        Shape `(rows,)`: numbers from 0 on, without a gap.

    >>> levels(pd.Series([0.1, 0.01, 0.1 + 1e-12, None])).tolist(), levels(pd.Series([0.5, np.inf, -np.inf])).tolist()
    ([1, 0, 1, 2], [1, 2, 0])
    """
    plain = hashable(values).convert_dtypes() if values.dtype == object else values
    if pd.api.types.is_float_dtype(plain.dtype):
        distinct = np.sort(plain.dropna().unique().astype(np.float64))
        apart = (np.diff(distinct) > _SAME * np.abs(distinct[1:])) | np.isinf(distinct[1:])
        with np.errstate(invalid="ignore"):  # infinity is no whole number
            whole = (distinct[1:] % 1 == 0) & (distinct[:-1] % 1 == 0)
        level = np.concatenate([[0], np.cumsum(apart | whole)]) if len(distinct) else distinct.astype(np.int64)
        found = dict(zip(distinct.tolist(), level.tolist(), strict=True))
        coded = plain.astype("float64").map(found)
    else:
        coded = pd.Series(pd.factorize(plain)[0], index=plain.index).replace(-1, np.nan)
    codes = coded.fillna(coded.max() + 1 if coded.notna().any() else 0)
    return codes.to_numpy(dtype=np.int64)


def hashable(values: pd.Series) -> pd.Series:
    """Return the series with lists and the like (milestones) as text, so that it can be grouped.

    Args:
        values: Any column.

    Returns:
        A series of the same length; the same object where nothing had to change.
    """
    if values.dtype != object:
        return values
    return values.map(lambda value: value if pd.api.types.is_scalar(value) else str(value))


def latest(sharpness: pd.DataFrame) -> pd.DataFrame:
    """Keep the last epoch's row of every model and label.

    Args:
        sharpness: Rows of the `sharpness/` table.

    Returns:
        The same columns, at most one row per model and label; of equal epochs the later row stays.

    Raises:
        RequestError: The table lacks `model_id`, `label` or `value`.
    """
    check_columns(sharpness, ("model_id", "label", "value"), role="sharpness table")
    rows = sharpness
    if "epoch" in rows.columns:
        rows = rows.sort_values("epoch", kind="stable", na_position="first")
    return rows.drop_duplicates([*_keys(rows), "label"], keep="last")


def final(models: pd.DataFrame, sharpness: pd.DataFrame) -> pd.DataFrame:
    """Keep the measures of every model's last epoch.

    Args:
        models: Rows of the `models/` table.
        sharpness: Rows of the `sharpness/` table.

    Returns:
        What `latest` returns, less the rows of a model in `models` that are known to be from before its end.

    Raises:
        RequestError: A column that is needed is missing.
    """
    rows = latest(sharpness)
    if "epoch" not in rows.columns or not {"model_id", "epochs_run"} <= set(models.columns):
        return rows
    ended = rows["model_id"].map(models.drop_duplicates("model_id").set_index("model_id")["epochs_run"])
    return rows[~(rows["epoch"] < ended)]


def labels(sharpness: pd.DataFrame | None) -> list[str]:
    """Name the measures in a `sharpness/` table, sorted.

    Args:
        sharpness: Rows of the table, or None.

    Returns:
        The distinct labels; empty without rows.
    """
    if sharpness is None or sharpness.empty:
        return []
    check_columns(sharpness, ("label",), role="sharpness table")
    return sorted(str(label) for label in sharpness["label"].dropna().unique())


def wide(models: pd.DataFrame, sharpness: pd.DataFrame | None = None) -> pd.DataFrame:
    """Join models with their measures: one row per model, one further column per measure label.

    Args:
        models: Rows of the `models/` table.
        sharpness: Rows of the `sharpness/` table, or None.

    Returns:
        All rows and columns of `models`, counted from 0, then the labels, sorted; null where a model lacks a
        measure.

    Raises:
        RequestError: A column that the join needs is missing, or a label is the name of a column of `models`.
    """
    names = labels(sharpness)
    if sharpness is None or not names:
        return models.reset_index(drop=True)
    check_columns(models, ("model_id",), role="models table")
    clash = sorted(set(names) & set(models.columns))
    if clash:
        raise RequestError(f"measure '{clash[0]}' has the name of a column of the models table.")
    keys = [key for key in _keys(sharpness) if key in models.columns]
    rows = final(models, sharpness).dropna(subset=["label"])
    rows = rows.assign(value=numeric(rows, "value", role="sharpness table")).drop_duplicates(
        [*keys, "label"], keep="last"
    )
    measures = rows.pivot(index=keys, columns="label", values="value").reindex(columns=names)
    measures.columns.name = None
    return models.merge(measures.reset_index(), on=keys, how="left")


def _keys(frame: pd.DataFrame) -> list[str]:
    """A row elsewhere belongs to the row of `models/` with the same model and trial."""
    return [key for key in ("model_id", "trial_id") if key in frame.columns]


def spread(values: Sequence[T], most: int) -> list[T]:
    """Pick at most `most` values, the first and the last among them, evenly by rank.

    Args:
        values: Anything in order.
        most: How many to return at most, two or more.

    Returns:
        A part of `values`, in the same order.

    >>> spread([0, 1, 2, 3, 4, 5], 3)
    [0, 2, 5]
    """
    if len(values) <= most:
        return list(values)
    return [values[int(rank)] for rank in np.linspace(0, len(values) - 1, most)]


def thin(epochs: pd.Series, most: int) -> list[int]:
    """Pick at most about `most` epochs of a training, half of them evenly, half evenly on a logarithmic scale.

    Args:
        epochs: Epochs, in any order and as often as they come.
        most: How many to return at most.

    Returns:
        Distinct epochs, the first and the last among them, in order.

    >>> thin(pd.Series(range(1, 101)), 8)
    [1, 5, 22, 34, 67, 100]
    """
    distinct = np.sort(epochs.dropna().unique())
    if len(distinct) <= most:
        return [int(epoch) for epoch in distinct]
    even = np.linspace(0, len(distinct) - 1, most // 2)
    early = np.geomspace(1, len(distinct), most - most // 2) - 1
    return [int(epoch) for epoch in distinct[np.unique(np.concatenate([even, early]).round().astype(int))]]


def ordered(values: pd.Series) -> list[object]:
    """List the distinct values of a setting: numbers by size, else text by letters, null last.

    Args:
        values: One column.

    Returns:
        Plain Python values; None stands for null.
    """
    plain = hashable(values)
    distinct = [value.item() if hasattr(value, "item") else value for value in plain.dropna().unique()]
    try:
        distinct.sort()
    except TypeError:  # numbers beside text have no order of their own
        distinct.sort(key=str)
    return [*distinct, None] if plain.isna().any() else distinct


def is_null(value: object) -> bool:
    """Tell whether one value is null: None, NaN or a missing time.

    Args:
        value: Anything; a list is never null.
    """
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value is pd.NA or value is pd.NaT
