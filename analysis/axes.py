"""The axes of a table of models: the settings that vary, less those that the choice of plug-ins fixes.

The optimizer `asam-sgd` takes `rho` and `sgd` takes none, so that in a study of both `rho` differs between models; yet
it tells nothing that the optimizer does not. Were it an axis, no two models would differ in the optimizer alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from flatmin.analysis import configurations, frames
from flatmin.analysis.configurations import Ints

CHOICES = ("optimizer", "dataset", "network", "augmentation", "schedule")
"""Settings that choose what else is set; of two that go together, the first is the axis."""


def independent(frame: pd.DataFrame, *, exclude: Collection[str] = ()) -> list[str]:
    """Name the axes of a table.

    Args:
        frame: A table of models.
        exclude: Columns that are no settings although they are not known results, such as measures.

    Returns:
        What `frames.varying` returns, in its order, less what `fixed_by` names.

    >>> models = {"optimizer": ["sgd", "sam-sgd"] * 2, "rho": [None, 0.05] * 2, "lr": [0.1, 0.1, 0.2, 0.2]}
    >>> independent(pd.DataFrame(models))
    ['optimizer', 'lr']
    """
    settings = frames.varying(frame, exclude=exclude)
    fixed = fixed_by(frame, settings)
    return [setting for setting in settings if setting not in fixed]


def fixed_by(frame: pd.DataFrame, settings: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Find the settings that have one value for every choice of plug-ins.

    Args:
        frame: A table of models.
        settings: The settings that vary in it.

    Returns:
        Those settings, each with what fixes it: one setting of `CHOICES`, or all of them that vary, together. A model's
        other settings tell its configuration as well without them.
    """
    levels = {setting: frames.levels(frame[setting]) for setting in settings}
    choices = [name for name in CHOICES if name in levels]
    for name in reversed(choices):
        others = [other for other in choices if other != name]
        if _fixes([levels[other] for other in others], levels[name]):
            choices = others
    found = {}
    for setting in (setting for setting in settings if setting not in choices):
        if _fixes([levels[name] for name in choices], levels[setting]):
            alone = (name for name in choices if _fixes([levels[name]], levels[setting]))
            one = next(alone, None)
            found[setting] = tuple(choices) if one is None else (one,)
    return found


def seeds_return(frame: pd.DataFrame, seed_column: str) -> bool:
    """Tell whether a table has several seeds, and some of them more than once.

    Args:
        frame: A table of models.
        seed_column: The column that repeats a configuration.
    """
    if seed_column not in frame.columns:
        return False
    return bool(frame[seed_column].nunique() > 1 and frame[seed_column].duplicated().any())


def unrepeated(frame: pd.DataFrame, columns: Iterable[str], seed_column: str) -> list[str]:
    """Name the columns that cannot be settings, whose values the seeds of a configuration would share.

    Args:
        frame: A table of models.
        columns: Which columns to look at.
        seed_column: The column that repeats a configuration; where it is missing or never repeats, nothing
            can be told.

    Returns:
        The columns of fractional numbers in which no value comes twice; infinite ones are no values.
    """
    if not seeds_return(frame, seed_column):
        return []
    fractional = [column for column in columns if pd.api.types.is_float_dtype(frame[column].dtype)]
    return [column for column in fractional if frame.loc[np.isfinite(frame[column]), column].is_unique]


def _fixes(some: Sequence[Ints], other: Ints) -> bool:
    """Tell whether rows that are equal in some settings are equal in another one."""
    if not some:
        return False
    group = configurations.codes(np.stack(some, axis=1))
    first = pd.Series(other).groupby(group).transform("first")
    return bool((first == other).all())
