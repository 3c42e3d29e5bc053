"""Which rows repeat a configuration, which configurations differ in one axis, and means that tie."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from flatmin.analysis import configurations, frames


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "rho": [0.1, 0.1 + 1e-12, None, None, 0.1, 0.2],
            "steps": [[1, 2], [1, 2], [1, 2], [3], [3], [3]],
            "seed": [0, 1, 0, 0, 0, 0],
        }
    )


def test_rows_of_one_configuration_are_found_in_their_order(table: pd.DataFrame) -> None:
    found = configurations.of(table, ["rho", "steps"], repeated=True)
    assert found.rows.tolist() == [0, 0, 1, 2, 3, 4]
    assert found.levels.tolist() == [[0, 0], [2, 0], [2, 1], [0, 1], [1, 1]]
    assert found.seeds(32).tolist() == [[0, 1], [2, -1], [3, -1], [4, -1], [5, -1]]
    assert found.seeds(1).tolist() == [[0], [2], [3], [4], [5]]


def test_groups_differ_in_one_axis(table: pd.DataFrame) -> None:
    found = configurations.of(table, ["rho", "steps"], repeated=True)
    assert [sorted(map(sorted, group.tolist())) for group in found.groups(0)] == [[[0, 1]], [[2, 3, 4]]]
    assert [sorted(map(sorted, group.tolist())) for group in found.groups(1)] == [[[4]], [[0, 3], [1, 2]]]


def test_some_rows_keep_the_order_of_their_configurations(table: pd.DataFrame) -> None:
    part = configurations.of(table, ["rho", "steps"], repeated=True).take(np.array([0, 1, 0, 0, 1, 1], dtype=np.bool_))
    assert part.rows.tolist() == [0, 1, 2]
    assert part.levels.tolist() == [[0, 0], [0, 1], [1, 1]]


@pytest.mark.parametrize(("repeated", "count"), [(True, 1), (False, 6)])
def test_without_axes_all_rows_are_one_configuration_or_each_is_one(
    table: pd.DataFrame, repeated: bool, count: int
) -> None:
    found = configurations.of(table, [], repeated=repeated)
    assert (len(found), found.sizes.sum()) == (count, 6)


def test_means_that_are_equal_tie() -> None:
    found = configurations.of(pd.DataFrame({"width": [1, 1, 1, 2, 2, 2, 3]}), ["width"], repeated=True)
    values = np.array([0.1, 0.2, 0.3, 0.2, 0.2, 0.2, 1.0 - 0.8])
    assert len(set((values[:3].mean(), values[3:6].mean(), values[6]))) == 2
    assert len(set(found.means(values).tolist())) == 1
    np.testing.assert_allclose(found.means(values * 1e-9), 2e-10, rtol=1e-11)


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([0.1, np.float64(np.float32(0.1)), 0.2, None], [0, 0, 1, 2]),
        ([1e-300, 0.0, -1e-300], [2, 1, 0]),
        ([1_000_000.0, 1_000_001.0, None], [0, 1, 2]),
        (["b", None, "a", "b"], [0, 2, 1, 0]),
        ([[1], [2], [1]], [0, 1, 0]),
        ([True, False, True], [0, 1, 0]),
        ([None, None], [0, 0]),
        ([1, "1", None], [0, 1, 2]),
    ],
)
def test_levels(values: list[object], levels: list[int]) -> None:
    assert frames.levels(pd.Series(values)).tolist() == levels
