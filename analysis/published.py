"""Published numbers beside ours: the table `published.csv`, and its comparison with a study's models.

A difference is counted in standard errors, (ours - theirs) / sqrt(ours.se^2 + theirs.se^2), where both are known
(Welch 1947).
The published numbers stay in their own table: nothing here is ever written to results.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from flatmin.analysis import configurations, frames, granulated, kendall
from flatmin.labels import format_value

SMALL = "-small"
"""How the name of a small twin ends: other data and networks, never to be compared with published numbers."""

SPREAD_KINDS: Mapping[str, str] = {
    "sd": "",
    "pop_sd": "theirs ± is a population standard deviation, ours a sample's",
    "se": "theirs ± is a standard error, ours a standard deviation",
    "ci95": "theirs ± is a 95 % interval, 1.96 σ / √n with the population's σ; ours a standard deviation",
    "range": "theirs is the middle of a range, ± half of it",
    "read-off": "theirs is read off a figure",
    "none": "",
}
"""What `spread` is, and what has to be said about it beside our sample standard deviation."""

_TEXTS = ("study", "settings", "quantity", "printed", "spread_kind", "recipe", "source", "note")
_NUMBERS = {"epoch": "Int64", "value": "float64", "spread": "float64", "ci95": "float64", "n": "Int64"}
_TAU = re.compile(r"tau\((?P<x>[^|]+), (?P<y>\w+)(?: \| (?P<axis>\w+))?\)")


@dataclass(frozen=True)
class _Ours:
    """Our side of one comparison: values of single models, or one number of `n` of them; or why there is none."""

    values: npt.NDArray[np.float64]
    n: int = 0
    missing: str = ""
    conventions: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        return float(self.values.mean()) if len(self.values) else math.nan

    @property
    def sd(self) -> float:
        return float(self.values.std(ddof=1)) if len(self.values) > 1 else math.nan


@cache
def _table() -> pd.DataFrame:
    file = resources.files("flatmin.analysis").joinpath("published.csv")
    dtypes = {**dict.fromkeys(_TEXTS, "str"), **_NUMBERS}
    with file.open(encoding="utf-8") as opened:
        table = pd.read_csv(opened, dtype=dtypes, keep_default_na=False, na_values={name: [""] for name in _NUMBERS})
    return table


def published() -> pd.DataFrame:
    """Return every published number, a row each.

    Returns:
        `study`, the built-in study; `settings`, JSON of the settings that tell the row's models from others; `epoch`,
        null for the last; `quantity`, a column of `wide` or what docs/published.md explains; `printed`, the value as
        printed; `value` in our units; `spread` in our units, and `spread_kind`, a key of `SPREAD_KINDS`; `ci95`, half
        the width of a 95 % interval printed beside it; `n`, the models in a mean, the configurations in a correlation;
        `recipe`, JSON of further settings; `source`; `note`. What is not recorded is null, or empty text.
    """
    return _table().copy()


def in_words(settings: str) -> str:
    """Return the settings of a published row as a reader wants them.

    Args:
        settings: JSON, as in the table.

    >>> in_words('{"network": "mlp", "rho": 0.05, "optimizer": "sam-sgd", "skip": false}')
    'mlp, rho 0.05, sam-sgd, skip false'
    """
    named = ("dataset", "network", "optimizer")
    values = json.loads(settings).items()
    return ", ".join(str(value) if name in named else f"{name} {format_value(value)}" for name, value in values)


def small_twin(models: pd.DataFrame) -> bool:
    """Tell whether models are of a small twin of a study with published numbers, or of such a study on stand-in data.

    Args:
        models: Rows of the `models/` table.
    """
    if "study" not in models.columns:
        return False
    names = models["study"].astype(str)
    known = names.str.removesuffix(SMALL).isin(_table()["study"])
    return bool((known & (names.str.endswith(SMALL) | _stand_in(models))).any())


def compare(
    models: pd.DataFrame,
    sharpness: pd.DataFrame | None = None,
    epochs: pd.DataFrame | None = None,
    *,
    numbers: pd.DataFrame | None = None,
    recipes: pd.DataFrame | None = None,
    of_all: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Set our numbers beside the published ones.

    Ours is the same quantity as theirs: the best epoch where theirs is, the rank correlation of seed means where theirs
    is. Models that diverged and those of small twins never count.

    Args:
        models: Rows of the `models/` table.
        sharpness: Rows of the `sharpness/` table; None or empty when nothing was measured.
        epochs: Rows of the `epochs/` table, for numbers of another epoch than the last.
        numbers: The published numbers; None: `published()`.
        recipes: The settings of the models that the study trains as published, a row each. Whatever else ours were
            trained with is named in `conventions`; None: only what `recipe` records.
        of_all: Our numbers that are of all models of a study together, by quantity.

    Returns:
        The published rows of the models' studies, and for each `stderr` (of theirs), `ours` (mean), `ours_sd` (sample
        standard deviation over models), `ours_stderr`, `ours_n`, `difference` (ours - theirs), `standard_errors` (the
        difference in units of its standard error) and `conventions` (what differs in how the two were made). Null is
        what is not known; where there is nothing of ours, `missing` says why, else it is empty.
    """
    numbers = published() if numbers is None else numbers
    own = models[~_stand_in(models)] if "study" in models.columns else models.iloc[:0]
    numbers = numbers[numbers["study"].isin(own["study"].unique())].reset_index(drop=True)
    tables = _tables(own, sharpness, epochs, of_all or {})
    keys = set(zip(numbers["study"], numbers["settings"], strict=True))
    groups = {key: _matching(tables.models[tables.models["study"] == key[0]], key[1]) for key in keys}
    changed = {key: _changed(group, recipes, key[1]) for key, group in groups.items()}
    found = [
        _one(row, groups[row["study"], row["settings"]], tables, changed[row["study"], row["settings"]])
        for row in numbers.to_dict("records")
    ]
    names = ["stderr", "ours", "ours_sd", "ours_stderr", "ours_n", "difference", "standard_errors"]
    beside = pd.DataFrame(found, columns=[*names, "conventions", "missing"])
    types: dict[str, Any] = {**dict.fromkeys(names, "float64"), "ours_n": "Int64"}
    return pd.concat([numbers, beside.astype(types)], axis=1)


