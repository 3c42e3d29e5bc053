"""Optimizers at an equal budget: of the points that each was tried at, the one that held-out examples choose.

A point is the values of an optimizer's own settings (step size, strength) that the study varies. For each optimizer the
point with the highest mean `val_acc` over its seeds is chosen; of equal ones that with the lower mean `val_loss`. The
test set has no part in it. A point of which a seed diverged has been tried and cannot be chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import pandas as pd

from flatmin.analysis import frames
from flatmin.errors import RequestError
from flatmin.plugins import optimizer_parts

COLUMNS = ("points", "point", "n", "val_acc", "val_loss", "test_acc", "test_se")


def tuned(models: pd.DataFrame) -> pd.DataFrame:
    """Choose every optimizer's point on the validation set.

    Args:
        models: Rows of the `models/` table; all points have the same seeds.

    Returns:
        A row per optimizer, and per value of every other setting that varies, which are conditions to compare within:
        `optimizer`, the conditions, `points` tried, the chosen `point` (a mapping of settings), `n` seeds, and over
        these the means `val_acc`, `val_loss`, `test_acc` and the standard error `test_se` (null for one seed). By
        falling `test_acc` within a condition. Empty where nothing was held out, or there are not two optimizers of
        which one has more than one point.
    """
    needed = {"optimizer", "val_acc", "val_loss", "test_acc"}
    if not needed <= set(models.columns) or models["optimizer"].nunique() < 2 or models["val_acc"].isna().all():
        return pd.DataFrame()
    axes = [axis for axis in frames.varying(models) if axis != "optimizer"]
    own = {str(name): _own(str(name), axes) for name in models["optimizer"].unique()}
    conditions = [axis for axis in axes if not any(axis in names for names in own.values())]
    plain = models.assign(**{axis: frames.hashable(models[axis]) for axis in axes})
    rows = list(_chosen(plain, own, conditions))
    frame = pd.DataFrame(rows, columns=["optimizer", *conditions, *COLUMNS])
    if frame["points"].max() < 2:
        return pd.DataFrame()
    return frame.sort_values([*conditions, "test_acc"], ascending=[True] * len(conditions) + [False], ignore_index=True)


def _own(optimizer: str, axes: Iterable[str]) -> list[str]:
    """Return the axes that are settings of an optimizer; of one that is not ours, all."""
    try:
        known = {name for part in optimizer_parts(optimizer) for name in part.arguments}
    except RequestError:
        return list(axes)
    return [axis for axis in axes if axis in known]


def _chosen(models: pd.DataFrame, own: dict[str, list[str]], conditions: list[str]) -> Iterator[dict[str, object]]:
    for keys, tried in models.groupby(["optimizer", *conditions], dropna=False, sort=False):
        names = [name for name in own[str(keys[0])] if tried[name].nunique(dropna=False) > 1]
        points = [point for _, point in tried.groupby(names, dropna=False, sort=False)] if names else [tried]
        whole = [point for point in points if frames.kept(point).all() and point["val_acc"].notna().all()]
        row: dict[str, object] = dict(zip(("optimizer", *conditions), keys, strict=True))
        row |= {"points": len(points), "point": None, "n": 0}
        if whole:
            best = min(whole, key=lambda point: (-point["val_acc"].mean(), point["val_loss"].mean()))
            deviation = best["test_acc"].std() if len(best) > 1 else None
            row |= {name: best[name].mean() for name in ("val_acc", "val_loss", "test_acc")}
            row |= {
                "point": {name: best[name].iloc[0] for name in names},
                "n": len(best),
                "test_se": None if deviation is None else deviation / math.sqrt(len(best)),
            }
        yield row
