"""Which models make which line of a figure over epochs."""

from __future__ import annotations

import pandas as pd

from flatmin.analysis import frames


def owners(models: pd.DataFrame, rows: pd.DataFrame, axis: str | None, most: int) -> pd.DataFrame:
    """Find the line of every model.

    Args:
        models: Rows of the `models/` table; only those whose training came to an end are used.
        rows: The rows to be drawn, which name their models.
        axis: The setting that makes the lines, of at most `most` evenly spread values. None: one line.
        most: How many lines at most.

    Returns:
        What rows and models have in common of `model_id` and `trial_id`, and the `line`: the setting's value.

    Raises:
        RequestError: A column is missing.
    """
    frames.check_columns(models, ["model_id", *([axis] if axis else [])], role="figure")
    table = models[frames.kept(models)]
    line = frames.hashable(table[axis]) if axis else pd.Series("all models", index=table.index)
    keys = [key for key in ("model_id", "trial_id") if key in rows.columns and key in table.columns]
    found = table[keys].assign(line=line)
    return found[line.isin(frames.spread(frames.ordered(line), most))] if axis else found
