"""Requests about data that cannot be met, or say less than they seem to, are told before anything is trained."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from flatmin.errors import RequestError, RequestWarning
from flatmin.orchestrator.estimate import estimate
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import read_study


def planned(*overrides: str) -> int:
    """Return the number of trials of a small study whose costs can be told."""
    study = read_study("digits-double-descent", ["width=4", "seeds=1", *overrides])
    return len(estimate(make_plan(study).trials).seconds)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["val_size=1000"], "val_size = 1000 leaves nothing of 1000 training examples"),
        (["val_size=100", "train_size=901"], "train_size = 901 is more than the 900 of 1000"),
        (["train_size=200"], "batch_size = 250 is more than the 200 training examples"),
        (["imbalance=200", "batch_size=1"], "none of the 220 .* class 8, .* 2 are missing; lower imbalance = 200, or"),
        (["augmentation=crop_flip"], "augmentation = crop_flip works on images of 8 bits"),
    ],
)
def test_a_plan_refuses_what_the_data_cannot_give(overrides: list[str], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        planned(*overrides)


def test_settings_that_are_lists_reach_a_process_of_its_own() -> None:
    study = read_study("digits-double-descent", ["dataset=sinusoids", "label_noise=0", "batch_size=20", "width=4"])
    programs = [
        dict(make_plan(study).trials[0].program),
        {**make_plan(study).trials[0].program, "measures": ["margin"]},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "flatmin.trainables.cost"],
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        check=True,
    )
    cost, refused = json.loads(done.stdout)
    assert cost["train_size"] == 200
    assert "'margin' needs a class for each example, and this is a regression" in refused["refused"]


def test_a_plan_warns_of_classes_that_validation_lacks() -> None:
    with pytest.warns(RequestWarning, match=r"none of the val_size = 5 .* of 10 classes are missing"):
        assert planned("val_size=5") == 1


@pytest.mark.parametrize("override", ["label_noise=1.1", "label_noise=-0.1", "data_noise=-1", "imbalance=0.5"])
def test_levels_out_of_range_are_refused_with_the_study(override: str) -> None:
    name, value = override.split("=")
    with pytest.raises(RequestError, match=name):
        read_study("digits-double-descent", [f"{name}={value}"])
