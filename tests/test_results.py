"""The results store: atomic files, commits, schema, corrupt files, leases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from flatmin import lease
from flatmin.errors import CorruptFileWarning, LeaseLost, ResultsError
from flatmin.files import write_atomically
from flatmin.lease import Lease
from flatmin.orchestrator.heal import heal
from flatmin.results import Results
from flatmin.tables import ADDED, TABLES, fixed_columns, schema, to_arrow


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results.create(tmp_path / "r", "tiny")


def model_row(model_id: str, trial_id: str, **changes: Any) -> dict[str, Any]:
    return {"model_id": model_id, "trial_id": trial_id, "study": "tiny", "status": "finished", **changes}


def test_undefined_values_are_null_never_nan() -> None:
    table = to_arrow(
        [{"model_id": "a", "value": float("nan")}, {"model_id": "b", "value": float("inf")}],
        schema("sharpness"),
    )
    assert table["value"].to_pylist() == [None, None]
    assert table["value"].null_count == 2


def test_a_column_that_is_not_declared_is_refused() -> None:
    with pytest.raises(KeyError, match="valeu"):
        to_arrow([{"model_id": "a", "valeu": 1.0}], schema("sharpness"))


@pytest.mark.parametrize("table", TABLES)
def test_columns_are_those_of_the_design(table: str) -> None:
    expected = {
        "plan": "model_id study planned_at",
        "models": "model_id trial_id study status epochs_run n_params train_loss train_acc train_acc_clean "
        "val_loss val_acc test_loss test_acc best_test_acc best_test_epoch gen_gap loss_gap label_flip_rate seconds "
        "device host started_at execution train_dice val_dice test_dice",
        "epochs": "model_id trial_id epoch train_loss train_acc val_loss val_acc test_loss test_acc lr seconds "
        "train_dice val_dice test_dice",
        "sharpness": "model_id trial_id epoch measure label value stderr samples passes converged metric seconds "
        "settings",
        "spectra": "model_id trial_id epoch kind settings x y value",
        "failures": "model_id trial_id attempt host error traceback at",
    }[table]
    assert fixed_columns(table) == expected.split()


def test_a_file_from_before_a_column_was_added_is_read(results: Results) -> None:
    results.write("models", "t1", [model_row("a", "t1")])
    results.write("epochs", "t1", [{"model_id": "a", "trial_id": "t1", "epoch": 1}])
    for table in ("models", "epochs"):
        file = results.table_file(table, "t1")
        pq.write_table(pq.read_table(file).drop_columns(list(ADDED)), file)
    results.write("epochs", "t2", [{"model_id": "a", "trial_id": "t1", "epoch": 2, "test_dice": 0.5}])
    assert results.unreadable() == []
    assert list(results.epochs().columns) == fixed_columns("epochs")
    assert results.epochs()["test_dice"].isna().tolist() == [True, False]
    assert results.models()["train_dice"].isna().all()


def test_rows_without_a_commit_do_not_count(results: Results) -> None:
    results.write("models", "t1", [model_row("a", "t1")])
    results.write("epochs", "t1", [{"model_id": "a", "trial_id": "t1", "epoch": 1}])
    results.write("epochs", "t2", [{"model_id": "b", "trial_id": "t2", "epoch": 1}])
    results.write("sharpness", "t2", [{"model_id": "b", "trial_id": "t2", "epoch": 1, "label": "lpf"}])
    assert results.epochs()["model_id"].tolist() == ["a"]
    assert results.sharpness().empty


def test_a_model_or_measure_written_twice_counts_once(results: Results) -> None:
    for trial in ("t1", "t2"):
        results.write("models", trial, [model_row("a", trial)])
    for name in ("t1", "t1-more"):
        results.write(
            "sharpness", name, [{"model_id": "a", "trial_id": "t1", "epoch": 1, "label": "lpf", "value": 2.0}]
        )
    assert len(results.models()) == 1
    assert len(results.sharpness()) == 1


def points(trial: str, values: list[float], *, kind: str = "surface", model: str = "a") -> list[dict[str, Any]]:
    row = {"model_id": model, "trial_id": trial, "epoch": 1, "kind": kind, "settings": "{}"}
    return [{**row, "x": float(x), "y": None, "value": value} for x, value in enumerate(values)]


def test_curves_count_once_and_with_their_commit(results: Results) -> None:
    results.write("models", "t1", [model_row("a", "t1")])
    results.write("spectra", "t1", [*points("t1", [1.0, 1.0, 2.0]), *points("t1", [7.0], kind="fourier")])
    results.write("spectra", "t1-more", [*points("t1", [8.0, 9.0, 9.0, 9.0]), *points("t1", [5.0], kind="density")])
    results.write("spectra", "t2", points("t2", [3.0], model="b"))
    results.write("spectra", "t0", points("t0", [4.0, 4.0]))
    frame = results.spectra()
    found = [(row.model_id, row.kind, row.x, row.value) for row in frame.itertuples()]
    surface = [("a", "surface", float(x), value) for x, value in enumerate([8.0, 9.0, 9.0, 9.0])]
    assert sorted(found) == sorted([*surface, ("a", "fourier", 0.0, 7.0), ("a", "density", 0.0, 5.0)])
    assert list(frame.columns) == fixed_columns("spectra")


def test_no_curves_have_their_columns_all_the_same(results: Results) -> None:
    assert list(results.spectra().columns) == fixed_columns("spectra")


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    write_atomically(file, b"old")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(file, fail)
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_writer_left_is_cleared_on_the_next_launch(results: Results) -> None:
    (results.path / "models").mkdir()
    left = results.path / "models" / ".t1.parquet.999.tmp"
    left.write_bytes(b"half")
    Results.create(results.path, "tiny")
    assert left.exists(), "without the lease it may be a live worker's"
    heal(results, Console(quiet=True))
    assert not left.exists()


def test_a_truncated_file_is_named_and_left_out(results: Results) -> None:
    results.write("models", "t1", [model_row("a", "t1")])
    results.write("models", "t2", [model_row("b", "t2")])
    broken = results.table_file("models", "t1")
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.warns(CorruptFileWarning, match=r"models/t1\.parquet cannot be read"):
        models = results.models()
    assert models["model_id"].tolist() == ["b"]
    assert [found[:2] for found in results.unreadable()] == [("models", broken)]


def test_damage_inside_a_file_is_found_too(results: Results) -> None:
    results.write("models", "t1", [model_row("a", "t1", execution="x" * 5000)])
    file = results.table_file("models", "t1")
    content = bytearray(file.read_bytes())
    content[4:60] = bytes(56)
    file.write_bytes(content)
    assert [table for table, *_ in results.unreadable()] == ["models"]


@pytest.mark.parametrize(("version", "word"), [(0, "an older"), (99, "a newer")])
def test_another_schema_is_refused(results: Results, version: int, word: str) -> None:
    header = json.loads(results.header_file.read_text())
    results.header_file.write_text(json.dumps({**header, "schema": version}))
    with pytest.raises(ResultsError, match=f"{word} schema"):
        Results.open(results.path)
    with pytest.raises(ResultsError, match=f"{word} schema"):
        Results.create(results.path, "tiny")


def test_directories_that_cannot_be_used_are_refused(results: Results, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="holds the study 'tiny', not 'other'"):
        Results.create(results.path, "other")
    with pytest.raises(ResultsError, match="no results directory"):
        Results.open(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ResultsError, match="not a results directory"):
        Results.open(tmp_path / "full")
    with pytest.raises(ResultsError, match="is not empty"):
        Results.create(tmp_path / "full", "tiny")
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="cannot be written"):
        Results.create(tmp_path / "file" / "r", "tiny")


def test_parquet_files_carry_the_types_of_the_settings(results: Results) -> None:
    from flatmin.plugins import program_arguments

    arguments = program_arguments({"dataset": "digits", "network": "mlp", "optimizer": "sgd"})
    results.write("models", "t1", [model_row("a", "t1", lr=1.0, width=3, milestones=(1, 2), nesterov=True)], arguments)
    read = pq.read_schema(results.table_file("models", "t1"))
    kinds = {
        name: str(read.field(name).type) for name in ("lr", "width", "milestones", "nesterov", "schedule", "init_seed")
    }
    assert kinds == {
        "lr": "double",
        "width": "int64",
        "milestones": "list<element: int64>",
        "nesterov": "bool",
        "schedule": "string",
        "init_seed": "int64",
    }


def test_a_second_driver_is_told_who_owns_the_directory(results: Results) -> None:
    with (
        Lease(results),
        pytest.raises(ResultsError, match=f"in use by process {os.getpid()}"),
        Lease(results),
    ):
        pass
    with Lease(results):
        pass  # the first one gave it back


def test_of_drivers_that_start_at_once_one_gets_the_lease(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """All have read that nobody has it before the first of them writes."""
    all_have_read, of_thread, read = threading.Barrier(4, timeout=20), threading.local(), lease._read
    got, refused = list[Lease](), list[str]()

    def read_together(of: Results) -> Any:
        found = read(of)
        if not hasattr(of_thread, "waited"):
            of_thread.waited = True
            all_have_read.wait()
        return found

    def start() -> None:
        try:
            got.append(Lease(results).__enter__())
        except ResultsError as error:
            refused.append(str(error))

    monkeypatch.setattr(lease, "_read", read_together)
    drivers = [threading.Thread(target=start) for _ in range(4)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    for one in got:
        one.__exit__(None, None, None)
    assert len(got) == 1
    assert len(refused) == 3
    assert all("taken by another driver just now" in said for said in refused)


def test_a_dead_drivers_lease_is_taken_over_and_its_workers_cannot_commit(results: Results) -> None:
    code = (
        "import os, sys; from pathlib import Path;"
        "from flatmin.results import Results; from flatmin.lease import Lease;"
        "lease = Lease(Results(Path(sys.argv[1]))); lease.__enter__(); print(lease.token, flush=True); os._exit(9)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(results.path)], capture_output=True, text=True, check=False)
    old = died.stdout.strip()
    lease.check(results, old)
    with Lease(results) as mine:
        lease.check(results, mine.token)
        with pytest.raises(LeaseLost):
            lease.check(results, old)


def test_a_lease_of_another_host_runs_out_with_its_heartbeat(results: Results) -> None:
    content = {
        "token": "t",
        "host": "elsewhere",
        "pid": 1,
        "started_at": "2026-01-01T00:00:00+00:00",
        "max_failures": 0,
        "released": False,
    }
    results.lease_file.write_text(json.dumps({**content, "heartbeat": time.time()}))
    with pytest.raises(ResultsError, match="on elsewhere"), Lease(results):
        pass
    results.lease_file.write_text(json.dumps({**content, "heartbeat": time.time() - lease.EXPIRY_SECONDS - 1}))
    with Lease(results):
        pass


def test_a_driver_that_lost_its_lease_notices(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.01)
    with Lease(results) as mine:
        held = json.loads(results.lease_file.read_text())
        deadline = time.monotonic() + 5
        while not mine.lost and time.monotonic() < deadline:
            write_atomically(results.lease_file, json.dumps({**held, "token": "other"}).encode())
            time.sleep(0.02)
        with pytest.raises(LeaseLost):
            mine.raise_if_lost()
    assert json.loads(results.lease_file.read_text())["token"] == "other", "what is another's is not given back"
