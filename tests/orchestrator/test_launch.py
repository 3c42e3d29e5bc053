"""Launch, in this process: exactly once, grown grids, new measures, corrupt files, failures, budgets."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flatmin import files
from flatmin.errors import RequestError, ResultsError
from flatmin.lease import Lease
from flatmin.orchestrator.inspect import query, status
from flatmin.orchestrator.launch import Launched, LaunchOptions, launch, measure
from flatmin.orchestrator.runner import RunOptions
from flatmin.results import Results

Write = Callable[..., Path]
NOT_COMPARED = ["seconds", "started_at", "execution"]


def go(study: Path, results: Path, *overrides: str, **run: Any) -> tuple[Launched, str]:
    console = Console(file=StringIO(), width=200)
    done = launch(str(study), results, overrides, LaunchOptions(run=RunOptions(**run), inline=True), console)
    return done, console.file.getvalue()  # type: ignore[attr-defined]


def snapshot(results: Path) -> list[Any]:
    opened = Results.open(results)
    models = opened.models().drop(columns=NOT_COMPARED).sort_values("model_id", ignore_index=True)
    epochs = opened.epochs().drop(columns="seconds").sort_values(["model_id", "epoch"], ignore_index=True)
    sharpness = opened.sharpness().drop(columns="seconds").sort_values(["model_id", "label"], ignore_index=True)
    return [models, epochs, sharpness]


def equal(one: list[Any], other: list[Any]) -> bool:
    return all(a.equals(b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def study(write_study: Write) -> Path:
    return write_study(write_study().read_text() + "measures: [lpf(max_samples=16), lambda_max]\n")


def test_every_model_once_with_all_its_rows(study: Path, tmp_path: Path) -> None:
    done, _ = go(study, tmp_path / "r")
    assert (done.trained, done.remaining, done.exit_code) == (4, 0, 0)
    results = Results.open(tmp_path / "r")
    models = results.models()
    assert sorted(models["model_id"]) == sorted(results.plan()["model_id"])
    assert models["status"].tolist() == ["finished"] * 4
    assert models["gen_gap"].tolist() == pytest.approx((models["train_acc"] - models["test_acc"]).tolist())
    assert models["loss_gap"].tolist() == pytest.approx((models["test_loss"] - models["train_loss"]).tolist())
    assert len(results.epochs()) == 16
    assert sorted(results.sharpness()["label"].unique()) == ["lambda_max", "lpf(max_samples=16)"]
    assert len(results.sharpness()) == 8
    for trial_id in models["trial_id"].unique():
        assert results.weights_file(trial_id).exists()


def test_a_second_launch_trains_nothing(study: Path, tmp_path: Path) -> None:
    go(study, tmp_path / "r")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "r").rglob("*.parquet")}
    done, _ = go(study, tmp_path / "r")
    assert (done.trained, done.measured, done.remaining) == (0, 0, 0)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "r").rglob("*.parquet")} == before


def test_a_grid_may_grow(study: Path, tmp_path: Path) -> None:
    go(study, tmp_path / "r")
    before = snapshot(tmp_path / "r")[0]
    done, _ = go(study, tmp_path / "r", "seeds=3")
    assert done.trained == 2
    after = snapshot(tmp_path / "r")[0]
    assert len(after) == 6
    kept = after[after["model_id"].isin(before["model_id"])].reset_index(drop=True)
    assert kept.equals(before)


def test_new_measures_are_computed_from_saved_weights(study: Path, tmp_path: Path) -> None:
    """They are the values that a launch with those measures would have given."""
    go(study, tmp_path / "later", "measures=lambda_max")
    done, _ = go(study, tmp_path / "later")
    assert (done.trained, done.measured) == (0, 4)
    go(study, tmp_path / "at once")
    assert equal(snapshot(tmp_path / "later"), snapshot(tmp_path / "at once"))


def test_measures_under_way_of_trained_models_cannot_be_had(study: Path, tmp_path: Path) -> None:
    go(study, tmp_path / "r", "width=2", "seeds=1")
    done, told = go(study, tmp_path / "r", "width=2", "measure_every=1")
    assert done.trained == 1
    assert "measure_every: 1 models that are there were measured at their end alone" in told
    _, told = go(study, tmp_path / "r2", "width=2", "seeds=1", "measure_every=1")
    assert "measure_every" not in told
    _, told = go(study, tmp_path / "r2", "width=2", "seeds=1", "measure_every=1")
    assert "measure_every" not in told


def test_measure_adds_to_trained_models(study: Path, tmp_path: Path) -> None:
    go(study, tmp_path / "r", "measures=lambda_max")
    console = Console(file=StringIO())
    done = measure(tmp_path / "r", ["lpf(max_samples=16)"], LaunchOptions(inline=True), console)
    assert (done.measured, done.remaining) == (4, 0)
    go(study, tmp_path / "at once")
    assert equal(snapshot(tmp_path / "r"), snapshot(tmp_path / "at once"))
    again = measure(tmp_path / "r", ["lambda_max"], LaunchOptions(inline=True), console)
    assert (again.measured, again.remaining) == (0, 0)


@pytest.mark.parametrize("table", ["models", "epochs", "sharpness", "plan"])
def test_a_corrupt_file_is_made_again(study: Path, tmp_path: Path, table: str) -> None:
    go(study, tmp_path / "r")
    before = snapshot(tmp_path / "r")
    file = next((tmp_path / "r" / table).glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:100])
    _, said = go(study, tmp_path / "r")
    assert f"{file} cannot be read" in said
    assert equal(snapshot(tmp_path / "r"), before)
    assert len(Results.open(tmp_path / "r").plan()) == 4


def test_a_huge_learning_rate_is_a_result(study: Path, tmp_path: Path) -> None:
    done, _ = go(study, tmp_path / "r", "lr=1e6,0.05", "width=4")
    assert done.exit_code == 0
    models = Results.open(tmp_path / "r").models()
    assert dict(zip(models["lr"], models["status"], strict=True)) == {1e6: "diverged", 0.05: "finished"}
    sharpness = Results.open(tmp_path / "r").sharpness()
    assert set(sharpness["model_id"]) == set(models["model_id"][models["status"] == "finished"])
    assert go(study, tmp_path / "r", "lr=1e6,0.05", "width=4")[0].trained == 0


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "sam-sgd"])
def test_a_huge_learning_rate_diverges_whatever_the_optimizer(
    write_study: Write, tmp_path: Path, optimizer: str
) -> None:
    go(write_study(), tmp_path / "r", "lr=1e6", f"optimizer={optimizer}", "epochs=30")
    assert set(Results.open(tmp_path / "r").models()["status"]) == {"diverged"}


def test_a_failing_trial_is_tried_again_and_the_others_go_on(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plug-in that raises for one width: its models fail, with every attempt written down."""
    from flatmin.trainables import trainer

    builder = trainer.network_builder

    def broken(program: Any, *shape: Any) -> Any:
        if program["width"] == 2:
            raise ZeroDivisionError("a bug of the plug-in")
        return builder(program, *shape)

    monkeypatch.setattr("flatmin.trainables.job.network_builder", broken)
    done, said = go(study, tmp_path / "r", max_failures=1)
    assert (done.trained, done.remaining, done.exit_code) == (2, 2, 1)
    assert "ZeroDivisionError: a bug of the plug-in" in said
    results = Results.open(tmp_path / "r")
    failures = results.failures()
    assert sorted(failures["attempt"]) == [1, 1, 2, 2]
    assert failures["traceback"].str.contains("ZeroDivisionError").all()
    assert (status(results).failed, status(results).remaining) == (2, 0)
    with Lease(results, 1):  # another launch tries them afresh
        assert (status(results).failed, status(results).remaining) == (0, 2)
    assert (status(results).failed, status(results).remaining) == (2, 0)
    monkeypatch.undo()
    assert go(study, tmp_path / "r")[0].exit_code == 0
    assert status(results).finished == 4