@dataclass(frozen=True)
class _Tables:
    """Models with a column per measure; the level of each on every setting that differs; the rows behind."""

    models: pd.DataFrame
    levels: pd.DataFrame
    sharpness: pd.DataFrame | None
    epochs: pd.DataFrame | None
    of_all: Mapping[str, float]

    def axes(self, models: pd.DataFrame) -> list[str]:
        """Name the settings that differ between some models of the table."""
        levels = self.levels.loc[models.index].to_numpy()
        return [str(axis) for axis in self.levels.columns[(levels != levels[:1]).any(axis=0)]]


def _tables(
    models: pd.DataFrame, sharpness: pd.DataFrame | None, epochs: pd.DataFrame | None, of_all: Mapping[str, float]
) -> _Tables:
    wide = frames.wide(models, sharpness)
    axes = frames.varying(wide, exclude=frames.labels(sharpness))
    levels = {axis: frames.levels(wide[axis]) for axis in axes}
    measured = sharpness if sharpness is not None and len(sharpness) else None
    return _Tables(wide, pd.DataFrame(levels, index=wide.index), measured, epochs, of_all)


def _stand_in(models: pd.DataFrame) -> pd.Series[bool]:
    if "stand_in" not in models.columns:
        return pd.Series(False, index=models.index)
    return _equal(models["stand_in"], True)


def _matching(models: pd.DataFrame, settings: str) -> pd.DataFrame:
    """The models that have these settings; none where a setting is null, which says that theirs is not recorded."""
    matches = pd.Series(True, index=models.index)
    for name, value in json.loads(settings).items():
        if value is None or name not in models.columns:
            return models.iloc[:0]
        matches &= _equal(models[name], value)
    return models[matches]


