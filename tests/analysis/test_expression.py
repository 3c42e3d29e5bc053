"""Filters: which rows they let pass, and what they say about what they cannot read."""

from __future__ import annotations

import pandas as pd
import pytest

from flatmin.analysis.expression import matches
from flatmin.errors import RequestError


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "train_loss": [0.1, 0.001, None, 0.01],
            "gen.gap": [1, 2, 3, 4],
            "optimizer": ["sgd", "sam", None, "sgd"],
            "lpf(sigma=0.002)": [1.0, 2.0, 3.0, float("inf")],
            "is.converged": [True, False, True, True],
            "stop": pd.array([0.01, None, 0.01, 0.01], dtype="Float64"),
        }
    )


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ("train_loss <= 0.01", [1, 3]),
        (" train_loss<=1e-2 ", [1, 3]),
        ("0.01 >= train_loss", [1, 3]),
        ("train_loss > -1", [0, 1, 3]),
        ("gen.gap != 2 and optimizer == 'sgd'", [0, 3]),
        ("gen.gap == 2 or (gen.gap > 2 and gen.gap < 4)", [1, 2]),
        ("not gen.gap < 3", [2, 3]),
        ("1 < gen.gap <= 3", [1, 2]),
        ("lpf(sigma=0.002) >= 2", [1, 2, 3]),
        ("optimizer != 'sgd'", [1]),
        ("train_loss <= stop", [3]),
        ("`is.converged` == True and `gen.gap` > 1", [2, 3]),
    ],
)
def test_rows_that_pass(table: pd.DataFrame, expression: str, rows: list[int]) -> None:
    assert matches(table, expression).nonzero()[0].tolist() == rows


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("train_los < 1", r"filter 'train_los < 1': the table has no column 'train_los'\. Did you mean 'train_loss'\?"),
        ("optimizer == sgd", "no column 'sgd'"),
        ("train_loss = 1", "it cannot be read.*train_loss <= 0.01"),
        ("train_loss <= 0.01 and", "it cannot be read"),
        ("", "it cannot be read"),
        ("train_loss", "'train_loss' is no comparison"),
        ("__import__('os').remove('x')", "is no comparison"),
        ("__import__('os').getpid() > 1", "no column '__import__"),
        ("train_loss in [1]", "is no comparison"),
        ("train_loss < [1]", "no column"),
        ("1 < 2", "compares two values, and no column"),
        ("optimizer < 3", "'optimizer < 3' compares numbers with something else"),
        ("(" * 300 + "train_loss < 1" + ")" * 300, "it cannot be read"),
    ],
)
def test_what_cannot_be_read_is_said(table: pd.DataFrame, expression: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        matches(table, expression)
