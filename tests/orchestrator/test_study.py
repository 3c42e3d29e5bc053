"""Studies: what is expanded, what is refused, and that all mistakes are told together with their lines."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from flatmin.errors import RequestError, StudyError
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import Study, builtin_names, read_study

Write = Callable[..., Path]


def problems(file: Path, *overrides: str) -> list[str]:
    with pytest.raises(StudyError) as caught:
        read_study(str(file), overrides)
    return [line.replace(str(file), "FILE") for line in caught.value.problems]


def test_grid_is_the_product_of_axes_and_seeds(write_study: Write) -> None:
    study = read_study(str(write_study()))
    assert [(m.settings["width"], m.settings["seed"]) for m in study.models] == [
        (2, 0),
        (2, 1),
        (4, 0),
        (4, 1),
    ]
    first = study.models[0].settings
    assert first["lr"] == 0.05 and first["momentum"] == 0.9, "given and default settings are both there"
    assert first["init_seed"] == first["order_seed"] == first["noise_seed"] == 0


@pytest.mark.parametrize(
    ("override", "settings"),
    [
        ("lr=0.1", {"lr": {0.1}}),
        ("lr=0.1,1e-2", {"lr": {0.1, 0.01}}),
        ("width=8", {"width": {8}}),
        ("milestones=[1,2]", {"milestones": {(1, 2)}}),
        ("milestones=[1],[2,3]", {"milestones": {(1,), (2, 3)}}),
        ("seeds=3", {"seed": {0, 1, 2}}),
        ("seeds=4,7", {"seed": {4, 7}}),
        ("seed=9", {"seed": {9}}),
        ("network=mlp,resnet18_narrow", {"network": {"mlp", "resnet18_narrow"}}),
        ("nesterov=true", {"nesterov": {True}}),
    ],
)
def test_overrides(write_study: Write, override: str, settings: dict[str, set[object]]) -> None:
    models = read_study(str(write_study()), [override]).models
    for name, values in settings.items():
        assert {model.settings[name] for model in models} == values


def test_one_seed_may_differ_alone(write_study: Write) -> None:
    models = read_study(str(write_study()), ["width=2", "seeds=1", "init_seed=5,6"]).models
    assert [(m.settings["seed"], m.settings["init_seed"], m.settings["order_seed"]) for m in models] == [
        (0, 5, 0),
        (0, 6, 0),
    ]


def test_cases_are_grids_of_their_own(write_study: Write) -> None:
    file = write_study(
        "study: cases\n"
        "settings: {dataset: digits, network: mlp, optimizer: sgd, epochs: 5}\n"
        "axes: {width: [2, 4]}\n"
        "cases:\n"
        "  - settings: {lr: 0.1}\n"
        "  - settings: {optimizer: adam, width: 4}\n"
        "    axes: {lr: [0.01, 0.001]}\n"
    )
    found = [(m.settings["optimizer"], m.settings["width"], m.settings["lr"]) for m in read_study(str(file)).models]
    assert found == [("sgd", 2, 0.1), ("sgd", 4, 0.1), ("adam", 4, 0.01), ("adam", 4, 0.001)]


def test_a_setting_of_some_cases_may_be_overridden(write_study: Write) -> None:
    file = write_study(
        "study: cases\nsettings: {dataset: digits, network: mlp}\n"
        "cases:\n  - settings: {optimizer: sgd}\n  - settings: {optimizer: adam}\n"
    )
    models = read_study(str(file), ["momentum=0.5"]).models
    assert [(m.settings["optimizer"], m.settings.get("momentum")) for m in models] == [("sgd", 0.5), ("adam", None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "settings: {dataset: [digits], network: mlp, optimizer: sgd}",
            "should be one name; a list of them is an axis",
        ),
        ("settings: {dataset: digits, optimizer: sgd}\naxes: {network: [[mlp], mlp]}", "should be one name"),
        ("settings: &x {dataset: digits, width: *x}", "nested too deeply"),
        ("settings: {dataset: digits, network: mlp, optimizer: sgd, batch_size: 100000000000000000000000}", "64 bits"),
    ],
)
def test_slips_that_yaml_allows(write_study: Write, text: str, message: str) -> None:
    assert any(message in line for line in problems(write_study(f"study: x\n{text}\n")))


def test_a_study_may_be_launched_without_measures(write_study: Write) -> None:
    text = write_study().read_text() + "measures: [lpf]\n"
    for override in ("measures=none", "measures="):
        assert read_study(str(write_study(text)), [override]).measures == ()


@pytest.mark.parametrize(
    "written",
    [
        "measures: [lpf(data=test, sigma=0.1), lambda_max, lpf]",
        "measures: ['lpf(data=test, sigma=0.1)', lambda_max, lpf]",
        "measures:\n  - lpf( sigma=0.1,data=test )\n  - lambda_max\n  - lpf",
        "measures: [lpf(data=test,\n    sigma=0.1), lambda_max,\n    lpf]",
    ],
)
def test_a_label_in_a_yaml_list_stays_whole(write_study: Write, written: str) -> None:
    """YAML cuts `[lpf(data=test, sigma=0.1)]` into two texts."""
    study = read_study(str(write_study(write_study().read_text() + written + "\n")))
    assert study.measures == ("lpf(data=test, sigma=0.1)", "lambda_max", "lpf")
    assert yaml.safe_load(study.to_yaml())["measures"][1:] == ["lambda_max", "lpf"]


def test_a_label_that_never_ends_swallows_no_other(write_study: Write) -> None:
    text = write_study().read_text() + "measures: [lpf(sigma=0.1,\n  lpf(data=test, sigma=0.1), lpf(sigma=0.1, lpff]\n"
    told = problems(write_study(text))
    assert [line for line in told if "measures" in line] == [
        "FILE:8: measures.0: 'lpf(sigma=0.1' is not a measure; write `lpf` or `lpf(sigma=0.002)`",
        "FILE:9: measures.2: 'lpf(sigma=0.1' is not a measure; write `lpf` or `lpf(sigma=0.002)`",
        "FILE:9: measures.3: there is no measure 'lpff'. Did you mean 'lpf'?",
    ]


def test_a_setting_only_some_plugins_take_makes_no_double(write_study: Write) -> None:
    """`momentum` means nothing to adam, so adam's models do not multiply with it."""
    models = read_study(str(write_study()), ["optimizer=sgd,adam", "momentum=0,0.9", "width=2", "seeds=1"]).models
    assert sorted(m.settings["optimizer"] for m in models) == ["adam", "sgd", "sgd"]
    assert len({m.model_id for m in models}) == 3


