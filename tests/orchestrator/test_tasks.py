"""Whole launches of other tasks than classification, and of the ways to run one: rows, measures, reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flatmin.errors import RequestError
from flatmin.orchestrator.cli import app
from flatmin.orchestrator.inspect import query
from flatmin.orchestrator.launch import Launched, LaunchOptions, launch, with_resources
from flatmin.orchestrator.report import write_report
from flatmin.orchestrator.runner import RunOptions
from flatmin.orchestrator.study_file import Resources
from flatmin.orchestrator.tune import trial_resources
from flatmin.results import Results

Write = Callable[..., Path]

REGRESSION = """\
study: waves
settings: {dataset: sinusoids, sinusoid_points: 40, network: mlp, depth: 2, optimizer: adam, batch_size: 20, epochs: 5}
axes: {lr: [0.001, 0.01], width: [8, 12]}
measures: [lpf(max_samples=16), lambda_max, fisher_rao]
"""

SEGMENTATION = """\
study: shapes
settings: {dataset: squares, network: pixels, optimizer: sam-sgd, batch_size: 8, epochs: 4, label_smoothing: 0.1}
axes: {lr: [0.05, 0.2]}
measures: [lpf(max_samples=16), "lambda_max(data=test)", shannon_entropy]
"""

PLUGINS = '''
"""Bright squares on a dark ground, and a network that tells them apart."""
import torch
from torch import nn
from flatmin.trainables.dataset import Dataset

def squares(root) -> Dataset:
    """Twenty images of squares."""
    generator = torch.Generator().manual_seed(0)
    y = torch.zeros(30, 8, 8, dtype=torch.uint8)
    for image, (i, j) in zip(y, torch.randint(0, 5, (30, 2), generator=generator).tolist(), strict=True):
        image[i:i + 3, j:j + 3] = 1
    x = (120 * y + torch.randint(0, 100, y.shape, generator=generator)).to(torch.uint8)[:, None]
    mean, std = torch.tensor([[[0.3]]]), torch.tensor([[[0.2]]])
    return Dataset(x[:20], y[:20], x[20:], y[20:], mean, std, 2, "segmentation", torch.tensor([1 / 0.86, 1 / 0.14]))

def pixels(input_shape, classes) -> nn.Module:
    """Two convolutions."""
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, classes, 1))
'''


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shape_plugins.py").write_text(f"from __future__ import annotations\n{PLUGINS}")
    monkeypatch.syspath_prepend(str(tmp_path))
    points = {
        f"flatmin.{kind}s": [metadata.EntryPoint(name, f"shape_plugins:{name}", f"flatmin.{kind}s")]
        for kind, name in (("dataset", "squares"), ("network", "pixels"))
    }
    monkeypatch.setattr(metadata, "entry_points", lambda group: points.get(group, []))


def go(study: Path, results: Path, *overrides: str, **options: Any) -> tuple[Launched, Results]:
    console = Console(file=StringIO(), width=200)
    done = launch(str(study), results, overrides, LaunchOptions(inline=True, **options), console)
    return done, Results.open(results)


def test_a_regression(write_study: Write, tmp_path: Path) -> None:
    done, results = go(write_study(REGRESSION), tmp_path / "r")
    assert (done.trained, done.exit_code) == (4, 0)
    models = results.models()
    for column in (
        "train_acc",
        "test_acc",
        "gen_gap",
        "best_test_acc",
        "train_acc_clean",
        "label_flip_rate",
        "test_dice",
    ):
        assert models[column].isna().all(), column
    assert models["loss_gap"].tolist() == pytest.approx((models["test_loss"] - models["train_loss"]).tolist())
    epochs = results.epochs()
    for row in models.to_dict("records"):
        own = epochs[epochs["model_id"] == row["model_id"]].set_index("epoch")["test_loss"]
        assert row["best_test_epoch"] == own.idxmin()
    assert results.sharpness()["value"].notna().all()
    assert len(results.sharpness()) == 12
    assert query(results, "SELECT count(*) AS n FROM models WHERE test_acc IS NULL")["n"].tolist() == [4]
    page = write_report(tmp_path / "r", tmp_path / "report.html").read_text()
    assert "loss_gap" in page
    found = CliRunner().invoke(app, ["correlate", str(tmp_path / "r"), "--target", "loss_gap", "--json"])
    assert json.loads(found.stdout)["n"] == 4


def test_a_segmentation(shapes: None, write_study: Write, tmp_path: Path) -> None:
    done, results = go(write_study(SEGMENTATION), tmp_path / "r")
    assert (done.trained, done.exit_code) == (2, 0)
    models = results.models()
    assert models[["train_acc", "test_acc", "train_dice", "test_dice", "gen_gap"]].notna().all(axis=None)
    assert models["test_dice"].between(0, 1).all()
    assert models["label_flip_rate"].isna().all()
    assert results.epochs()["test_dice"].notna().all()
    assert results.sharpness()["value"].notna().all()
    assert len(results.sharpness()) == 6
    assert write_report(tmp_path / "r", tmp_path / "report.html").stat().st_size > 0


def test_a_measure_of_classes_is_refused_before_a_regression_is_trained(write_study: Write, tmp_path: Path) -> None:
    study = write_study(REGRESSION.replace("fisher_rao", "margin"))
    with pytest.raises(RequestError, match="'margin' needs a class for each example, and this is a regression"):
        go(study, tmp_path / "r", "width=8", "lr=0.01")
    assert Results.open(tmp_path / "r").models().empty


def test_how_a_trial_is_run_is_in_its_row_and_not_in_its_id(write_study: Write, tmp_path: Path) -> None:
    study = write_study(REGRESSION.replace("measures", "#"))
    _, plain = go(study, tmp_path / "plain", "precision=fp64")
    _, other = go(study, tmp_path / "other", "precision=fp64", micro_batch=7, channels_last=True)
    models, others = (results.models().sort_values("model_id", ignore_index=True) for results in (plain, other))
    assert models["model_id"].tolist() == others["model_id"].tolist()
    assert models["test_loss"].tolist() == pytest.approx(others["test_loss"].tolist(), abs=1e-9)
    expected = {"micro_batch": 7, "channels_last": True, "compile": False, "cuda_graphs": False, "data": "resident"}
    for text in others["execution"]:
        assert expected.items() <= json.loads(text).items()
    assert json.loads(models["execution"][0])["micro_batch"] is None


def test_what_cannot_be_is_refused(write_study: Write, tmp_path: Path) -> None:
    study = str(write_study(REGRESSION))
    command = ["launch", study, "--results", str(tmp_path / "r"), "--inline", "--gpus-per-trial", "0"]
    for options, message in (
        (["--micro-batch", "0"], "--micro-batch 0: should be a number from 1 on, or auto"),
        (["--cuda-graphs"], "--cuda-graphs: the trials run on a CPU, which has none"),
        (["--processes-per-model", "2", "--models-per-trial", "4"], "trains one model at a time; leave one out"),
    ):
        with pytest.raises(RequestError, match=message):
            CliRunner().invoke(app, [*command, *options], catch_exceptions=False)


def test_what_several_processes_are_given() -> None:
    own = Resources()
    assert with_resources(RunOptions(processes_per_model=4), own).cpus_per_trial == 4
    with pytest.raises(RequestError, match=r"each needs a GPU of its own, and a trial has 2; give --gpus-per-trial 4"):
        with_resources(RunOptions(processes_per_model=4, gpus_per_trial=2), own)
    options = with_resources(RunOptions(processes_per_model=4), own)
    assert trial_resources(options, {"CPU": 8.0, "GPU": 8.0}) == {"cpu": 4, "gpu": 4}
    assert trial_resources(options, {"CPU": 8.0}) == {"cpu": 4, "gpu": 0}
    assert trial_resources(options, {"CPU": 8.0, "GPU": 2.0})["gpu"] == 4, "which the cluster does not have"
    launched = LaunchOptions(run=RunOptions(processes_per_model=4, cpus_per_trial=10))
    assert launched.execution.threads == 2
    assert launched.execution.processes_per_model == 4
