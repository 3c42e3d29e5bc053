"""`correlate` on a results directory or on anybody's table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flatmin.analysis.correlation import Correlations, correlate
from flatmin.analysis.frames import read_table
from flatmin.errors import RequestError
from flatmin.results import Results


def correlate_table(
    table: str,
    *,
    target: str = "gen_gap",
    axes: Sequence[str] | None = None,
    measures: Sequence[str] | None = None,
    seed_column: str = "seed",
) -> Correlations:
    """Rank-correlate measures with a target.

    Args:
        table: A results directory, or a CSV or Parquet file with a row per model.
        target: The column to be predicted.
        axes: Settings that tell configurations apart; those that vary when None.
        measures: Columns or labels; all measures when None.
        seed_column: The column that tells runs of one configuration apart.

    Raises:
        RequestError: No such table or column, or one that is not numeric.
    """
    if (Path(table) / "results.json").exists():
        results = Results.open(table)
        models, sharpness = results.models(), results.sharpness()
        if models.empty:
            raise RequestError(f"'{table}' holds no trained model yet")
    else:
        models, sharpness = read_table(table), None
    return correlate(models, sharpness, target=target, axes=axes, measures=measures, seed_column=seed_column)
