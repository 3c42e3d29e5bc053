"""Ray Tune: resources, reused workers, a quiet terminal, and rows equal to those of the in-process runner."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

from flatmin import compact, scan
from flatmin.errors import RequestError
from flatmin.orchestrator import tune
from flatmin.orchestrator.launch import LaunchOptions, launch, with_resources
from flatmin.orchestrator.runner import RunOptions
from flatmin.orchestrator.study_file import Resources
from flatmin.orchestrator.tune import shortage, trial_resources
from flatmin.results import Results
from flatmin.trainables.job import run
from flatmin.trial import Job

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("options", "available", "expected"),
    [
        (RunOptions(), {"CPU": 4.0}, {"cpu": 1.0, "gpu": 0.0}),
        (RunOptions(), {"CPU": 4.0, "GPU": 2.0}, {"cpu": 1.0, "gpu": 1.0}),
        (RunOptions(gpus_per_trial=0.25, cpus_per_trial=2), {"CPU": 4.0, "GPU": 1.0}, {"cpu": 2, "gpu": 0.25}),
        (RunOptions(gpus_per_trial=0.0), {"CPU": 4.0, "GPU": 1.0}, {"cpu": 1.0, "gpu": 0.0}),
    ],
)
def test_resources_of_a_trial(options: RunOptions, available: dict[str, float], expected: dict[str, float]) -> None:
    assert trial_resources(options, available) == expected


def test_what_a_cluster_lacks_is_said() -> None:
    assert shortage({"cpu": 1.0, "gpu": 0.5}, {"CPU": 2.0}) == "--gpus-per-trial 0.5: the cluster has 0 GPUs"
    assert shortage({"cpu": 8.0, "gpu": 0.0}, {"CPU": 2.0}) == "--cpus-per-trial 8: the cluster has 2 CPUs"
    assert shortage({"cpu": 2.0, "gpu": 0.5}, {"CPU": 2.0, "GPU": 1.0}) == ""


def test_this_machine_does_not_grow_so_a_shortage_is_refused(write_study: Write, tmp_path: Path) -> None:
    options = LaunchOptions(run=RunOptions(cpus_per_trial=4096))
    with pytest.raises(RequestError, match="--cpus-per-trial 4096: the cluster has"):
        launch(str(write_study()), tmp_path / "r", options=options)


def test_flags_come_before_the_study_and_the_study_before_the_defaults() -> None:
    own = Resources(cpus_per_trial=3, gpus_per_trial=0.5)
    assert with_resources(RunOptions(), own) == RunOptions(cpus_per_trial=3, gpus_per_trial=0.5)
    assert with_resources(RunOptions(cpus_per_trial=2), own) == RunOptions(cpus_per_trial=2, gpus_per_trial=0.5)
    assert with_resources(RunOptions(gpus_per_trial=0.0), own).gpus_per_trial == 0.0
    assert with_resources(RunOptions(), Resources()).gpus_per_trial is None


def test_ray_and_inline_give_the_same_rows_from_few_workers_and_say_one_line(
    write_study: Write, tmp_path: Path
) -> None:
    study = write_study(write_study().read_text() + "measures: [lambda_max]\nresources: {models_per_trial: 1}\n")
    command = [sys.executable, "-m", "flatmin.orchestrator", "launch", str(study), "seeds=4", "epochs=60"]
    done = subprocess.run([*command, "--results", str(tmp_path / "ray")], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "8 models trained, 0 of 8 remain"
    assert all(" of 8 models" in line for line in done.stderr.splitlines()[:-1]), done.stderr
    launch(str(study), tmp_path / "inline", ["seeds=4", "epochs=60"], LaunchOptions(inline=True))
    tables = []
    for name in ("ray", "inline"):
        results = Results.open(tmp_path / name)
        models = results.models().sort_values("model_id", ignore_index=True)
        sharpness = results.sharpness().sort_values("model_id", ignore_index=True).drop(columns="seconds")
        tables.append((models.drop(columns=["seconds", "started_at", "execution"]), sharpness))
        if name == "ray":
            workers = {json.loads(text)["pid"] for text in models["execution"]}
            assert len(workers) < len(models), "workers were not reused"
    for ours, theirs in zip(*tables, strict=True):
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


SAYS = """
import json, os, ray
from ray.tune.execution import class_cache
from flatmin.orchestrator.tune import _cluster

class Says(ray.tune.Trainable):
    def step(self):
        names = ("PL_DISABLE_FORK", "RAY_CHDIR_TO_TRIAL_DIR")
        own = {name: os.environ.get(name) for name in names}
        return {"done": True, "own": own, "environment": ray.get_runtime_context().get_runtime_env_string()}

before = dict(class_cache.DEFAULT_ENV_VARS)
with _cluster(None):
    (found,) = ray.tune.Tuner(Says, run_config=ray.tune.RunConfig(verbose=0)).fit()
left = {name for name in found.metrics["own"] if name in os.environ}
print(json.dumps([found.metrics["environment"], found.metrics["own"], before]))
assert class_cache.DEFAULT_ENV_VARS == before and not left
"""


def test_trials_run_in_processes_that_ray_has_ready() -> None:
    """They have no environment of their own, and inherit the variables that Tune would hand on; nothing is left."""
    done = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, check=True)
    environment, there, handed_on = json.loads(done.stdout.splitlines()[-1])
    assert environment == "{}"
    assert there == {**handed_on, "RAY_CHDIR_TO_TRIAL_DIR": "0"}


FOUR = """\
study: four
settings: {dataset: digits, network: mlp, optimizer: sgd, lr: 0.05, batch_size: 300, epochs: 1}
axes: {width: [2, 3, 4, 5]}
"""


def test_small_files_are_merged_before_the_next_share_of_trials(
    write_study: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune's part is done by a loop here."""
    path, seen = tmp_path / "r", []

    def fit(jobs: Sequence[Job], *_: object) -> None:
        seen.append(len(scan.listed(path, "models").parts))
        for job in jobs:
            list(run(job))

    monkeypatch.setattr(tune, "_fit", fit)
    monkeypatch.setattr(tune, "_cluster", lambda _: contextlib.nullcontext(""))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(tune, "_SHARE", 2)
    monkeypatch.setattr(tune, "_ROUNDS", 2)
    monkeypatch.setattr(compact, "MANY", 2)
    launched = launch(str(write_study(FOUR)), path)
    assert (launched.trained, launched.remaining) == (4, 0)
    assert seen == [0, 0]
    assert Results.open(path).models()["model_id"].is_unique