def _changed(models: pd.DataFrame, recipes: pd.DataFrame | None, settings: str) -> tuple[str, ...]:
    """What our models of a row were trained with, and the study's own are not; seeds apart."""
    if recipes is None or models.empty:
        return ()
    own = _matching(recipes, settings)
    said = []
    for name in own.columns:
        if frames.is_seed(name) or name not in models.columns:
            continue
        # null is a setting that came with a later version, whose neutral value these models have
        ours, theirs = (dict.fromkeys(map(_told, values)) for values in (models[name].dropna(), own[name]))
        if not set(ours) <= set(theirs):
            said.append(f"{name} {_listed(ours)}, the study's {_listed(theirs)}")
    return tuple(said)


def _told(value: Any) -> str:
    """A setting's value as text; numbers that are equal are told alike, and lists whatever kind of list they are."""
    if isinstance(value, list | tuple | np.ndarray):
        return "[" + ", ".join(map(_told, value)) + "]"
    if frames.is_null(value) or isinstance(value, str):
        return "none" if frames.is_null(value) else value
    return format_value(bool(value) if isinstance(value, bool | np.bool_) else float(value))


def _listed(values: Iterable[str]) -> str:
    first = list(values)
    return " or ".join(first[:3]) + (" or others" if len(first) > 3 else "")


def _one(
    row: Mapping[Any, Any], models: pd.DataFrame, tables: _Tables, changed: tuple[str, ...] = ()
) -> dict[str, object]:
    """Our side of one published row."""
    tau = _TAU.fullmatch(row["quantity"])
    if models.empty:
        ours = _Ours(np.empty(0), missing="no model has these settings")
    elif row["settings"] == "{}" and row["quantity"] in tables.of_all:
        ours = _Ours(np.array([tables.of_all[row["quantity"]]]), int(frames.kept(models).sum()))
    elif tau:
        ours = _correlation(models, tables.axes(models), **tau.groupdict())
    else:
        ours = _mean(models, tables, row["quantity"], row["epoch"])
    difference = ours.mean - row["value"]
    stderr, own_stderr = _stderr(row), ours.sd / math.sqrt(ours.n) if ours.n else math.nan
    error = math.hypot(stderr, own_stderr)
    return {
        "stderr": stderr,
        "ours": ours.mean,
        "ours_sd": ours.sd,
        "ours_stderr": own_stderr,
        "ours_n": ours.n,
        "difference": difference,
        "standard_errors": difference / error if error > 0 else math.nan,
        "conventions": "; ".join(filter(None, [*changed, *_conventions(row, models, changed), *ours.conventions])),
        "missing": ours.missing,
    }


def _equal(column: pd.Series, value: str | bool | float) -> pd.Series[bool]:
    """Mark where a setting has a value: a float in the last digits is the same, null is no value."""
    if isinstance(value, float):
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        return pd.Series(np.isclose(numbers, value, rtol=1e-6, atol=0), index=column.index)
    return column.eq(value).fillna(False).astype(bool)


def _mean(models: pd.DataFrame, tables: _Tables, quantity: str, epoch: object) -> _Ours:
    """The mean of a column or a measure over the seeds of one configuration."""
    kept = models[frames.kept(models)]
    values = _column(kept, tables, quantity, epoch)
    if values is None:
        return _Ours(np.empty(0), missing="this quantity is not in these results")
    axes = tables.axes(kept)
    if axes:
        return _Ours(np.empty(0), missing=f"our models differ in {', '.join(axes)} as well")
    known = values[~np.isnan(values)]
    if not len(known):
        return _Ours(known, missing="the value is null for all models that count")
    lost = len(models) - len(kept)
    return _Ours(known, len(known), conventions=(f"{lost} of ours diverged and are left out",) if lost else ())


