"""Compaction: tables read as before, every row once, whoever writes, reads or is killed meanwhile."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console
from tests.orchestrator.conftest import fill

from flatmin import Results, compact, merged, scan
from flatmin.errors import CorruptFileWarning, ResultsError
from flatmin.lease import Lease
from flatmin.orchestrator.heal import heal

TRIALS = 6


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return with_curves(fill(tmp_path / "r", trials=TRIALS))


def with_curves(results: Results) -> Results:
    """Add the curves of three trials; of one of them twice, of which the first file's points count."""
    for number in (4, 0, 2):
        results.write("spectra", f"t{number:05d}", points(number, [1.0, 2.0]))
    results.write("spectra", "t00002-more", points(2, [7.0]))
    return results


def points(number: int, values: Sequence[float]) -> list[dict[str, Any]]:
    key = {"model_id": f"m{number:05d}a", "trial_id": f"t{number:05d}", "epoch": 4}
    return [{**key, "kind": "surface", "settings": "{}", "x": 0.5, "value": value} for value in values]


def tables(results: Results) -> dict[str, pa.Table]:
    return {table: results.table(table) for table in ("plan", *compact.TABLES)}


def files(results: Results, table: str) -> list[str]:
    return sorted(file.name for file in (results.path / table).glob("*.parquet"))


def test_tables_read_as_before_from_one_file_each(results: Results) -> None:
    before = tables(results)
    done = {one.table: (one.before, one.after) for one in compact.compact(results)}
    assert done == {"models": (6, 1), "epochs": (6, 1), "sharpness": (6, 1), "spectra": (4, 1)}
    assert tables(results) == before
    assert all(len(files(results, table)) == 1 for table in compact.TABLES)
    assert results.unreadable() == []
    assert {one.after for one in compact.compact(results)} == {1}
    assert tables(results) == before


def test_what_comes_later_takes_its_place_among_what_was_merged(results: Results, tmp_path: Path) -> None:
    plain = with_curves(fill(tmp_path / "plain", trials=TRIALS + 3))
    compact.compact(results)
    for table in ("models", "epochs", "sharpness", "plan"):
        for file in (plain.directory / table).glob("*.parquet"):
            if not results.holds(table, file.stem):
                (results.directory / table / file.name).write_bytes(file.read_bytes())
    assert tables(results) == tables(plain)
    compact.compact(results)
    assert tables(results) == tables(plain)
    assert len(files(results, "epochs")) == 1


