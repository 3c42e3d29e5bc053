"""Several processes that train one network: the steps of one process, whatever ends and whenever."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from flatmin.errors import FlatminError, RequestError
from flatmin.lease import Lease
from flatmin.plugins import program_arguments
from flatmin.results import Results
from flatmin.settings import model_id
from flatmin.trainables import together
from flatmin.trainables.checkpoint import load_weights
from flatmin.trainables.job import run, trainer_of
from flatmin.trainables.ranks import Ranks
from flatmin.trial import Execution, Job, Model, Trial


def model(optimizer: str, network: str = "mlp", **changes: Any) -> Model:
    """Return a model in float64 on 41 images, which make three batches of 13 and one of 2."""
    names = {"dataset": "tiny_images", "network": network, "optimizer": optimizer}
    arguments = program_arguments(names)
    settings = {**names, **{name: argument.default for name, argument in arguments.items()}}
    own = {"batch_size": 13, "epochs": 3, "precision": "fp64", "lr": 0.05, **changes}
    settings.update({name: value for name, value in own.items() if name in settings})
    settings.update({name: settings["seed"] for name in ("init_seed", "order_seed", "noise_seed")})
    return Model(model_id(settings, arguments), settings)


class Runner:
    """Carries trials of one model out in one results directory."""

    def __init__(self, results: Results, token: str) -> None:
        self.results, self.token = results, token

    def job(self, one: Model, **execution: Any) -> Job:
        return Job(Trial("s", (one,)), str(self.results.path), self.token, Execution(**execution))

    def trained(self, job: Job, stops: int = 0) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        """Return the weights, buffers and row of a job that is stopped and gone on with so many times."""
        for _ in range(stops):
            work = run(job)
            for _ in range(4):
                next(work)
            work.close()
        list(run(job))
        trainer = trainer_of(replace(job, execution=Execution()), Ranks())
        names = list(trainer.progress.buffers)
        params, buffers, _ = load_weights(self.results, job.trial, trainer.network, names, torch.device("cpu"))
        (row,) = self.results.table("models").to_pylist()
        self.results.remove(self.results.table_file("models", job.trial.trial_id))
        return params, buffers, row


TINY = """\
import torch
from torch import nn
from flatmin.trainables.dataset import Dataset

