"""Where a curve has its inner peak, and the sentence about it."""

from __future__ import annotations

import pandas as pd
import pytest

from flatmin.analysis import peak


def curve(mean: list[float], *, std: float | None = 0.01, n: int = 5) -> pd.DataFrame:
    return pd.DataFrame(
        {"axis": "width", "quantity": "test_error", "x": [2**i for i in range(len(mean))], "mean": mean}
    ).assign(std=std if std is not None else float("nan"), n=n)


def test_the_peak_stands_between_two_valleys() -> None:
    found = peak.find_peak(curve([0.8, 0.3, 0.2, 0.4, 0.5, 0.3, 0.1]))
    assert found is not None
    assert (found.x, found.value) == (16, 0.5)
    assert (found.before, found.after) == ((4, 0.2), (64, 0.1))
    assert found.height == pytest.approx(0.3)
    assert found.clear is True


def test_rows_may_come_in_any_order() -> None:
    rows = curve([0.8, 0.2, 0.5, 0.1])
    assert peak.find_peak(rows) == peak.find_peak(rows.sample(frac=1, random_state=0))


@pytest.mark.parametrize("mean", [[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3], [0.4, 0.1, 0.4], [0.1, 0.2], [0.2] * 4, []])
def test_a_curve_with_at_most_one_valley_has_no_peak(mean: list[float]) -> None:
    assert peak.find_peak(curve(mean)) is None


def test_a_peak_within_the_spread_is_not_clear() -> None:
    found = peak.find_peak(curve([0.4, 0.20, 0.21, 0.1], std=0.05))
    assert found is not None
    assert found.clear is False
    said = peak.sentence(curve([0.4, 0.20, 0.21, 0.1], std=0.05))
    assert said.startswith("Test error goes from 0.4 at width 1 to 0.1 at width 8, lowest at 8 (mean 0.1;")
    assert "no peak in between stands clear" in said


def test_the_sentence_has_the_numbers() -> None:
    assert peak.sentence(curve([0.8, 0.2, 0.5, 0.1])) == (
        "Test error peaks at width 4 (mean 0.5): it has a first minimum of 0.2 at width 2, and falls again "
        "to 0.1 at width 8 (5 models at each width)."
    )


def test_unequal_numbers_of_models_are_told() -> None:
    rows = curve([0.8, 0.2, 0.5, 0.1])
    rows.loc[0, "n"] = 3
    assert "(3 models or more at each width)" in peak.sentence(rows)


def test_single_models_have_no_spread() -> None:
    rows = curve([0.8, 0.2, 0.5, 0.1], std=None, n=1)
    found = peak.find_peak(rows)
    assert found is not None
    assert found.clear is None
    assert peak.sentence(rows).endswith("There is one model per value, so the spread is unknown.")


def test_two_points_say_nothing() -> None:
    assert peak.sentence(curve([0.5, 0.1])) == ""