def test_all_mistakes_are_told_together_with_line_value_and_nearest(write_study: Write) -> None:
    file = write_study(
        "study: wrong\n"
        "sorce: x\n"
        "settings:\n"
        "  dataset: digitz\n"
        "  network: mlp\n"
        "  optimizer: samm-sgd\n"
        "  lr: -1\n"
        "  lable_noise: 0.1\n"
        "  label_noise: 1.5\n"
        "  epochs: many\n"
        "axes:\n"
        "  width: [-1, 2]\n"
        "  batch_size: []\n"
        "measures: [lpff, 'lpf(sigmma=1)']\n"
    )
    told = problems(file)
    expected = [
        "FILE:2: sorce: there is no such field. Did you mean 'source'?",
        "FILE:4: settings.dataset: 'digitz': there is no dataset 'digitz'. Did you mean 'digits'?",
        "FILE:6: settings.optimizer: 'samm-sgd': there is no optimizer 'samm-sgd'. Did you mean 'sam-sgd'?",
        "FILE:8: settings.lable_noise: no plug-in of this study takes it. Did you mean 'label_noise'?",
        "FILE:9: settings.label_noise: 1.5: should be less than or equal to 1 (float)",
        "FILE:12: axes.width: -1: should be greater than or equal to 1 (int)",
        "FILE:13: axes.batch_size: []: an axis needs at least one value",
        "FILE:14: measures.0: there is no measure 'lpff'. Did you mean 'lpf'?",
        "FILE:14: measures.1: lpf does not take 'sigmma'. Did you mean 'sigma'?",
    ]
    for line in expected:
        assert line in told
    assert any(line.startswith("FILE:10: settings.epochs: 'many'") for line in told)
    assert len(told) == len(expected) + 1


