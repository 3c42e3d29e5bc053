"""Numbers over seeds: mean, spread and interval of every configuration, and differences paired by seed.

mean, sample standard deviation s (n - 1), standard error s / sqrt(n), and the 95 % interval mean ± t(0.975, n - 1) s /
sqrt(n) (Student 1908). Two configurations that share their seeds share initial weights, order and noise, so that their
difference is taken seed by seed and its interval is that of the differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from flatmin.analysis import configurations, frames
from flatmin.analysis.axes import independent
from flatmin.analysis.configurations import Floats


@dataclass(frozen=True)
class Spread:
    """What the seeds of one configuration say; None where the number of seeds is too small.

    Attributes:
        n: Seeds with the value.
        mean: Their mean.
        sd: Sample standard deviation.
        se: Standard error of the mean.
        low: Lower end of the 95 % interval of the mean, by Student's t.
        high: Its upper end.
    """

    n: int
    mean: float | None
    sd: float | None
    se: float | None
    low: float | None
    high: float | None


def spread(values: Floats) -> Spread:
    """Summarise the seeds of one configuration.

    Args:
        values: One value per seed; NaN where it is not known.

    >>> round(spread(np.array([1.0, 2.0, 3.0])).high, 6)
    4.484138
    """
    known = values[np.isfinite(values)]
    n = len(known)
    if n < 2:
        return Spread(n, float(known[0]) if n else None, None, None, None, None)
    mean, sd = float(known.mean()), float(known.std(ddof=1))
    se = sd / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * se
    return Spread(n, mean, sd, se, mean - half, mean + half)


def seeds_to_halve(n: int) -> int | None:
    """Return how many seeds an interval of a mean needs to be half as wide, at the same standard deviation.

    Args:
        n: The number of seeds now.

    Returns:
        The smallest number with t(N - 1) / sqrt(N) at most half of t(n - 1) / sqrt(n); None for fewer than two seeds.

    >>> [seeds_to_halve(n) for n in (2, 3, 5, 30)]
    [3, 5, 13, 113]
    """
    if n < 2:
        return None

    def width(count: int) -> float:
        return float(stats.t.ppf(0.975, count - 1)) / math.sqrt(count)

    more = n + 1
    while width(more) > width(n) / 2:
        more += 1
    return more


def over_seeds(
    models: pd.DataFrame, columns: Sequence[str], *, axes: Sequence[str] | None = None, seed_column: str = "seed"
) -> pd.DataFrame:
    """Summarise columns over the seeds of every configuration: the optimizer table.

    Args:
        models: Rows of the `models/` table; only those whose training came to an end are used.
        columns: What to summarise: `test_acc` is of the last epoch, `best_test_acc` of the one that is best on the test
            set, for comparison with papers only; each has rows of its own.
        axes: The settings that make a configuration. None: all that vary.
        seed_column: The column that repeats a configuration.

    Returns:
        One row per configuration and column: the axes, `quantity`, `epoch` (`last` or `best on test`), and the fields
        of `Spread`; null where undefined.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    table, names = _counted(models, columns, axes, seed_column)
    found = configurations.of(table, names, repeated=True)
    first = np.unique(found.rows, return_index=True)[1]
    settings = table[names].iloc[first].reset_index(drop=True)
    parts = []
    for column in columns:
        values = frames.numeric(table, column, role="optimizer table")
        spreads = pd.DataFrame([spread(values[found.rows == config]) for config in range(len(found))])
        parts.append(pd.concat([settings.assign(quantity=column, epoch=_epoch(column)), spreads], axis=1))
    return pd.concat(parts, ignore_index=True)


def paired(
    models: pd.DataFrame,
    column: str,
    *,
    by: str = "optimizer",
    axes: Sequence[str] | None = None,
    seed_column: str = "seed",
) -> pd.DataFrame:
    """Compare the levels of one setting, seed by seed, at equal levels of all others.

    Args:
        models: Rows of the `models/` table; only those whose training came to an end are used.
        column: What to compare.
        by: The setting whose levels are compared.
        axes: The settings that make a configuration, `by` among them or not. None: all that vary.
        seed_column: The column that pairs models.

    Returns:
        One row per pair of levels and level of the other axes: the other axes, `first`, `second`, `quantity`, `epoch`,
        and the fields of `Spread` of first - second over the seeds that both have.

    Raises:
        RequestError: A column is missing or not numeric.
    """
    frames.check_columns(models, [by, seed_column], role="paired difference")
    table, names = _counted(models, [column], axes, seed_column)
    others = [name for name in names if name != by]
    values = table.assign(value=frames.numeric(table, column, role="paired difference"))
    values = values.assign(other=configurations.of(table, others, repeated=True).rows, level=frames.levels(table[by]))
    wide = values.pivot_table(index=["other", seed_column], columns="level", values="value", aggfunc="mean")
    said = values.drop_duplicates("level").set_index("level")[by]
    where = values.drop_duplicates("other").set_index("other")[others]
    rows = []
    for first, second in combinations(wide.columns, 2):
        for other, difference in (wide[first] - wide[second]).groupby(level="other", sort=False):
            one = spread(difference.to_numpy())
            if one.n:
                names_of = {"first": said[first], "second": said[second], "quantity": column, "epoch": _epoch(column)}
                fixed: dict[str, object] = {name: where[name][other] for name in others}
                rows.append(fixed | names_of | vars(one))
    fields = list(Spread.__dataclass_fields__)
    return pd.DataFrame(rows, columns=[*others, "first", "second", "quantity", "epoch", *fields])


def _counted(
    models: pd.DataFrame, columns: Sequence[str], axes: Sequence[str] | None, seed_column: str
) -> tuple[pd.DataFrame, list[str]]:
    frames.check_columns(models, [*columns, *(axes or ())], role="optimizer table")
    table = models[frames.kept(models)].reset_index(drop=True)
    left_out = {seed_column, *filter(frames.is_seed, table.columns)}
    names = independent(table, exclude={*columns, *left_out}) if axes is None else axes
    return table, [name for name in names if name not in left_out]


def _epoch(column: str) -> str:
    return "best on test" if column.startswith("best_") else "last"
