"""The built-in studies: how many models each has, that all can be planned here, and that they are as published."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from flatmin.errors import RequestWarning
from flatmin.labels import parse_label
from flatmin.orchestrator.cli_studies import studies
from flatmin.orchestrator.estimate import estimate
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import Study, builtin_names, read_study

COUNTS = {
    "digits-double-descent": 70,
    "digits-label-noise": 50,
    "digits-optimizers": 360,  # 10 optimizers x 12 points x 3 seeds
    "digits-sharpness": 216,
    "frequency-hc18": 20,
    "frequency-mnist": 20,
    "frequency-sinusoids": 40,
    "lpf-augmentation": 400,  # SGD and SAM 192, SmoothOut 90, LPF-SGD 118
    "lpf-data-noise": 100,
    "lpf-label-noise": 50,
    "lpf-optimizers": 198,  # MNIST 18, CIFAR 126, TinyImageNet 36, ImageNet 18
    "lpf-quadratics": 121,
    "lpf-sharpness": 2916,
    "lpf-width": 320,
    "sam-adaptive": 24,
    "vasso": 84,  # 2 data sets x 3 networks x 4 optimizers x 3 seeds, and ImageNet 12
}


GENERATED = {"digits", "sinusoids", "quadratic"}
"""Data sets that need no files."""


@cache
def read(name: str, *, small: bool = False) -> Study:
    return read_study(name, small=small)


@cache
def rows() -> list[dict[str, Any]]:
    """Return what `studies --all --json` prints."""
    with redirect_stdout(StringIO()) as printed:
        studies(everything=True, as_json=True)
    listed: list[dict[str, Any]] = json.loads(printed.getvalue())
    return listed


def settings(study: Study) -> list[dict[str, Any]]:
    return [dict(model.settings) for model in study.models]


def test_every_study_is_counted() -> None:
    assert {row["name"]: row["models"] for row in rows()[: len(COUNTS)]} == COUNTS
    assert builtin_names() == sorted(COUNTS)


def test_every_study_says_what_it_is_and_where_it_comes_from() -> None:
    for row in rows():
        assert row["about"].endswith(".") and row["source"], row["name"]


def test_what_is_out_of_scope_is_named_with_the_reason() -> None:
    others = rows()[len(COUNTS) :]
    assert [(row["name"], row["models"]) for row in others] == [
        ("machine-translation", None),
        ("adversarial-robustness", None),
    ]
    assert all("Out of scope: " in row["about"] and row["source"] for row in others)


@pytest.mark.parametrize("name", sorted(COUNTS))
@pytest.mark.parametrize("small", [False, True])
def test_a_plan_has_every_model_once(name: str, small: bool) -> None:
    study = read(name, small=small)
    plan = make_plan(study)
    ids = [model.model_id for model in plan.models]
    assert sorted(ids) == sorted(model.model_id for model in study.models)
    assert len(ids) == len(set(ids))
    assert all(trial.measures for trial in plan.trials)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_what_a_plan_costs_is_asked_without_a_warning_or_a_download(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings are errors. One trial of each network on each data set: others have other strengths or sizes."""
    monkeypatch.setenv("FLATMIN_DATA", str(tmp_path))
    trials = {(t.program["dataset"], t.program["network"]): t for t in reversed(make_plan(read(name)).trials)}
    cost = estimate(list(trials.values()))
    assert cost.problem == "" and all(seconds is not None and seconds > 0 for seconds in cost.seconds)
    assert [place.name for place in tmp_path.iterdir()] == ["costs"]


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_a_twin_is_small_and_keeps_what_makes_its_study(name: str) -> None:
    study, twin = read(name), read(name, small=True)
    assert twin.name == f"{name}-small"
    assert len(twin.models) < len(study.models) and len(twin.models) <= 40
    for setting in ("dataset", "optimizer"):
        assert {model[setting] for model in settings(twin)} == {model[setting] for model in settings(study)}
    kinds = {parse_label(label).measure for label in study.measures}
    assert {parse_label(label).measure for label in twin.measures} <= kinds
    assert all(model["stand_in"] or model["dataset"] in GENERATED for model in settings(twin))
    assert not any(model["stand_in"] for model in settings(study))