def test_mistakes_on_the_command_line(write_study: Write) -> None:
    told = problems(write_study(), "lrr=1", "width=0", "batch_size=", "nonsense", "seeds=0")
    assert "command line: lrr: no plug-in of this study takes it. Did you mean 'lr'?" in told
    assert "command line: width: 0: should be greater than or equal to 1 (int)" in told
    assert "command line: batch_size=: an axis needs at least one value" in told
    assert "command line: 'nonsense' should read setting=value or setting=value,value" in told
    assert any(line.startswith("command line: seeds") for line in told)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: [", "not YAML"),
        ("just text", "a study is a mapping"),
        ("settings: {dataset: digits}", "missing"),
        (
            "study: x\nsettings: {network: mlp, optimizer: sgd}",
            "missing 'dataset'; there are: cifar10, cifar100, digits",
        ),
        ("study: x\nsettings: {dataset: digits}\nsettings: {network: mlp}", "given twice"),
        ("study: Bad Name\nsettings: {dataset: digits, network: mlp, optimizer: sgd}", "'Bad Name'"),
        (
            "study: x\nsettings: {dataset: digits, network: mlp, optimizer: sgd, lr: 1}\naxes: {lr: [1]}",
            "both a setting and an axis",
        ),
    ],
)
def test_malformed_studies(write_study: Write, text: str, message: str) -> None:
    assert any(message in line for line in problems(write_study(text)))


def test_unknown_studies_name_the_nearest() -> None:
    with pytest.raises(RequestError, match="Did you mean 'digits-double-descent'"):
        read_study("digits-duoble-descent")
    with pytest.raises(RequestError, match=r"no study file 'nowhere\.yaml'"):
        read_study("nowhere.yaml")


