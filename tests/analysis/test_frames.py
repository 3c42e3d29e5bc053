"""Reading tables, joining measures, and telling settings from results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flatmin.analysis import frames
from flatmin.analysis.reading import read_table
from flatmin.errors import RequestError


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_is_read_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame({"width": [1, 2], "gap": [0.5, None], "name": ["a", "b"]})
    path = tmp_path / f"table{suffix}"
    if suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path)
    pd.testing.assert_frame_equal(read_table(path), table)
    pd.testing.assert_frame_equal(read_table(str(path)), table)


def test_a_directory_of_parquet_files_is_one_table(tmp_path: Path) -> None:
    for part in range(2):
        pd.DataFrame({"width": [part]}).to_parquet(tmp_path / f"{part}.parquet")
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert sorted(read_table(tmp_path)["width"]) == [0, 1]


def test_a_directory_without_parquet_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RequestError, match="there is no Parquet file in this directory"):
        read_table(tmp_path)


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "models.csv").write_text("a\n1\n")
    with pytest.raises(RequestError, match=r"model\.csv: no such file\. Did you mean '.*models\.csv'\?"):
        read_table(tmp_path / "model.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("table.xlsx", "x", r"cannot read \.xlsx.*\.csv, \.tsv, \.parquet"),
        ("table", "x", "cannot read a file without ending"),
        ("table.parquet", "not parquet", "not a readable .parquet table"),
        ("table.csv", "", "not a readable .csv table"),
        ("table.csv", "a,b\n", "has no rows"),
        ("table.csv", "a;b\n1,5;2\n", "parted by semicolons; write commas"),
        ("table.csv", "a\tb\n1\t2\n", r"parted by tabs; call it \.tsv"),
        ("table.tsv", "a,b\n1,2\n", r"parted by commas; call it \.csv"),
    ],
)
def test_files_that_are_no_tables_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=message):
        read_table(tmp_path / name)


def test_a_missing_column_names_the_nearest_and_all_valid_ones() -> None:
    table = pd.DataFrame({"gen_gap": [1.0], "width": [2]})
    with pytest.raises(RequestError) as caught:
        frames.check_columns(table, ["gen_gab"], role="target")
    assert str(caught.value) == (
        "target: the table has no column 'gen_gab'. Did you mean 'gen_gap'? Valid: gen_gap, width."
    )
    with pytest.raises(RequestError, match=r"no column 'zzz'\. Valid: gen_gap, width\.$"):
        frames.check_columns(table, ["zzz"], role="target")


@pytest.mark.parametrize(
    "column",
    [
        pd.Series([1, None, 3], dtype="Int64"),
        pd.Series([1.0, np.nan, 3.0]),
        pd.Series([1.0, np.inf, 3.0]),
        pd.Series([1.0, None, 3.0], dtype=object),
        pd.Series(["1", None, "3"]),
    ],
)
def test_null_and_infinity_become_nan(column: pd.Series[float]) -> None:
    np.testing.assert_array_equal(frames.numeric(pd.DataFrame({"x": column}), "x", role="measure"), [1.0, np.nan, 3.0])


def test_a_column_of_nulls_is_numeric() -> None:
    values = frames.numeric(pd.DataFrame({"x": [None, None]}), "x", role="target")
    assert values.dtype == np.float64
    assert np.isnan(values).all()


@pytest.mark.parametrize(
    "values",
    [["mlp", "cnn"], [1.0, "cnn"], [[1, 2], [3]], [pd.Timestamp("2026-01-01"), pd.Timestamp("2026-01-02")]],
)
def test_what_is_no_number_is_refused(values: list[object]) -> None:
    with pytest.raises(RequestError, match="measure: column 'x'"):
        frames.numeric(pd.DataFrame({"x": values}), "x", role="measure")


def test_only_our_own_statuses_filter_rows() -> None:
    ours = pd.DataFrame({"status": ["converged", "finished", "diverged", None]})
    assert frames.kept(ours).tolist() == [True, True, False, False]
    theirs = pd.DataFrame({"status": ["ok", "bad"]})
    assert frames.kept(theirs).all()
    assert frames.kept(pd.DataFrame({"width": [1, 2]})).all()


def test_axes_are_settings_that_vary() -> None:
    table = pd.DataFrame(
        {
            "model_id": ["a", "b"],
            "status": ["converged", "finished"],
            "width": [1, 2],
            "lr": [0.1, 0.1],
            "rho": [0.05, None],
            "milestones": [[1, 2], [1, 2]],
            "steps": [[1, 2], [3]],
            "seed": [0, 1],
            "noise_seed": [0, 1],
            "gen_gap": [0.1, 0.2],
            "lpf": [3.0, 4.0],
        }
    )
    assert frames.varying(table, exclude={"lpf"}) == ["width", "rho", "steps"]


def test_wide_takes_the_last_epoch_of_each_label() -> None:
    models = pd.DataFrame({"model_id": ["a", "b", "c"], "trial_id": ["t", "t", "u"]})
    sharpness = pd.DataFrame(
        [
            ("a", "t", 5, "lpf", 1.0),
            ("a", "t", 9, "lpf", 2.0),
            ("a", "t", 1, "lpf", 3.0),
            ("a", "t", 1, "trace", 4.0),
            ("b", "t", 9, "lpf", None),
            ("b", "other", 9, "trace", 9.0),
        ],
        columns=["model_id", "trial_id", "epoch", "label", "value"],
    )
    joined = frames.wide(models, sharpness)
    expected = models.assign(lpf=[2.0, np.nan, np.nan], trace=[4.0, np.nan, np.nan])
    pd.testing.assert_frame_equal(joined, expected)


def test_wide_leaves_out_what_was_measured_before_the_end() -> None:
    """`a` has ended with one of its measures, `b` with none."""
    models = pd.DataFrame({"model_id": ["a", "b"], "epochs_run": [9, 7]})
    sharpness = pd.DataFrame(
        [("a", 4, "lpf", 1.0), ("a", 9, "lpf", 2.0), ("a", 8, "trace", 3.0), ("b", 4, "lpf", 4.0)],
        columns=["model_id", "epoch", "label", "value"],
    )
    expected = models.assign(lpf=[2.0, np.nan], trace=[np.nan, np.nan])
    pd.testing.assert_frame_equal(frames.wide(models, sharpness), expected)


def test_wide_without_measures_is_the_models() -> None:
    models = pd.DataFrame({"model_id": ["a"]})
    pd.testing.assert_frame_equal(frames.wide(models, None), models)
    pd.testing.assert_frame_equal(frames.wide(models, pd.DataFrame()), models)


def test_a_label_may_not_hide_a_column() -> None:
    models = pd.DataFrame({"model_id": ["a"], "width": [1]})
    sharpness = pd.DataFrame({"model_id": ["a"], "label": ["width"], "value": [1.0]})
    with pytest.raises(RequestError, match="measure 'width' has the name of a column"):
        frames.wide(models, sharpness)


def test_values_come_in_order_with_null_last() -> None:
    assert frames.ordered(pd.Series([10, 9, None])) == [9, 10, None]
    assert frames.ordered(pd.Series(["b", "a", "b"])) == ["a", "b"]
    assert frames.ordered(pd.Series([2, "a"], dtype=object)) == [2, "a"]
    assert frames.ordered(pd.Series([[2], [1]])) == ["[1]", "[2]"]


@pytest.mark.parametrize(
    ("value", "null"),
    [(None, True), (float("nan"), True), (pd.NA, True), (pd.NaT, True), (0, False), ([], False)],
)
def test_null(value: object, null: bool) -> None:
    assert frames.is_null(value) is null
