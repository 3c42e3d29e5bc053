"""Measures while models train: at which epochs, of which weights, over kills, divergences and later launches."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from safetensors import safe_open
from tests.trainables.conftest import Install
from torch import Tensor, cat

from flatmin.errors import FlatminError
from flatmin.lease import Lease
from flatmin.orchestrator.inspect import query
from flatmin.orchestrator.launch import LaunchOptions, launch
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.runner import RunOptions
from flatmin.orchestrator.study import read_study
from flatmin.results import Results
from flatmin.trainables.job import run
from flatmin.trial import Execution, Job, Trial

STUDY = """\
study: under-way
settings: {dataset: digits, network: mlp, width: 3, optimizer: sgd, lr: 0.1, batch_size: 500}
cases:
  - axes: {epochs: [5, 7]}
  - settings: {epochs: 9, schedule: step, milestones: [3], lr_decay: 1e8}
measures: [l2_norm, lpf(max_samples=16), loss_surface(points_per_axis=3)%s]
measure_every: 2
"""

MOODY = '''
"""A measure that fails while a file is there, and takes its time where not."""
from __future__ import annotations
import time
from pathlib import Path
def moody(engine) -> Estimate:
    """Moody."""
    from flatmin.sharpness.estimate import exact
    if Path(__file__).with_suffix(".broken").exists():
        raise ValueError("a bug of its own")
    time.sleep(0.5)
    return exact(engine.losses(), passes=1.0)
'''

OPTIONS = LaunchOptions(run=RunOptions(gpus_per_trial=0, max_failures=1), inline=True)


def study(folder: Path, more: str = "") -> str:
    """Write the study: models of 5 and of 7 epochs, and one whose last epochs lead far away."""
    file = folder / "study.yaml"
    file.write_text(STUDY % more)
    return str(file)


def stack(folder: Path) -> Trial:
    (only,) = make_plan(read_study(study(folder))).trials
    return only


@pytest.fixture
def do(tmp_path: Path) -> Callable[..., Results]:
    """Return a function that carries a trial out, after some attempts that end after some steps: stopped or killed."""

    def go(trial: Trial, name: str, ends: tuple[tuple[int, str], ...] = (), seconds: float = 0.0) -> Results:
        results = Results.create(tmp_path / name, "under-way")
        with Lease(results) as lease:
            job = Job(trial, str(results.path), lease.token, Execution(checkpoint_seconds=seconds))
            for steps, how in ends:
                work = run(job)
                for _ in range(steps):
                    next(work)
                with contextlib.suppress(KeyboardInterrupt):
                    work.close() if how == "stopped" else work.throw(KeyboardInterrupt)
            for _ in run(job):
                pass
        return results

    return go


def rows(results: Results, table: str = "sharpness") -> pd.DataFrame:
    frame = pd.DataFrame(getattr(results, table)())
    keys = [name for name in ("model_id", "label", "kind", "epoch", "x") if name in frame]
    return frame.drop(columns="seconds", errors="ignore").sort_values(keys, ignore_index=True)


def epochs_of(results: Results) -> dict[int, list[int]]:
    """Return the epochs that were measured, by the epochs a model was to train."""
    asked = results.models().set_index("model_id")["epochs"]
    frame = results.sharpness().query("measure == 'l2_norm'").groupby("model_id")["epoch"]
    return {int(asked[model]): sorted(epochs) for model, epochs in frame}


def test_every_second_epoch_and_the_end(tmp_path: Path, do: Callable[..., Results]) -> None:
    """One model diverges in its fourth epoch: it keeps the row from before, and has none of its end."""
    results = do(stack(tmp_path), "r")
    assert results.models().set_index("epochs")["status"].to_dict() == {5: "finished", 7: "finished", 9: "diverged"}
    assert epochs_of(results) == {5: [2, 4, 5], 7: [2, 4, 6, 7], 9: [2]}
    assert len(results.sharpness()) == 3 * (3 + 4 + 1)
    assert len(results.spectra()) == 3 * (3 + 4 + 1), "three points of a line"


def test_rows_under_way_are_those_of_a_model_that_ends_there(tmp_path: Path, do: Callable[..., Results]) -> None:
    """Same weights, and the same random vectors at every epoch."""
    whole = stack(tmp_path)
    (long,) = (model for model in whole.models if model.settings["epochs"] == 7)
    short = replace(long, model_id="0" * 16, settings={**long.settings, "epochs": 4})
    alone = do(replace(whole, models=(short,), measure_every=None), "short")
    ours = rows(do(replace(whole, models=(long,)), "long")).query("epoch == 4").reset_index(drop=True)
    columns = ["label", "value", "stderr", "samples"]
    pd.testing.assert_frame_equal(ours[columns], rows(alone)[columns], check_exact=True)
    with safe_open(alone.weights_file(replace(whole, models=(short,)).trial_id), framework="pt") as saved:
        weights: Tensor = cat([saved.get_tensor(name).flatten() for name in saved.keys()])  # noqa: SIM118
    found = ours.query("measure == 'l2_norm'")["value"].item()
    assert found == pytest.approx(weights.double().norm().item(), rel=1e-6)


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["saved at every step", "saved when stopped"])
def test_a_trial_that_was_stopped_has_the_same_rows(tmp_path: Path, do: Callable[..., Results], seconds: float) -> None:
    """Stopped in an epoch and at the end of one that is measured, killed with a measure that may not be saved."""
    trial = stack(tmp_path)
    ends = ((3, "stopped"), (3, "killed"), (1, "stopped"), (5, "killed"))
    expected, stopped = do(trial, "whole"), do(trial, "stopped", ends, seconds)
    assert json.loads(stopped.models()["execution"][0])["resumed"]
    pd.testing.assert_frame_equal(rows(stopped), rows(expected), check_exact=True)
    pd.testing.assert_frame_equal(rows(stopped, "spectra"), rows(expected, "spectra"), check_exact=True)
    pd.testing.assert_frame_equal(rows(stopped, "epochs"), rows(expected, "epochs"), check_exact=True)
    assert not stopped.sharpness().duplicated(["model_id", "label", "epoch"]).any()


def test_measuring_is_no_training(tmp_path: Path, do: Callable[..., Results]) -> None:
    """Neither the models nor their time change with what is measured under way."""
    trial = stack(tmp_path)
    with_, without = do(trial, "with"), do(replace(trial, measure_every=None), "without")
    left_out = ["seconds", "started_at", "execution"]
    pd.testing.assert_frame_equal(
        with_.models().drop(columns=left_out), without.models().drop(columns=left_out), check_exact=True
    )
    assert with_.measured() == without.measured()
    assert set(with_.epochs()["epoch"]) == set(without.epochs()["epoch"])


def test_later_measures_are_taken_at_the_end_alone(tmp_path: Path) -> None:
    first = launch(study(tmp_path), tmp_path / "r", (), OPTIONS)
    again = launch(study(tmp_path, ", hessian_trace"), tmp_path / "r", (), OPTIONS)
    assert (first.exit_code, again.exit_code, again.trained) == (0, 0, 0)
    models = again.results.models().query("status == 'finished'").set_index("model_id")["epochs_run"]
    added = again.results.sharpness().query("measure == 'hessian_trace'").set_index("model_id")["epoch"]
    assert added.to_dict() == models.to_dict()
    third = launch(study(tmp_path, ", hessian_trace"), tmp_path / "r", (), OPTIONS)
    assert (third.trained, third.measured, third.remaining) == (0, 0, 0)


def test_wide_has_the_last_epoch(tmp_path: Path, do: Callable[..., Results]) -> None:
    """A model that diverged has no measure of its end, whatever was measured before."""
    results = do(stack(tmp_path), "r")
    found = query(results.path, "SELECT model_id, epochs_run, l2_norm FROM wide")
    assert found["l2_norm"].isna().sum() == 1
    for row in found.to_dict("records"):
        own = results.sharpness().query(f"model_id == '{row['model_id']}' and measure == 'l2_norm'")
        last = own[own["epoch"] == row["epochs_run"]]["value"].tolist()
        assert last == ([] if math.isnan(row["l2_norm"]) else [row["l2_norm"]])


@pytest.fixture
def moody(install: Install) -> Path:
    """Make the measure `moody` known through an entry point; return the file whose being there breaks it."""
    return install("moody_measure", MOODY, {"flatmin.measures": ["moody"]}).with_suffix(".broken")


def test_what_fails_under_way_is_a_row_that_says_why(tmp_path: Path, moody: Path, do: Callable[..., Results]) -> None:
    """Its weights are not saved; what fails at the end is taken again from the saved weights."""
    moody.touch()
    trial = replace(stack(tmp_path), measures=("l2_norm", "moody"))
    with pytest.raises(FlatminError, match="moody failed: ValueError: a bug of its own"):
        do(trial, "r")
    moody.unlink()
    results = do(trial, "r")
    frame = results.sharpness().query("measure == 'moody'")
    ended = results.models().query("status == 'finished'").set_index("model_id")["epochs_run"]
    last = frame["epoch"] == frame["model_id"].map(ended)
    assert frame[last]["value"].notna().tolist() == [True, True]
    assert frame[~last]["value"].isna().all()
    assert set(frame[~last]["settings"]) == {json.dumps({"failed": "ValueError: a bug of its own"})}


def test_measuring_is_not_in_the_seconds_of_training(tmp_path: Path, moody: Path, do: Callable[..., Results]) -> None:
    results = do(replace(stack(tmp_path), measures=("moody",)), "r")
    assert results.sharpness()["seconds"].sum() > 4 * 0.5
    assert results.models()["seconds"].sum() < 2 * 0.5