def tiny_images(root) -> Dataset:
    \"""Forty-one images.\"""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(50, 1, 6, 6, generator=generator), torch.randint(0, 3, (50,), generator=generator)
    return Dataset(x[:41], y[:41], x[41:], y[41:], x.mean(0), x.std(0), 3)

def tiny_normalised(input_shape, classes) -> nn.Module:
    \"""A convolution, BatchNorm and a layer.\"""
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 7), nn.BatchNorm1d(7)
    return nn.Sequential(*layers, nn.Linear(7, classes))
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package with a small data set and a small network, which other processes find as well."""
    folder = tmp_path / "site"
    (folder / "tiny-1.dist-info").mkdir(parents=True)
    (folder / "tiny.py").write_text(f"from __future__ import annotations\n{TINY}")
    (folder / "tiny-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
    (folder / "tiny-1.dist-info" / "entry_points.txt").write_text(
        "[flatmin.datasets]\ntiny_images = tiny:tiny_images\n"
        "[flatmin.networks]\ntiny_normalised = tiny:tiny_normalised\n"
    )
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    results = Results.create(tmp_path / "results", "s")
    with Lease(results) as lease:
        yield Runner(results, lease.token)


@pytest.mark.parametrize(
    ("optimizer", "network", "stops", "changes"),
    [
        ("sgd", "tiny_normalised", 0, {"label_smoothing": 0.1}),
        ("sam-sgd", "mlp", 1, {"width": 6, "depth": 2, "dropout": 0.3, "train_size": 40}),
        pytest.param("sgd", "mlp", 0, {"width": 6}, marks=pytest.mark.slow),
        pytest.param("sam-sgd", "tiny_normalised", 1, {"bn_updates": "all"}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_take_the_steps_of_one(
    optimizer: str, network: str, stops: int, changes: dict[str, Any], tiny: None, runner: Runner
) -> None:
    """Of 40 examples the last step has one, and the first process none of it."""
    one = model(optimizer, network, **changes)
    params, buffers, row = runner.trained(runner.job(one))
    others, other_buffers, other = runner.trained(runner.job(one, processes_per_model=2), stops)
    torch.testing.assert_close(others, params, rtol=0, atol=1e-9)
    for key, buffer in buffers.items():
        torch.testing.assert_close(other_buffers[key], buffer, rtol=0, atol=1e-9)
    for column in ("train_loss", "test_loss", "train_acc", "test_acc"):
        assert other[column] == pytest.approx(row[column], abs=1e-9)
    execution = json.loads(other["execution"])
    assert execution["processes_per_model"] == 2
    assert execution["resumed"] == bool(stops)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "network", "micro_batch"),
    [
        ("adahessian", "mlp", None),
        ("lpf-sgd", "mlp", 2),
        ("sam-scrn", "mlp", 3),
        ("adahessian", "tiny_normalised", None),
    ],
)
def test_every_question_is_answered_together(
    optimizer: str, network: str, micro_batch: int | None, tiny: None, runner: Runner
) -> None:
    """Products of a network with BatchNorm go through the sums over processes twice."""
    changes = {"lpf_batches": 3} if "lpf" in optimizer else {"scrn_steps": 3} if "scrn" in optimizer else {}
    one = model(optimizer, network, **changes, **({"depth": 2, "dropout": 0.3} if network == "mlp" else {}))
    params, _, _ = runner.trained(runner.job(one))
    others, _, _ = runner.trained(runner.job(one, processes_per_model=3, micro_batch=micro_batch))
    torch.testing.assert_close(others, params, rtol=0, atol=1e-9)


def test_a_process_that_fails_says_why(tiny: None, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    job = runner.job(model("sgd", width=6), processes_per_model=2)
    real = subprocess.Popen
    code = "import sys; sys.stdin.buffer.read(1); sys.exit('flatmin.errors.FlatminError: no such data')"

    def popen(command: list[str], **options: Any) -> Any:
        return real([sys.executable, "-c", code], **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(together, "_PATIENCE", timedelta(seconds=5))
    with pytest.raises(FlatminError, match=r"a process of --processes-per-model 2 failed: .*no such data"):
        list(run(job))


def test_the_others_end_with_the_first() -> None:
    """Whatever ends it: they hold its standard output open, and nothing else."""
    code = "import threading, time; from flatmin.trainables.together import _end_with; import sys\n"
    code += "threading.Thread(target=_end_with, args=(sys.stdin.buffer,), daemon=True).start(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert process.stdin is not None
    started = time.monotonic()
    process.stdin.close()
    assert process.wait() == 1
    assert time.monotonic() - started < 50


def test_what_they_have_started_ends_with_them() -> None:
    """A worker that reads images outlives its process otherwise, when that is killed."""
    code = "import subprocess, sys; from flatmin.trainables.together import _end_with\n"
    code += "print(subprocess.Popen(['sleep', '60']).pid, flush=True); _end_with(sys.stdin.buffer)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        worker = psutil.Process(int(process.stdout.readline()))
        process.stdin.close()
        assert process.wait() == -signal.SIGKILL
        psutil.wait_procs([worker], timeout=20)
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_what_several_processes_cannot_do(tiny: None, runner: Runner) -> None:
    one = model("sgd", width=6)
    two = replace(runner.job(one, processes_per_model=2), trial=Trial("s", (one, model("sgd", width=6, seed=1))))
    with pytest.raises(
        RequestError, match="trains one model at a time, and this trial has 2; give --models-per-trial 1"
    ):
        list(run(two))
    asked: dict[str, dict[str, Any]] = {"--compile": {"compile": True}, "--micro-batch auto": {"micro_batch": "auto"}}
    for option, execution in asked.items():
        with pytest.raises(RequestError, match=f"{option} does not go with --processes-per-model 2"):
            list(run(runner.job(one, processes_per_model=2, **execution)))