def _column(kept: pd.DataFrame, tables: _Tables, quantity: str, epoch: object) -> npt.NDArray[np.float64] | None:
    """A quantity of each model at an epoch (null: the last); None where the tables have no such thing."""
    if frames.is_null(epoch):
        return frames.numeric(kept, quantity, role="published number") if quantity in kept.columns else None
    rows, name = tables.epochs, quantity
    if tables.sharpness is not None and quantity in frames.labels(tables.sharpness):
        rows, name = tables.sharpness[tables.sharpness["label"] == quantity], "value"
    if rows is None or name not in rows.columns:
        return None
    rows = rows[(rows["epoch"] == epoch) & rows["model_id"].isin(kept["model_id"])]
    return frames.numeric(rows, name, role="published number") if len(rows) else None


def _correlation(models: pd.DataFrame, axes: list[str], x: str, y: str, axis: str | None) -> _Ours:
    """Kendall's tau-b over configurations, seeds averaged; of an axis, the mean over groups that differ in it alone."""
    if not {x, y} <= set(models.columns):
        return _Ours(np.empty(0), missing="this quantity is not in these results")
    if axis is not None and axis not in axes:
        return _Ours(np.empty(0), missing=f"our models do not differ in {axis}")
    models, said = _filtered(models, axes, whole=axis is None)
    both = np.column_stack([frames.numeric(models, name, role="published number") for name in (x, y)])
    known = np.isfinite(both[:, 0]) & np.isfinite(both[:, 1])
    found = configurations.of(models.loc[known], axes, repeated=True)
    means = [found.means(column) for column in both[known].T]
    value = kendall.tau_b(*means) if axis is None else granulated.granulated(found, *means, variant="b")[axis].value
    if value is None or math.isnan(value):
        return _Ours(np.empty(0), missing="the rank correlation is undefined")
    return _Ours(np.array([value]), len(found), conventions=said)


def _filtered(models: pd.DataFrame, axes: list[str], *, whole: bool) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The models that the published filter keeps, and what to say of it.

    Where training stops at a loss, a model counts that reached it; `whole`: a configuration all of whose seeds did.
    """
    if "stop_loss" not in models.columns or not (models["stop_loss"] > 0).any():
        return models[frames.kept(models)], ()
    converged = models["status"] == "converged"
    if not (whole and axes):
        return models[converged], ("models that converged count, as in the published filter",)
    keys = [frames.hashable(models[axis]) for axis in axes]
    all_seeds = converged.groupby(keys, dropna=False).transform("all")
    return models[all_seeds], ("configurations count whose seeds all converged, as in the published filter",)


def _stderr(row: Mapping[Any, Any]) -> float:
    """The standard error of a published mean; NaN where it is not known."""
    n, spread = row["n"], row["spread"]
    if row["spread_kind"] == "se":
        return float(spread)
    if frames.is_null(n) or n < 2:
        return math.nan
    # 1.96 and the population's deviation give too small an error: n - 1 stands where they have n
    scale = {"sd": n, "pop_sd": n - 1, "ci95": 1.96**2 * (n - 1) / n}.get(row["spread_kind"], math.nan)
    return float(spread) / math.sqrt(scale)


def _conventions(row: Mapping[Any, Any], models: pd.DataFrame, changed: Sequence[str]) -> list[str]:
    """What differs between a published number and ours, in words."""
    said = []
    if row["quantity"].startswith("best_test"):
        said.append("best epoch, chosen on the test set, on both sides")
        every = models["eval_every"].max() if len(models) and "eval_every" in models.columns else 1
        if every > 1:
            said.append(f"ours of every {int(every)}th epoch")
    said.append(SPREAD_KINDS[row["spread_kind"]])
    if not frames.is_null(row["ci95"]):
        said.append("the paper's ± is half a 95 % interval")
    if not frames.is_null(row["n"]) and row["n"] == 1:
        said.append("theirs is one model")
    told = {text.partition(" ")[0] for text in changed}
    for name, value in json.loads(row["recipe"]).items():
        if (
            name not in told
            and len(models)
            and name in models.columns
            and not (_equal(models[name], value) | models[name].isna()).all()
        ):
            other = " or ".join(format_value(one) for one in frames.ordered(models[name])[:3])
            said.append(f"{name} {other}, theirs {format_value(value)}")
    return [*said, row["note"]]
