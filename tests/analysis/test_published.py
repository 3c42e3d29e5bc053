"""Published numbers: the table against a sample picked by hand, and against the studies that train them."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flatmin import plugins
from flatmin.analysis.published import SPREAD_KINDS, compare, in_words, published
from flatmin.labels import parse_label
from flatmin.orchestrator.study import read_study
from flatmin.tables import fixed_columns

DOCS = Path(__file__).parents[2] / "docs" / "published.md"

STUDIES = {
    "lpf-sharpness": 161,
    "lpf-label-noise": 12,
    "lpf-data-noise": 10,
    "lpf-width": 16,
    "lpf-optimizers": 263,
    "lpf-augmentation": 231,
    "sam-adaptive": 18,
    "frequency-sinusoids": 20,
    "frequency-mnist": 4,
    "frequency-hc18": 16,
    "vasso": 22,
}

SAM_SHARPNESS = "sam_sharpness(batch=128, kind=first_order, label_smoothing=0.1111, metric=element, radius=2)"

# some of the settings; the quantity; part of the source; as printed: the number, its spread, and n
SAMPLE = {
    "lpf-optimizers": """
        cifar10, resnet18, sgd; best error; logs; 11.49; 0.44; 5
        cifar10, resnet18, lpf-sgd; best error; logs; 9.04; 0.21; 5
        cifar10, resnet18, lpf-sgd; last error; logs; 9.22; 0.30; 5
        cifar10, resnet50, entropy-sgd; best error; logs; 10.38; 0.09; 3
        cifar10, resnet101, lpf_gamma 0.001; best error; logs; 9.34; 0.58; 5
        cifar10, resnet101, lpf_gamma 0.0009; last error; logs; 9.43; -; 5
        cifar100, resnet50, sam-sgd; last error; logs; 33.35; 1.14; 5
        cifar100, resnet18, smoothout-sgd; best error; history; 37.32; 0.49; 3
        tiny_imagenet, augmentation none, sam-sgd; best error; logs; 63.01; 0.37; 5
        tiny_imagenet, augmentation none, sam-sgd; best error; 43f53208; 63.148; -; 5
        tiny_imagenet, augmentation flip, lpf-sgd; best error; logs; 53.19; 0.26; 5
        imagenet, sgd; last error; logs; 41.48; 0.11; 5
        imagenet, sam-sgd; best_test_epoch; logs; 31; -; 5
        imagenet, lpf-sgd; best error; 43f53208; 35.372; -; 5
        mnist, entropy-sgd; best error; table of MNIST; 0.776; 0.029; 3
        mnist, sgd, seed 3; best error; final_sharpness; 0.68; -; 1
        cifar100, resnet101, entropy-sgd; best error; older table; 40.44; -; -
        cifar10, resnet18, sam-sgd; pac_bayes; final_sharpness; 3.304e6; -; 5
        cifar10, resnet101, lpf-sgd; eps_sharpness; final_sharpness; 4.201; -; 5
        cifar100, resnet18, lpf-sgd; hessian_frobenius; final_sharpness; 12.33; -; 5
        cifar100, resnet50, sam-sgd; lpf(sigma=0.002); final_sharpness; 0.0106; -; 5
        cifar100, resnet101, lpf-sgd; fisher_rao(fisher=hessian); seed 0 left out; 8.8; -; 4
        mnist, sgd, seed 3; pac_bayes; final_sharpness; 18635; -; 1
        cifar100, lpf-sgd; lambda_max; eig_val; 5.4; 0.9; -
        cifar100, sam-sgd; hessian_trace(published=true); eig_val; 6.9; 0.5; -
    """,
    "lpf-augmentation": """
        cifar10, depth 28, augmentation crop_flip, sam-sgd; best error; logs; 3.22; 0.06; 5
        cifar100, depth 16, augmentation crop_flip, lpf-sgd; last error; logs; 19.14; -; 5
        cifar10, depth 110, augmentation crop_flip, lpf_increase 25; best error; logs; 3.49; 0.14; 3
        cifar10, shake_shake, augmentation crop_flip, sgd; best error; logs; 2.83; 0.06; 4
        cifar100, shake_shake, augmentation crop_flip_cutout, lpf-sgd; best error; logs; 16.14; -; 2
        cifar10, depth 28, lpf_gamma 0.0001; best error; logs; 2.92; 0.13; -
        cifar100, depth 16, lpf_gamma 0.0005, augmentation autoaugment_cutout; last error; logs; 17.89; -; 5
        cifar100, depth 272, augmentation autoaugment_cutout, sam-sgd; last error; logs; 14.92; -; 2
        cifar100, depth 28, augmentation autoaugment_cutout, smoothout-sgd; best error; history; 16.88; 0.40; 3
        cifar10, depth 28, smoothout_radius 0.07; best error; sweep; 8.90; -; -
        cifar10, depth 110, lpf-sgd, seed 0; best error; logs; 2.03; -; 1
        cifar100, depth 272, sgd; best error; further logs; 16.72; 0.23; 3
    """,
    "lpf-sharpness": """
        ; tau(lpf, gen_gap); cell 5; 0.606; -; -
        ; tau(local_entropy_gradient(times_gamma=false), gen_gap); cell 5; -0.064; -; -
        ; tau(pac_bayes, gen_gap | width); f7295fe3; -0.619; -; -
        ; tau(hessian_trace(published=true), gen_gap | lr); f7295fe3; 0.665; -; -
        ; tau(lpf_relative(absolute=true), gen_gap | skip); 142c1cc8; 0.460; -; -
        ; tau(low_pass3, gen_gap | batch_norm); 142c1cc8; 0.021; -; -
        ; pearson(log lpf, gen_gap | lr); 943d83d8; 0.81; -; -
        ; tau(batch_size, gen_gap | batch_size); table 6; 0.988; -; -
        ; tau(lambda_max, batch_norm | batch_norm); table 7; 0.996; -; -
        ; tau(fisher_rao(fisher=hessian), skip | skip); table 7; -0.605; -; -
    """,
    "lpf-label-noise": """
        ; tau(shannon_entropy, label_noise); label noise; -0.333; -; 10
        label_noise 0.9; gen_gap; label noise; 0.87; -; 5
    """,
    "lpf-data-noise": "; tau(hessian_frobenius, data_noise); data noise; 0.947; -; 20",
    "lpf-width": """
        ; tau(lpf, test_acc); widths; -0.851; -; 32
        ; tau(local_entropy_gradient(batch=1024, times_gamma=false), test_acc); widths; 0.141; -; 32
        width 4; last error; widths; 22; -; 1
    """,
    "sam-adaptive": f"""
        vgg16_bn, adam; last accuracy; README; 92.173; 0.310; 3
        resnet18, asam-adam; last accuracy; README; 94.896; 0.160; 3
        vgg16_bn, asam-adam; highest({SAM_SHARPNESS}, epoch); figure; 0.16; 0.02; -
    """,
    "frequency-sinusoids": "scrn; fourier_ratio(1); table; 0.863; -; -",
    "frequency-mnist": "adahessian, seed 1; last accuracy; mnist; 97.75; -; 1",
    "frequency-hc18": """
        scrn; last accuracy; figures; 97.9; -; 4
        ; lasso_coefficient(6); segmentation; -0.655; -; -
    """,
    "vasso": """
        cifar100, depth 28, vasso-sgd; best accuracy; radar; 85.1; 0.1; -
        cifar10, resnet18, sgd; best accuracy; radar; 96.25; 0.1; -
    """,
}
PICKED = [(study, line.strip()) for study, lines in SAMPLE.items() for line in lines.strip().splitlines()]
ACCURACIES = {"best error": "best_test_acc", "last error": "test_acc"}
ACCURACIES |= {"best accuracy": "best_test_acc", "last accuracy": "test_acc"}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return published()


def test_the_sample_is_large() -> None:
    assert len(PICKED) >= 60
    assert set(SAMPLE) == set(STUDIES)


@pytest.mark.parametrize(("study", "line"), PICKED)
def test_a_number_picked_by_hand(table: pd.DataFrame, study: str, line: str) -> None:
    settings, words, source, printed, spread, n = (part.strip() for part in line.split(";"))
    quantity = ACCURACIES.get(words, words)
    rows = table[(table["study"] == study) & (table["quantity"] == quantity) & table["source"].str.contains(source)]
    wanted = set(filter(None, settings.split(", ")))
    (row,) = rows[[wanted <= set(in_words(text).split(", ")) for text in rows["settings"]]].to_dict("records")
    scale = 0.01 if words in ACCURACIES else 1.0
    expected = float(printed) * scale
    assert row["value"] == pytest.approx(1 - expected if words.endswith("error") else expected, rel=1e-9)
    assert ("-" if pd.isna(row["spread"]) else row["spread"]) == (
        spread if spread == "-" else pytest.approx(float(spread) * scale)
    )
    assert ("-" if pd.isna(row["n"]) else str(row["n"])) == n


def test_read_offs_of_a_loss_are_powers_of_ten(table: pd.DataFrame) -> None:
    (row,) = table[(table["quantity"] == "train_loss") & table["settings"].str.contains("scrn")].to_dict("records")
    assert math.log10(row["value"]) == pytest.approx(-3.6)
    assert row["spread"] / row["value"] == pytest.approx(math.log(10) * 0.1)
    epochs = table[(table["quantity"] == SAM_SHARPNESS) & table["settings"].str.contains('"adam"')]
    assert dict(zip(epochs["epoch"], epochs["value"], strict=True)) == {1: 0.22, 60: 0.65, 115: 0.65, 200: 0.25}


def test_every_study_has_its_numbers(table: pd.DataFrame) -> None:
    assert table["study"].value_counts().to_dict() == STUDIES
    assert f"{len(table)} of them" in DOCS.read_text(encoding="utf-8")


def test_types_and_ranges(table: pd.DataFrame) -> None:
    assert set(table["spread_kind"]) <= set(SPREAD_KINDS)
    assert np.isfinite(table["value"]).all()
    bounded = table["quantity"].str.contains("acc$|gap$") | table["quantity"].str.startswith(("tau(", "pearson("))
    assert table.loc[bounded, "value"].abs().max() <= 1
    scores = table[table["quantity"].str.contains("^(?:best_)?(?:test|train)_acc$")]
    assert scores["value"].between(0, 1).all()
    assert (table["spread"].dropna() >= 0).all()
    assert (table["n"].dropna() >= 1).all()
    unspread = table["spread"].isna()
    assert set(table.loc[unspread, "spread_kind"]) == {"none", "read-off"}
    assert (table.loc[~unspread, "spread_kind"] != "none").all()
    assert not table.duplicated(["study", "settings", "epoch", "quantity", "source", "n"]).any()
    assert (table[["study", "settings", "quantity", "printed", "recipe", "source"]] != "").to_numpy().all()


def test_errors_in_per_cent_become_accuracies(table: pd.DataFrame) -> None:
    rows = table[table["printed"].str.endswith("% error")]
    assert len(rows) > 300
    numbers = rows["printed"].str.extract(r"^([\d.]+)(?: ± ([\d.]+))? % error$").astype(float)
    np.testing.assert_allclose(rows["value"], 1 - numbers[0] / 100, rtol=1e-9)
    np.testing.assert_allclose(rows["spread"], numbers[1] / 100, rtol=1e-9)
    assert rows["quantity"].isin(["best_test_acc", "test_acc"]).all()


def test_intervals_are_of_the_population_deviation(table: pd.DataFrame) -> None:
    """1.96 sigma / sqrt(n) with sigma^2 = s^2 (n - 1) / n, as far as two printed decimals tell."""
    rows = table[table["ci95"].notna()]
    assert len(rows) == 34
    n = rows["n"].astype(float)
    np.testing.assert_allclose(rows["ci95"], 1.96 * rows["spread"] * np.sqrt(n - 1) / n, atol=1e-4)


def test_best_is_never_worse_than_last(table: pd.DataFrame) -> None:
    rows = table[table["quantity"].isin(["best_test_acc", "test_acc"])]
    pairs = rows.pivot_table(index=["settings", "source", "n"], columns="quantity", values="value").dropna()
    assert len(pairs) > 100
    assert (pairs["best_test_acc"] >= pairs["test_acc"]).all()


def test_settings_are_those_of_the_plug_ins(table: pd.DataFrame) -> None:
    listed = {kind: plugins.listing(kind) for kind in ("network", "dataset", "optimizer", "training")}
    every = {
        name: argument
        for kind in listed.values()
        for plugin in kind.values()
        for name, argument in plugin.arguments.items()
    }
    values, optimizers = set(), plugins.optimizer_names()
    for settings, recipe in table[["settings", "recipe"]].drop_duplicates().itertuples(index=False):
        given = {**json.loads(settings), **json.loads(recipe)}
        assert len(given) == len(json.loads(settings)) + len(json.loads(recipe))
        names = {kind: name for kind in ("dataset", "network", "optimizer") if (name := given.pop(kind, None))}
        assert names.get("optimizer", "sgd") in optimizers
        parts = [listed[kind][part] for kind, name in names.items() for part in name.split("-")]
        known = {name for plugin in [listed["training"]["training"], *parts] for name in plugin.arguments}
        assert len(names) < 3 or set(given) <= known
        values |= {(name, value, type(value)) for name, value in given.items()}
    for name, value, _ in values:
        assert every[name].canonical(value) == value


def test_quantities_are_known(table: pd.DataFrame) -> None:
    columns = set(fixed_columns("models"))
    axes = {"momentum", "width", "weight_decay", "lr", "batch_size", "skip", "batch_norm", "label_noise", "data_noise"}
    other = re.compile(r"low_pass3|fourier_ratio\([1248]\)|lasso_r2|lasso_coefficient\(\d\)|peak\(lpf, width\)")

    @cache
    def known(name: str) -> bool:
        inside = re.fullmatch(r"(?:tau|pearson)\((?:log )?(.+), (\w+)(?: \| (\w+))?\)", name)
        if inside:
            first, target, axis = inside.groups()
            return known(first) and target in columns | axes and (axis is None or axis in axes)
        highest = re.fullmatch(r"highest\((.+), epoch\)", name)
        name = highest[1] if highest else name
        return name in columns | axes or bool(other.fullmatch(name)) or parse_label(name).label == name

    assert [name for name in table["quantity"].unique() if not known(name)] == []
    text = DOCS.read_text(encoding="utf-8")
    for word in (
        "tau(",
        "pearson(",
        "low_pass3",
        "highest(",
        "peak(",
        "fourier_ratio(",
        "lasso_r2",
        "lasso_coefficient(",
    ):
        assert f"`{word}" in text


def test_every_column_is_explained(table: pd.DataFrame) -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(table.columns) <= named


OUTSIDE = {
    "lpf-augmentation": "sweep of SmoothOut|further logs",
    "lpf-optimizers": "0.001|0.0009",
    "lpf-width": "figure of widths",
    "sam-adaptive": "baseline.py|notebooks",
    "frequency-hc18": "segmentation",
}
"""What the settings or the source of a row have that no configuration of its study stands for."""


@pytest.mark.parametrize("study", sorted(set(STUDIES) - {"lpf-sharpness"}))
def test_the_built_in_studies_train_what_is_published(study: str) -> None:
    """Every row of a mean finds models of its study that differ in seeds alone."""
    planned = read_study(study).models
    models = pd.DataFrame([{**model.settings, "model_id": str(number)} for number, model in enumerate(planned)])
    compared = compare(models.assign(study=study, status="finished", test_acc=0.5, best_test_acc=0.6, gen_gap=0.1))
    unmatched = compared[~compared["missing"].isin(["", "this quantity is not in these results"])]
    outside = (unmatched["settings"] + unmatched["source"]).str.contains(OUTSIDE.get(study, "(?!)"))
    assert unmatched[~outside].empty


def test_what_ours_were_trained_with_is_told() -> None:
    """Seeds and what the study's own models differ in are no change; a list is itself whatever holds it."""
    recipes = pd.DataFrame([{**model.settings} for model in read_study("lpf-optimizers").models])
    own = recipes[
        (recipes["optimizer"] == "sgd") & (recipes["network"] == "resnet18") & (recipes["dataset"] == "cifar10")
    ]
    own = own.assign(study="lpf-optimizers", status="finished", best_test_acc=0.88, test_acc=0.87)
    own["model_id"] = [str(number) for number in range(len(own))]
    own["milestones"] = own["milestones"].map(np.array)
    changed = own.assign(width=4, schedule="constant", label_noise=0.5)

    def said(models: pd.DataFrame) -> list[str]:
        compared = compare(models, recipes=recipes)
        return [text for text in compared.loc[compared["ours"].notna(), "conventions"] if "the study's" in text]

    assert said(own) == []
    told = said(changed)
    assert len(told) == 3
    assert {text.partition("; ")[0] for text in told} == {"label_noise 0.5, the study's 0"}
    assert all("schedule constant, the study's step" in text and "width 4, the study's 64" in text for text in told)