def test_time_budget(study: Path, tmp_path: Path) -> None:
    done, _ = go(study, tmp_path / "r", time_budget=0.0)
    assert done.exit_code == 3
    assert done.remaining == 4
    assert go(study, tmp_path / "r")[0].exit_code == 0


def test_another_studys_directory_is_refused(study: Path, write_study: Write, tmp_path: Path) -> None:
    go(study, tmp_path / "r")
    other = write_study(study.read_text().replace("study: tiny", "study: other"))
    with pytest.raises(ResultsError, match="holds the study 'tiny', not 'other'"):
        go(other, tmp_path / "r")


def test_a_plan_that_does_not_fit_is_refused_before_it_starts(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResultsError, match=r"has 0\.0 MB free and this needs about"):
        go(study, tmp_path / "r")


def test_a_disk_that_fills_up_loses_nothing_that_was_finished(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first trial is committed, the disk is full for the second, and freed again."""
    go(study, tmp_path / "r", "width=2")
    write = files.write_atomically

    def full(file: Path, content: Any) -> None:
        if file.suffix in {".parquet", ".safetensors"}:
            raise OSError(28, "No space left on device", str(file))
        write(file, content)

    for module in ("flatmin.results", "flatmin.trainables.checkpoint"):
        monkeypatch.setattr(f"{module}.write_atomically", full)
    with pytest.raises(RequestError, match="No space left on device; what was finished is kept"):
        go(study, tmp_path / "r", max_failures=0)
    assert len(Results.open(tmp_path / "r").models()) == 2
    monkeypatch.undo()
    assert go(study, tmp_path / "r")[0].exit_code == 0
    assert len(Results.open(tmp_path / "r").models()) == 4


def bound_by_permissions() -> None:
    """Make root obey file permissions, as other users do: drop CAP_DAC_OVERRIDE for what is executed next."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP


def test_a_read_only_directory_is_refused(study: Path, tmp_path: Path) -> None:
    go(study, tmp_path / "r")
    folders = [tmp_path / "r", *(path for path in (tmp_path / "r").rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    command = [
        sys.executable,
        "-m",
        "flatmin.orchestrator",
        "launch",
        str(study),
        "--results",
        str(tmp_path / "r"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=bound_by_permissions)
    for folder in folders:
        folder.chmod(0o755)
    assert run.returncode == 2, run.stderr
    assert "cannot be written: Permission denied" in run.stderr
    assert "Traceback" not in run.stderr


def test_queries(study: Path, tmp_path: Path) -> None:
    go(study, tmp_path / "r")
    results = Results.open(tmp_path / "r")
    frame = query(
        results,
        'SELECT width, count(*) AS n, avg("lpf(max_samples=16)") AS lpf FROM wide GROUP BY width ORDER BY width',
    )
    assert frame["width"].tolist() == [2, 4]
    assert frame["n"].tolist() == [2, 2]
    assert (frame["lpf"] > 0).all()
    with pytest.raises(RequestError, match="Did you mean 'width'"):
        query(results, "SELECT widht FROM models")
    with pytest.raises(RequestError, match="Tables: plan, models, epochs"):
        query(results, "SELECT * FROM modles")


@pytest.mark.parametrize("precision", ["fp64", "tf32", "bf16"])
def test_every_precision_trains_and_is_measured(write_study: Write, tmp_path: Path, precision: str) -> None:
    go(write_study(), tmp_path / "r", f"precision={precision}", "width=8", "epochs=30", "measures=lambda_max")
    results = Results.open(tmp_path / "r")
    assert results.models()["train_acc"].min() > 0.8
    assert results.sharpness()["converged"].all()


def test_a_convolutional_network_with_batch_norm_trains_and_is_measured(write_study: Write, tmp_path: Path) -> None:
    overrides = ["network=resnet18_narrow", "width=1", "epochs=6", "seeds=2", "measures=lambda_max(max_steps=4)"]
    go(write_study(), tmp_path / "r", *overrides)
    results = Results.open(tmp_path / "r")
    assert results.models()["train_acc"].min() > 0.3
    assert len(results.sharpness()) == 2


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_lost_weights_are_trained_again_by_launch_and_refused_by_measure(
    study: Path, tmp_path: Path, damage: str
) -> None:
    go(study, tmp_path / "r")
    before = snapshot(tmp_path / "r")
    file = next((tmp_path / "r" / "checkpoints").glob("*.safetensors"))
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ResultsError, match="launch the study again"):
        measure(tmp_path / "r", ["hessian_trace"], LaunchOptions(inline=True))
    done, said = go(study, tmp_path / "r")
    assert f"{file} cannot be read; its models are trained again" in said
    assert done.trained == 2
    assert equal(snapshot(tmp_path / "r"), before)


def test_a_file_of_another_table_is_not_taken_for_a_commit(study: Path, tmp_path: Path) -> None:
    go(study, tmp_path / "r")
    before = snapshot(tmp_path / "r")
    wrong = next((tmp_path / "r" / "epochs").glob("*.parquet"))
    shutil.copy(wrong, tmp_path / "r" / "models" / wrong.name)
    unreadable = Results(tmp_path / "r").unreadable()
    assert [found[:2] for found in unreadable] == [("models", tmp_path / "r" / "models" / wrong.name)]
    assert go(study, tmp_path / "r")[0].trained == 2
    assert equal(snapshot(tmp_path / "r"), before)


def test_too_much_validation_is_a_wrong_request(study: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="val_size = 1000 leaves nothing of 1000 training examples"):
        go(study, tmp_path / "r", "val_size=1000")
    assert Results(tmp_path / "r").failures().empty


def test_tables_have_their_columns_before_the_first_model_ends(study: Path, tmp_path: Path) -> None:
    go(study, tmp_path / "r", time_budget=0.0)
    assert query(tmp_path / "r", "SELECT width, lr FROM models").empty
    assert query(tmp_path / "r", "SELECT width FROM wide").empty
    with pytest.raises(RequestError, match="the query is empty"):
        query(tmp_path / "r", " ; ")


def test_the_verbs_are_there_from_python(study: Path, tmp_path: Path) -> None:
    import flatmin

    for name in flatmin.__all__:
        assert getattr(flatmin, name) is not None
    with pytest.raises(AttributeError, match="lunch"):
        flatmin.lunch  # noqa: B018
    assert len(flatmin.plan(str(study)).models) == 4
    flatmin.launch(str(study), tmp_path / "r", options=flatmin.LaunchOptions(inline=True))
    assert len(flatmin.Results(tmp_path / "r").models()) == flatmin.status(tmp_path / "r").finished == 4
    with pytest.raises(RequestError, match="should be a list"):
        flatmin.launch(str(study), tmp_path / "r", "width=4")