def test_large_merged_files_stay_and_several_are_written(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tables(results)
    monkeypatch.setattr(compact, "TARGET_BYTES", 1)
    monkeypatch.setattr(compact, "_BATCH", 2)
    monkeypatch.setattr(compact, "SMALL_BYTES", 0)
    compact.compact(results)
    first = files(results, "epochs")
    assert len(first) == TRIALS / 2
    results.write("epochs", "t00003", [{"model_id": "m00003a", "trial_id": "t00003", "epoch": 9}])
    results.write("epochs", "t00001", [{"model_id": "m00001a", "trial_id": "t00001", "epoch": 9}])
    compact.compact(results)
    assert set(first) < set(files(results, "epochs"))
    again = results.table("epochs").to_pandas().groupby("trial_id")["epoch"].apply(list)
    assert again["t00003"] == again["t00001"] == [9]
    assert len(again["t00002"]) == 8
    assert results.table("models") == before["models"]


def test_a_file_that_is_written_again_stands_in_for_its_old_rows(results: Results) -> None:
    before = results.table("epochs")
    compact.compact(results)
    results.write("epochs", "t00001", [{"model_id": "m00001a", "trial_id": "t00001", "epoch": 77}])
    for _ in range(2):
        rows = results.table("epochs")
        assert len(rows) == len(before) - 8 + 1
        assert 77 in rows["epoch"].to_pylist()
        compact.compact(results)


def test_trials_that_are_not_committed_are_let_alone(results: Results) -> None:
    results.write("epochs", "t99999", [{"model_id": "m", "trial_id": "t99999", "epoch": 1}])
    compact.compact(results)
    assert files(results, "epochs")[-1] == "t99999.parquet"
    assert not results.holds("models", "t99999")
    assert results.holds("models", "t00001")


def test_the_first_of_two_trials_of_a_model_is_the_same_one_after_all(results: Results) -> None:
    row = results.table("models").to_pylist()[3]
    results.write("models", "t00001-", [{"model_id": row["model_id"], "trial_id": "a", "study": "made-up"}])
    compact.compact(results)
    results.write("models", "s", [{"model_id": row["model_id"], "trial_id": "s", "study": "made-up"}])
    by_id = {found["model_id"]: found["trial_id"] for found in results.table("models").to_pylist()}
    assert by_id[row["model_id"]] == "s", "by name it comes before those that are merged"


def test_rows_are_taken_out_of_merged_files(results: Results) -> None:
    before = results.table("models")
    compact.compact(results)
    compact.forget(results, "models", ["t00001", "t00004"])
    left = results.table("models")
    assert set(before["trial_id"].to_pylist()) - set(left["trial_id"].to_pylist()) == {"t00001", "t00004"}
    assert not results.holds("models", "t00001")
    assert set(results.table("epochs")["trial_id"].to_pylist()) == set(left["trial_id"].to_pylist())


def test_a_damaged_merged_file_is_made_again(results: Results) -> None:
    (results.path / "checkpoints").mkdir()
    compact.compact(results)
    (file,) = (results.directory / "epochs").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.warns(CorruptFileWarning, match=r"epochs/merged-\w+\.parquet cannot be read"):
        assert len(results.read("epochs")) == 0
    assert [found[:2] for found in results.unreadable()] == [("epochs", file)]
    heal(results, Console(quiet=True))
    assert scan.names(results.path, "models") == set(), "its trials are to be trained again"
    assert results.unreadable() == []
    fill(results.directory, trials=1)
    assert len(results.table("epochs")) == 8


def test_the_file_that_says_what_counts_is_not_guessed(results: Results) -> None:
    compact.compact(results)
    (results.directory / "merged.json").write_text("{")
    with pytest.raises(ResultsError, match=r"merged\.json' cannot be read"):
        results.read("models")


KILLED = """
import os, shutil, sys
from pathlib import Path
from flatmin import Results, compact
compact.TABLES = ("models", "epochs")
root, work = Path(sys.argv[1]), Path(sys.argv[2])
for moment in range(10_000):
    place = work / str(moment)
    shutil.copytree(root, place)
    child = os.fork()
    if not child:
        left = moment
        def hook(event, arguments):
            global left
            writes = event in {"os.rename", "os.remove"} or (event == "open" and arguments[2] & os.O_ACCMODE)
            if writes and str(place) in str(arguments[0]):
                left -= 1
                if left < 0:
                    os._exit(9)
        sys.addaudithook(hook)
        compact.compact(Results(place))
        os._exit(0)
    if not os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        print(moment)
        break
"""


def test_killed_before_each_of_its_file_operations_it_has_lost_and_doubled_nothing(tmp_path: Path) -> None:
    results = fill(tmp_path / "r", trials=2, epochs=1)
    before = tables(results)
    command = [sys.executable, "-c", KILLED, str(results.path), str(tmp_path / "work")]
    moments = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert moments > 15, "what is written, renamed and deleted of two tables"
    for moment in range(moments):
        killed = Results(tmp_path / "work" / str(moment))
        assert tables(killed) == before, moment
        if moment % 5 == 0:
            compact.compact(killed)
            assert tables(killed) == before, moment
            assert not list(killed.directory.rglob("*.tmp"))
            assert {len(files(killed, table)) for table in compact.TABLES} == {0, 1}, moment


WRITE = """
import sys
from pathlib import Path
from flatmin import Results
results = Results(Path(sys.argv[1]))
for number in range(60):
    trial = f"{number:016x}"
    key = {"model_id": f"m{number}", "trial_id": trial}
    results.write("epochs", trial, [{**key, "epoch": epoch} for epoch in (1, 2)])
    results.write("sharpness", trial, [])
    results.write("models", trial, [{**key, "study": "made-up", "epochs_run": 2}])
"""
MERGE = """
import sys
from pathlib import Path
from flatmin import Results, compact
while sys.stdin.read(1):
    compact.compact(Results(Path(sys.argv[1])))
    print(flush=True)
"""


def test_read_all_the_while_rows_only_come_and_none_is_seen_twice(tmp_path: Path) -> None:
    results = Results.create(tmp_path / "r", "made-up")
    command = [sys.executable, "-c"]
    writer = subprocess.Popen([*command, WRITE, str(results.path)])
    merging = [
        subprocess.Popen([*command, MERGE, str(results.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    seen, merges = set[str](), 0
    while True:
        last = writer.poll() is not None
        for one in merging:
            assert one.stdin is not None
            one.stdin.write(b"x")
            one.stdin.flush()
        models = results.read("models")["model_id"].to_pylist()
        epochs = results.table("epochs")
        pairs = list(zip(epochs["model_id"].to_pylist(), epochs["epoch"].to_pylist(), strict=True))
        assert len(set(models)) == len(models)
        assert len(set(pairs)) == len(pairs)
        assert seen <= set(models), "a model was there and is there no more"
        assert {(model, epoch) for model in models for epoch in (1, 2)} <= set(pairs)
        seen = set(models)
        merges += 1
        if last:
            break
    for one in merging:
        said, _ = one.communicate()
        assert one.returncode == 0
        assert said.count(b"\n") == merges
    assert len(seen) == 60
    assert merges > 1
    compact.compact(results)
    assert len(files(results, "models")) == len(merged.read(results.path).of("models")) == 1


def test_a_launch_merges_by_itself_only_where_there_are_very_many(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    compact.compact_many(results)
    assert len(files(results, "models")) == TRIALS
    monkeypatch.setattr(compact, "MANY", TRIALS)
    compact.compact_many(results)
    assert len(files(results, "models")) == 1


def test_on_a_file_system_without_locks_nothing_is_merged_and_all_else_goes_on(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre mounted with `noflock`."""

    def flock(handle: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("flatmin.files.fcntl.flock", flock)
    monkeypatch.setattr(compact, "MANY", 1)
    with Lease(results):
        compact.compact_many(results)
        assert len(files(results, "models")) == TRIALS
        compact.forget(results, "models", [next(iter(files(results, "models"))).removesuffix(".parquet")])
    assert len(files(results, "models")) == TRIALS - 1
    with pytest.raises(ResultsError, match="has no locks"):
        compact.compact(results)
