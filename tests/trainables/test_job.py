"""What a job hands to its measures, and what it writes of what they find."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.trainables.conftest import Install

from flatmin.errors import FlatminError, RequestError
from flatmin.lease import Lease
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import read_study
from flatmin.results import Results
from flatmin.trainables.job import run
from flatmin.trial import Job, Model, Trial

STUDY = """\
study: tiny
settings: {dataset: digits, network: mlp, width: 4, optimizer: sgd, batch_size: 300, epochs: 2%s}
axes: {lr: [0.05, 0.1]}
measures: [%s]
"""

TOY = '''
"""The distance from the initial weights, and a line of three points."""
from __future__ import annotations
import torch
from flatmin.sharpness import Curve
from flatmin.sharpness.estimate import exact
from dataclasses import replace
def toy_distance(engine, *, power: Annotated[float, Setting(about="Power.")] = 2.0) -> Estimate:
    """A toy."""
    moved = (engine.params - engine.initial_weights()).norm(dim=1).double()
    x = torch.arange(3.0).expand(len(engine), 3)
    return replace(exact(moved, passes=0.0), curves=[Curve("surface", x, moved[:, None] * x**power)])
'''


@pytest.fixture
def toy(install: Install) -> None:
    """Make a measure `toy_distance` known through an entry point."""
    install("toy_distance_measure", TOY, {"flatmin.measures": ["toy_distance"]})


@pytest.fixture
def do(tmp_path: Path) -> Iterator[Callable[[Trial], Results]]:
    """Return a function that carries a trial out in one results directory."""
    results = Results.create(tmp_path / "results", "tiny")
    with Lease(results) as lease:

        def go(trial: Trial) -> Results:
            for _ in run(Job(trial, str(results.path), lease.token)):
                pass
            return results

        yield go


def trial(tmp_path: Path, measures: str, settings: str = "") -> Trial:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY % (settings, measures))
    (only,) = make_plan(read_study(str(file))).trials
    return only


def again(first: Trial, measures: tuple[str, ...], models: tuple[Model, ...] | None = None) -> Trial:
    return Trial(first.study, models or first.models, measures, committed_as=first.trial_id)


def test_curves_are_rows_of_spectra_by_the_time_the_models_are_there(
    tmp_path: Path, toy: None, do: Callable[[Trial], Results]
) -> None:
    first = trial(tmp_path, "toy_distance, lambda_max")
    results = do(first)
    spectra = results.table("spectra").to_pandas().sort_values(["model_id", "x"], ignore_index=True)
    assert spectra["model_id"].nunique() == 2
    assert spectra["kind"].tolist() == ["surface"] * 6
    assert spectra["x"].tolist() == [0.0, 1.0, 2.0] * 2
    assert spectra["y"].isna().all()
    assert json.loads(spectra["settings"][0]) == {"label": "toy_distance", "power": 2.0}
    found = results.sharpness().query("label == 'toy_distance'").set_index("model_id")["value"]
    for point in spectra.to_dict("records"):
        assert point["value"] == pytest.approx(found[point["model_id"]] * point["x"] ** 2)
        assert point["epoch"] == 2
    order = [
        results.table_file(table, first.trial_id).stat().st_mtime_ns for table in ("spectra", "sharpness", "models")
    ]
    assert order == sorted(order)


def test_initial_weights_are_the_same_after_training_and_from_saved_weights(
    tmp_path: Path, toy: None, do: Callable[[Trial], Results]
) -> None:
    first = trial(tmp_path, "toy_distance")
    do(first)
    results = do(again(first, ("toy_distance(power=3)",), (first.models[1],)))
    frame = results.sharpness()
    values = frame[frame["model_id"] == first.models[1].model_id]["value"].tolist()
    assert len(values) == 2
    assert values[0] == values[1] > 0
    assert len(results.table("spectra")) == 6 + 3


def test_initial_weights_that_are_others_are_refused_where_they_are_needed(
    tmp_path: Path, toy: None, do: Callable[[Trial], Results]
) -> None:
    first = trial(tmp_path, "lambda_max")
    file = do(first).directory / "checkpoints" / f"{first.trial_id}.safetensors"
    with safe_open(file, framework="pt") as saved:
        hashes = json.loads(saved.metadata()["init_hash"])
        tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 (not a dictionary)
    wrong = first.models[1].model_id
    save_file(tensors, file, metadata={"init_hash": json.dumps({**hashes, wrong: "0" * 64})})
    with pytest.raises(
        FlatminError, match=f"toy_distance failed: the initial weights are needed, and those of {wrong}, made again"
    ):
        do(again(first, ("toy_distance",)))
    results = do(again(first, ("lambda_max(max_steps=20)",)))
    assert len(results.sharpness()) == 4, "what does not need them is measured"
    assert len(do(again(first, ("toy_distance",), (first.models[0],))).sharpness()) == 5


def test_measures_of_other_sets(tmp_path: Path, do: Callable[[Trial], Results]) -> None:
    arguments = ["", "data=test, ", "data=val, ", "label_smoothing=0.1, "]
    labels = ", ".join(f"'lpf({first}sigma=1e-9)'" for first in arguments)
    results = do(trial(tmp_path, labels, ", val_size: 200"))
    models = results.models().set_index("model_id")
    found = results.sharpness().pivot(index="model_id", columns="label", values="value")
    for label, column in (
        ("lpf(sigma=1e-09)", "train_loss"),
        ("lpf(data=test, sigma=1e-09)", "test_loss"),
        ("lpf(data=val, sigma=1e-09)", "val_loss"),
    ):
        assert found[label].tolist() == pytest.approx(models.loc[found.index, column].tolist(), rel=1e-6)
    assert (found["lpf(label_smoothing=0.1, sigma=1e-09)"] != found["lpf(sigma=1e-09)"]).all()


def test_a_set_that_is_not_there_is_refused_before_training(tmp_path: Path, do: Callable[[Trial], Results]) -> None:
    with pytest.raises(RequestError, match=r"'lpf\(data=val\)': there is no 'val' set; there are: train, test"):
        do(replace(trial(tmp_path, "lpf"), measures=("lpf(data=val)",)))


def test_nothing_torch_draws_from_has_moved(tmp_path: Path, do: Callable[[Trial], Results]) -> None:
    state = torch.get_rng_state()
    do(trial(tmp_path, "lpf(subset=100), lambda_max"))
    assert torch.equal(torch.get_rng_state(), state)