def test_the_grid_of_2916() -> None:
    models = settings(read("lpf-sharpness"))
    varying = {name for name in models[0] if len({str(model[name]) for model in models}) > 1}
    axes = {"momentum", "width", "weight_decay", "lr", "batch_size", "skip", "batch_norm"}
    assert varying == axes | {"seed", "init_seed", "order_seed", "noise_seed"}
    first = models[0]
    assert (first["epochs"], first["milestones"], first["stop_loss"]) == (500, (150, 200), 0.01)
    assert first["augmentation"] == "none"


def test_noise_levels() -> None:
    labels, data = settings(read("lpf-label-noise")), settings(read("lpf-data-noise"))
    assert sorted({model["label_noise"] for model in labels}) == pytest.approx([level / 10 for level in range(10)])
    assert sorted({model["data_noise"] for model in data}) == pytest.approx([level / 5 for level in range(20)])
    assert {(model["seed"], model["noise_seed"]) for model in data} == {(seed, 0) for seed in range(5)}
    assert all(model["noise_seed"] == model["seed"] for model in labels)


def test_widths() -> None:
    models = settings(read("lpf-width"))
    assert sorted({model["width"] for model in models}) == list(range(1, 65))
    assert {(model["lr"], model["epochs"], model["label_noise"], model["weight_decay"]) for model in models} == {
        (1e-4, 4000, 0.2, 0.0)
    }


def test_quadratics() -> None:
    models = settings(read("lpf-quadratics"))
    flat = [model["quadratic_flat"] for model in models if model["quadratic_curvature"] is None]
    assert sorted(flat) == list(range(0, 101, 5))
    scaled = [model["quadratic_curvature"] for model in models if model["quadratic_curvature"] is not None]
    assert sorted(scaled) == list(range(1, 101))


def test_seeds_and_recipes_of_experiment_1() -> None:
    models = settings(read("lpf-optimizers"))
    counted = Counter(
        (model["dataset"], model["network"], model["augmentation"], model["optimizer"]) for model in models
    )
    assert {key: count for key, count in counted.items() if key[0] == "mnist"} == {
        ("mnist", "lenet", "none", "sgd"): 5,
        ("mnist", "lenet", "none", "sam-sgd"): 5,
        ("mnist", "lenet", "none", "lpf-sgd"): 5,
        ("mnist", "lenet", "none", "entropy-sgd"): 3,
    }
    assert {counted["cifar100", "resnet101", "none", name] for name in ("sgd", "sam-sgd", "lpf-sgd")} == {5}
    assert {counted["cifar10", "resnet50", "none", name] for name in ("smoothout-sgd", "entropy-sgd")} == {3}
    assert counted["tiny_imagenet", "resnet18_imagenet", "flip", "sam-sgd"] == 5
    assert counted["imagenet", "resnet18_imagenet", "none", "entropy-sgd"] == 0
    gammas = {(model["dataset"], model["lpf_gamma"], model["lpf_noise"]) for model in models if "lpf_gamma" in model}
    assert gammas == {
        ("mnist", 0.001, "tensor"),
        ("cifar10", 0.002, "tensor"),
        ("cifar100", 0.002, "tensor"),
        ("tiny_imagenet", 0.001, "tensor"),
        ("imagenet", 0.0005, "tensor"),
    }
    recipes = {
        (m["dataset"], m["epochs"], m["milestones"], m["lr"], m["weight_decay"], m["batch_size"]) for m in models
    }
    assert recipes == {
        ("mnist", 150, (50, 100), 0.01, 5e-4, 128),
        ("mnist", 150, (50, 100), 0.5, 2.5e-4, 128),
        *((name, 200, (100, 120), 0.1, 5e-4, 128) for name in ("cifar10", "cifar100")),
        *((name, 200, (100, 120), 0.5, 2.5e-4, 128) for name in ("cifar10", "cifar100")),
        ("tiny_imagenet", 100, (30, 60, 90), 0.1, 1e-4, 128),
        ("tiny_imagenet", 100, (30, 60, 90), 0.5, 5e-5, 128),
        ("imagenet", 100, (30, 60, 90), 0.1, 1e-4, 256),
        ("imagenet", 100, (30, 60, 90), 0.5, 1e-4, 256),
    }


