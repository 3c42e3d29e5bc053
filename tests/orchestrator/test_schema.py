"""The JSON Schema of study files takes every study there is, and refuses what is wrong (jsonschema is the judge)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from flatmin import plugins
from flatmin.errors import RequestError
from flatmin.orchestrator.document import load
from flatmin.orchestrator.schema import study_schema, write_schema
from flatmin.orchestrator.study import builtin_names, find, read_study
from flatmin.orchestrator.template import new_study

STUDY: dict[str, Any] = {
    "study": "x",
    "settings": {"dataset": "digits", "network": "mlp", "optimizer": "sam-sgd", "train_size": "none"},
    "axes": {"lr": [0.1, 0.01], "milestones": [[1, 2], [3]]},
    "seeds": [0, 5],
    "measures": ["lpf", "lpf(data=test", "sigma=0.1)", "lpf_gap(sigma=0.1)"],
    "cases": [{"settings": {"rho": 0.1}, "measures": ["lambda_max"]}],
    "resources": {"gpus_per_trial": "auto", "models_per_trial": 4},
    "small": {"settings": {"epochs": 1}, "axes": {"lr": [0.1]}, "seeds": 1},
}


@pytest.fixture(scope="module")
def judge() -> Draft202012Validator:
    schema = json.loads(json.dumps(study_schema()))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("name", builtin_names())
def test_builtin_studies_and_their_twins_are_valid(judge: Draft202012Validator, name: str) -> None:
    data = load(*find(name)).data
    assert [error.message for error in judge.iter_errors(data)] == []
    for small in {False, "small" in data}:
        resolved = yaml.safe_load(read_study(name, small=small).to_yaml())
        assert [error.message for error in judge.iter_errors(resolved)] == []


def test_a_new_study_is_valid(judge: Draft202012Validator, tmp_path: Path) -> None:
    file = new_study("mine", folder=tmp_path)
    assert [error.message for error in judge.iter_errors(load(file, "mine").data)] == []


def test_every_field_is_taken(judge: Draft202012Validator) -> None:
    assert [error.message for error in judge.iter_errors(STUDY)] == []


@pytest.mark.parametrize(
    ("place", "value", "path"),
    [
        (("settings", "lr"), "fast", "settings.lr"),
        (("settings", "lr"), -1, "settings.lr"),
        (("settings", "lr"), [0.1], "settings.lr"),
        (("settings", "epochs"), 1.5, "settings.epochs"),
        (("settings", "lrr"), 0.1, "settings"),
        (("settings", "dataset"), "digitz", "settings.dataset"),
        (("settings", "optimizer"), "sam", "settings.optimizer"),
        (("settings", "schedule"), "linear", "settings.schedule"),
        (("settings", "nesterov"), "maybe", "settings.nesterov"),
        (("settings", "milestones"), [0], "settings.milestones.0"),
        (("axes", "lr"), 0.1, "axes.lr"),
        (("axes", "lr"), [], "axes.lr"),
        (("axes", "lr"), [0.1, "fast"], "axes.lr.1"),
        (("axes", "networkk"), ["mlp"], "axes"),
        (("cases", 0, "settings", "rho"), "big", "cases.0.settings.rho"),
        (("cases", 0, "sedds"), 1, "cases.0"),
        (("small", "axes", "network"), ["mlpp"], "small.axes.network.0"),
        (("small", "axess"), {}, "small"),
        (("resources", "cpus_per_trial"), 0, "resources.cpus_per_trial"),
        (("resources", "cpu_per_trial"), 1, "resources"),
        (("seeds",), 0, "seeds"),
        (("seeds",), [-1], "seeds"),
        (("measures",), "lpf", "measures"),
        (("measures", 0), "lpff", "measures.0"),
        (("measures", 2), "sigmma=0.1)", "measures.2"),
        (("measure_every",), None, "measure_every"),
        (("study",), "My Study", "study"),
        (("sorce",), "x", ""),
    ],
)
def test_what_is_wrong_is_refused_at_its_place(
    judge: Draft202012Validator, place: tuple[str | int, ...], value: Any, path: str
) -> None:
    wrong = json.loads(json.dumps(STUDY))
    owner = wrong
    for part in place[:-1]:
        owner = owner[part]
    owner[place[-1]] = value
    assert [".".join(map(str, error.absolute_path)) for error in judge.iter_errors(wrong)] == [path]


def test_a_name_is_required(judge: Draft202012Validator) -> None:
    assert [error.message for error in judge.iter_errors({"settings": {}})] == ["'study' is a required property"]


def test_every_setting_and_plugin_is_in_it() -> None:
    parts = study_schema()["$defs"]
    for kind in ("network", "dataset", "optimizer", "training"):
        for plugin in plugins.listing(kind).values():
            assert set(plugin.arguments) <= set(parts)
            for name, argument in plugin.arguments.items():
                assert name in parts["settings"]["properties"]
                assert name in parts["axes"]["properties"]
                assert argument.setting.about in parts[name]["description"]
                assert argument.setting.unit in parts[name]["description"]
    assert parts["network"]["enum"] == list(plugins.listing("network"))
    assert parts["optimizer"]["enum"] == plugins.optimizer_names()
    assert parts["batch_size"]["default"] == 128
    assert "mlp (default 64)" in parts["width"]["description"]
    assert "default" not in parts["width"], "its default is the network's"


def test_the_command_loads_no_torch_and_its_file_is_what_it_prints(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['flatmin-sweep', 'schema']\n"
        "from flatmin.orchestrator.cli import main\n"
        "try: main()\n"
        "finally: print({'torch', 'ray'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"
    assert write_schema(tmp_path / "s.json").read_text() == done.stdout
    assert json.loads(done.stdout)["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be written: Is a directory"):
        write_schema(tmp_path)
