"""Curves and surfaces of models, the rows of `spectra/`: of one kind, and of a few models that stand for all.

Which few: among the models whose training came to an end and that have the curve, those with the lowest, the median and
the highest target (the generalisation gap). Of equal targets the lower model_id comes first; the median of an even
number is the lower one. Where no model has the target, the first, middle and last model_id stand for all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from flatmin.analysis import frames
from flatmin.analysis.figures import theme

_MOST_SETTINGS = 3


@dataclass(frozen=True)
class Representative:
    """One of the few models.

    Attributes:
        model_id: The model.
        name: Its place among the others and its target, `lowest gen_gap 0.012`.
        about: What sets it apart, `width 16, seed 0`; may be empty.
    """

    model_id: str
    name: str
    about: str


def of_kind(spectra: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Return the points of one kind, each curve at its last epoch.

    Args:
        spectra: Rows of the `spectra/` table.
        kind: `surface`, `hessian_density`, ...

    Returns:
        The same columns, and two that the settings hold: `label`, the kind itself where they do not, and `part`, which
        tells the curves of one measure from each other, null where there is one alone.

    Raises:
        RequestError: A column is missing.
    """
    frames.check_columns(spectra, ["model_id", "kind", "settings", "x", "y", "value"], role="spectra table")
    rows = spectra[spectra["kind"] == kind].reset_index(drop=True)
    if "epoch" in rows.columns and len(rows):
        rows = rows[rows["epoch"] == rows.groupby(["model_id", "settings"], dropna=False)["epoch"].transform("max")]
    held = {settings: settings_of(settings) for settings in rows["settings"].unique()}
    labels = {settings: str(found.get("label", kind)) for settings, found in held.items()}
    parts = {settings: found.get("part") for settings, found in held.items()}
    return rows.assign(label=rows["settings"].map(labels), part=rows["settings"].map(parts)).reset_index(drop=True)


def settings_of(text: object) -> Mapping[str, object]:
    """Return what a row's `settings` hold; nothing where they are no JSON object.

    Args:
        text: A value of the column.
    """
    try:
        found = json.loads(str(text))
    except ValueError:
        return {}
    return found if isinstance(found, Mapping) else {}


def representatives(models: pd.DataFrame, ids: Sequence[str], *, target: str) -> list[Representative]:
    """Choose at most three models that stand for all; the rule is this file's first paragraph.

    Args:
        models: Rows of the `models/` table; only those whose training came to an end are used.
        ids: The models that have the curve.
        target: The column that orders them.

    Returns:
        The lowest first; fewer than three where there are no more.
    """
    table = models[frames.kept(models)]
    table = table[table["model_id"].isin(set(ids))].drop_duplicates("model_id").sort_values("model_id", kind="stable")
    known = table.dropna(subset=[target]) if target in table.columns else table.iloc[:0]
    ordered = known.sort_values(target, kind="stable") if len(known) else table
    places = dict.fromkeys([0, (len(ordered) - 1) // 2, len(ordered) - 1]) if len(ordered) else {}
    words = {0: "lowest", len(ordered) - 1: "highest"} if len(ordered) > 1 else {0: "only model,"}
    axes = [*frames.varying(models), *[name for name in ("seed",) if models.get(name, pd.Series()).nunique() > 1]]
    chosen = []
    for place in places:
        row = ordered.iloc[place]
        word = words.get(place, "median")
        name = f"{word} {target} {float(row[target]):.3g}" if len(known) else f"model {row['model_id']}"
        chosen.append(Representative(str(row["model_id"]), name, _about(row, axes)))
    return chosen


def _about(row: pd.Series, axes: Sequence[str]) -> str:
    said = [f"{axis} {theme.format_value(row[axis])}" for axis in axes if not frames.is_null(row[axis])]
    return ", ".join(said[:_MOST_SETTINGS]) + (", …" if len(said) > _MOST_SETTINGS else "")