def test_strengths_of_lpf_in_experiment_2_are_those_of_the_logs() -> None:
    names = {(16, None): "WRN-16-8", (28, None): "WRN-28-10", (26, None): "Shake", (110, 270): "110", (272, 200): "272"}
    found: dict[tuple[str, str, str], set[tuple[float, float]]] = {}
    for model in settings(read("lpf-augmentation")):
        if model["optimizer"] == "lpf-sgd":
            network = names[model["depth"], model.get("pyramid_alpha")]
            key = network, model["dataset"], model["augmentation"]
            found.setdefault(key, set()).add((model["lpf_gamma"], model["lpf_increase"]))
    others = {
        ("WRN-16-8", "cifar100", "autoaugment_cutout"): {(5e-4, 15), (1e-4, 15), (7e-4, 15)},
        ("WRN-28-10", "cifar10", "crop_flip"): {(5e-4, 35)},
        ("WRN-28-10", "cifar10", "crop_flip_cutout"): {(5e-4, 15), (1e-4, 7)},
        ("WRN-28-10", "cifar100", "crop_flip"): {(5e-4, 25)},
        ("WRN-28-10", "cifar100", "autoaugment_cutout"): {(7e-4, 15), (5e-4, 10)},
        ("110", "cifar10", "crop_flip"): {(5e-4, 25), (5e-4, 10)},
        ("110", "cifar10", "autoaugment_cutout"): {(5e-4, 15), (5e-4, 25)},
    }
    assert len(found) == 5 * 2 * 3
    assert found == {key: others.get(key, {(5e-4, 15)}) for key in found}


def test_each_network_of_experiment_2_has_its_schedule() -> None:
    models = settings(read("lpf-augmentation"))
    recipes = {
        (m["network"], m["epochs"], m["schedule"], m["milestones"], m["lr_decay"], m["nesterov"]) for m in models
    }
    assert recipes == {
        ("wideresnet", 200, "step", (60, 120, 160), 0.2, False),
        ("shake_shake", 1800, "cosine_steps", (), 0.1, True),
        ("pyramidnet", 300, "step", (150, 225), 0.1, True),
    }
    half = {model["optimizer"] for model in models if model["lr"] == 0.5}
    assert half == {"sgd"} and {m["dataset"] for m in models if m["lr"] == 0.5} == {"cifar100"}
    assert {(m["dataset"], m["cutout_size"]) for m in models} == {("cifar10", 16), ("cifar100", 8)}


def test_sharpness_in_every_epoch() -> None:
    study = read("sam-adaptive")
    assert {trial.measure_every for trial in make_plan(study).trials} == {1}
    assert study.measures == (
        "sam_sharpness(batch=128, kind=first_order, label_smoothing=0.1111, metric=element, radius=2)",
    )
    assert [model["label_smoothing"] for model in settings(study)] == pytest.approx([0.1 * 10 / 9] * 24, abs=1e-6)


def test_every_seed_of_hc18_splits_anew() -> None:
    models = settings(read("frequency-hc18"))
    assert {(model["seed"], model["hc18_seed"], model["shuffle"]) for model in models} == {
        (seed, seed, False) for seed in range(5)
    }


def test_every_optimizer_has_the_same_budget() -> None:
    models = settings(read("digits-optimizers"))
    assert set(Counter(model["optimizer"] for model in models).values()) == {36}
    assert all(model["val_size"] == 200 for model in models)


def test_one_recipe_for_cases_of_several_is_warned_of() -> None:
    with pytest.warns(RequestWarning, match="dataset: the cases of this study are recipes for different ones"):
        read_study("lpf-optimizers", ["dataset=cifar10"])
    assert read_study("lpf-optimizers", only=["dataset=cifar10"]).models
    assert read_study("lpf-optimizers", ["epochs=1"], small=True).models