def test_a_home_folder_is_found_where_no_shell_has_put_it_in(
    write_study: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_study("study: mine\nsettings: {dataset: digits, network: mlp, optimizer: sgd}\n")
    monkeypatch.setenv("HOME", str(file.parent))
    assert read_study(f"~/{file.name}").file.study == "mine"
    with pytest.raises(RequestError, match="no study file '~nobody-here"):
        read_study("~nobody-here/mine.yaml")


@pytest.mark.parametrize(
    ("name", "count"), [("digits-double-descent", 70), ("digits-sharpness", 216), ("digits-label-noise", 50)]
)
def test_builtin_studies(name: str, count: int) -> None:
    assert name in builtin_names()
    assert len(read_study(name).models) == count


def test_planning_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys;"
        "from flatmin.orchestrator.plan import make_plan; from flatmin.orchestrator.study import read_study;"
        "make_plan(read_study('digits-sharpness')); print({'torch', 'ray'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("only", "found"),
    [
        (["width=4"], [(4, 0), (4, 1)]),
        (["width=2,4", "seed=1"], [(2, 1), (4, 1)]),
        (["lr=5e-2", "optimizer=sgd", "seed=0"], [(2, 0), (4, 0)]),
    ],
)
def test_a_part_of_a_study_has_the_models_of_the_whole(
    write_study: Write, only: list[str], found: list[tuple[int, int]]
) -> None:
    whole = {model.model_id for model in read_study(str(write_study())).models}
    part = read_study(str(write_study()), only=only)
    assert [(model.settings["width"], model.settings["seed"]) for model in part.models] == found
    assert {model.model_id for model in part.models} == set(part.measures_of) <= whole


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("width", "--only width: should read setting=value"),
        ("widht=4", "no model of this study has a setting 'widht'. Did you mean 'width'?"),
        ("width=8", "--only width=8: no such model; width is one of: 2, 4"),
        ("width=wide", "--only width=wide: 'wide':"),
        ("optimizer=adam", "no such model; optimizer is one of: sgd"),
    ],
)
def test_a_part_that_there_is_not(write_study: Write, condition: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        read_study(str(write_study()), only=[condition])


CASES = (
    "study: two\nsettings: {dataset: digits, network: mlp, optimizer: sgd, epochs: 50}\n"
    "measures: [lpf, lambda_max]\n"
    "cases:\n"
    "  - axes: {width: [2, 4]}\n"
    "  - settings: {width: 8, epochs: 9}\n"
    "    measures: [lpf(data=test, sigma=0.1), l2_norm]\n"
    "  - axes: {width: [4, 16]}\n"
    "    measures: []\n"
)


def measured(study: Study) -> dict[int, tuple[str, ...]]:
    return {model.settings["width"]: study.measures_of[model.model_id] for model in study.models}


def test_a_case_has_measures_of_its_own(write_study: Write) -> None:
    study = read_study(str(write_study(CASES)))
    assert measured(study) == {
        2: ("lpf", "lambda_max"),
        4: ("lpf", "lambda_max"),  # in the first case and in the last: what any of them asks for
        8: ("lpf(data=test, sigma=0.1)", "l2_norm"),
        16: (),
    }
    assert study.measures == ("lpf", "lambda_max", "lpf(data=test, sigma=0.1)", "l2_norm")
    by_width = {trial.program["width"]: trial.measures for trial in make_plan(study).trials}
    assert by_width == measured(study)


def test_measures_on_the_command_line_are_those_of_every_case(write_study: Write) -> None:
    study = read_study(str(write_study(CASES)), ["measures=random"])
    assert set(measured(study).values()) == {("random",)}


def test_a_wrong_measure_of_a_case_is_found_where_it_stands(write_study: Write) -> None:
    (told,) = problems(write_study(CASES.replace("l2_norm", "l3_norm")))
    assert told.startswith("FILE:7: cases.1.measures.1: there is no measure 'l3_norm'. Did you mean 'l2_norm'?")


def test_a_twin_lies_over_every_case(write_study: Write) -> None:
    file = write_study(CASES + "small:\n  settings: {epochs: 2, seed: 3}\n  measures: [random]\n")
    study = read_study(str(file), small=True)
    assert study.name == "two-small"
    assert {(model.settings["epochs"], model.settings["seed"]) for model in study.models} == {(2, 3)}
    assert measured(study) == dict.fromkeys([2, 4, 8, 16], ("random",))


def test_a_twins_cases_stand_in_place_of_the_studys(write_study: Write) -> None:
    small = "small:\n  settings: {epochs: 2}\n  cases:\n    - {settings: {width: 3}, measures: [random, l2_norm]}\n"
    study = read_study(str(write_study(CASES + small + "    - {settings: {width: 5, epochs: 1}}\n")), small=True)
    assert [(model.settings["width"], model.settings["epochs"]) for model in study.models] == [(3, 2), (5, 1)]
    assert measured(study) == {3: ("random", "l2_norm"), 5: ("lpf", "lambda_max")}


def test_overrides_come_after_the_twin(write_study: Write) -> None:
    file = write_study(CASES + "small:\n  settings: {epochs: 2}\n  seeds: 1\n")
    study = read_study(str(file), ["epochs=7", "seeds=2", "measures=lpf"], small=True)
    assert {(model.settings["epochs"], model.settings["seed"]) for model in study.models} == {(7, 0), (7, 1)}
    assert study.measures == ("lpf",)


def test_a_study_without_a_twin_says_so(write_study: Write) -> None:
    with pytest.raises(RequestError, match="the study 'tiny' has no small twin"):
        read_study(str(write_study()), small=True)


def test_mistakes_of_a_twin_have_their_own_lines(write_study: Write) -> None:
    file = write_study(CASES + "small:\n  settings:\n    epochs: 0\n  axes:\n    widht: [2]\n  measures: [lpff]\n")
    with pytest.raises(StudyError) as caught:
        read_study(str(file), small=True)
    told = [line.replace(str(file), "FILE") for line in caught.value.problems]
    assert any(
        line.startswith("FILE:12: small.settings.epochs: 0: should be greater than or equal to 1") for line in told
    )
    assert any(line.startswith("FILE:14: small.axes.widht: no plug-in of this study takes it") for line in told)
    assert any(line.startswith("FILE:15: small.measures.0: there is no measure 'lpff'") for line in told)
