"""Published numbers: the table against a sample picked by hand, and comparisons against closed forms."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from flatmin import plugins
from flatmin.analysis.correlation import correlate
from flatmin.analysis.figures import published as figure
from flatmin.analysis.published import SPREAD_KINDS, compare, in_words, published, small_twin
from flatmin.analysis.report import report
from flatmin.labels import parse_label
from flatmin.orchestrator.inspect import query
from flatmin.orchestrator.study import read_study
from flatmin.results import Results
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


def settings_of(row: pd.Series) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row["settings"])
    return found


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
        names = {kind: given.pop(kind) for kind in ("dataset", "network", "optimizer") if kind in given}
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


SGD = {"dataset": "cifar10", "network": "resnet18", "optimizer": "sgd"}
RECIPE = {"batch_size": 128, "epochs": 200, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "augmentation": "none"}


def models_of(best: list[float], **changes: Any) -> pd.DataFrame:
    """Models of `lpf-optimizers` that differ in their seeds."""
    rows = [
        {
            "model_id": f"m{seed}",
            "trial_id": f"t{seed}",
            "study": "lpf-optimizers",
            **SGD,
            **RECIPE,
            "eval_every": 1,
            "seed": seed,
            "status": "finished",
            "epochs_run": 200,
            "test_acc": value - 0.01,
            "best_test_acc": value,
            "gen_gap": 0.99 - value,
            **changes,
        }
        for seed, value in enumerate(best)
    ]
    return pd.DataFrame(rows)


def one(compared: pd.DataFrame, quantity: str, **settings: Any) -> dict[Any, Any]:
    """The row of the logs with these settings among others."""
    rows = compared[(compared["quantity"] == quantity) & compared["source"].str.endswith("logs of experiment 1")]
    (row,) = [row for _, row in rows.iterrows() if settings.items() <= settings_of(row).items()]
    return dict(row)


BEST = [0.880, 0.884, 0.890, 0.886]


def test_the_difference_is_in_standard_errors() -> None:
    row = one(compare(models_of(BEST)), "best_test_acc", **SGD)
    sd = math.sqrt(sum((x - 0.885) ** 2 for x in BEST) / 3)
    assert (row["ours"], row["ours_sd"], row["ours_n"]) == (pytest.approx(0.885), pytest.approx(sd), 4)
    assert row["stderr"] == pytest.approx(0.0044 / math.sqrt(5))
    assert row["difference"] == pytest.approx(0.885 - 0.8851)
    assert row["standard_errors"] == pytest.approx((0.885 - 0.8851) / math.sqrt(sd**2 / 4 + 0.0044**2 / 5))
    welch = stats.ttest_ind_from_stats(0.885, sd, 4, 0.8851, 0.0044, 5, equal_var=False)
    assert row["standard_errors"] == pytest.approx(welch.statistic)
    assert row["missing"] == ""
    assert row["conventions"] == (
        "best epoch, chosen on the test set, on both sides; the paper's ± is half a 95 % interval"
    )


def test_last_is_beside_last() -> None:
    row = one(compare(models_of(BEST)), "test_acc", **SGD)
    assert (row["value"], row["ours"]) == (0.8841, pytest.approx(0.875))


def test_other_settings_have_no_counterpart() -> None:
    compared = compare(models_of(BEST))
    assert len(compared) == STUDIES["lpf-optimizers"]
    row = one(compared, "best_test_acc", dataset="cifar10", network="resnet50", optimizer="sgd")
    assert (row["missing"], row["ours_n"]) == ("no model has these settings", 0)
    assert math.isnan(row["ours"]) and math.isnan(row["difference"]) and math.isnan(row["standard_errors"])
    with_ours = compared[compared["ours"].notna()]
    assert set(with_ours["quantity"]) == {"best_test_acc", "test_acc"}
    # the logs' two numbers, and the authors' own table
    assert len(with_ours) == 3


def test_a_noise_scale_is_part_of_the_match() -> None:
    lpf = {"optimizer": "lpf-sgd", "lpf_gamma": 0.002}
    for noise, known in (("tensor", True), ("filter", False)):
        row = one(
            compare(models_of(BEST, **lpf, lpf_noise=noise)),
            "best_test_acc",
            network="resnet18",
            **lpf,
            dataset="cifar10",
        )
        assert math.isfinite(row["ours"]) == known
    assert "noise in proportion to whole tensors" in row["conventions"]


def test_no_error_without_a_spread_and_a_number() -> None:
    alone = one(compare(models_of([0.88])), "best_test_acc", **SGD)
    assert alone["difference"] == pytest.approx(0.88 - 0.8851)
    assert math.isnan(alone["standard_errors"]) and math.isnan(alone["ours_sd"])
    compared = compare(models_of(BEST))
    (author,) = compared[compared["ours"].notna() & compared["source"].str.contains("43f53208")].to_dict("records")
    assert math.isnan(author["stderr"]) and math.isnan(author["standard_errors"])


def test_diverged_models_are_left_out_and_said() -> None:
    models = models_of(BEST)
    models.loc[3, "status"] = "diverged"
    models.loc[3, "best_test_acc"] = 0.1
    row = one(compare(models), "best_test_acc", **SGD)
    assert (row["ours"], row["ours_n"]) == (pytest.approx(np.mean(BEST[:3])), 3)
    assert "1 of ours diverged and are left out" in row["conventions"]


def test_an_axis_of_ones_own_is_not_pooled() -> None:
    models = models_of(BEST)
    models["lr"] = [0.1, 0.1, 0.05, 0.05]
    row = one(compare(models), "best_test_acc", **SGD)
    assert row["missing"] == "our models differ in lr as well"
    assert math.isnan(row["ours"])


def test_a_seed_of_the_split_repeats_a_configuration() -> None:
    models = models_of(BEST).assign(split_seed=[0, 1, 2, 3])
    assert one(compare(models), "best_test_acc", **SGD)["ours_n"] == 4


def test_another_recipe_is_named() -> None:
    said = one(compare(models_of(BEST, epochs=2, eval_every=5)), "best_test_acc", **SGD)["conventions"]
    assert "epochs 2, theirs 200" in said
    assert "ours of every 5th epoch" in said
    assert "momentum" not in said


@pytest.mark.parametrize("changes", [{"study": "lpf-optimizers-small"}, {"stand_in": True}, {"study": "mine"}])
def test_small_twins_and_other_studies_are_never_compared(changes: dict[str, Any]) -> None:
    models = models_of(BEST, **changes)
    assert compare(models).empty
    assert small_twin(models) == ("mine" not in changes.values())


def test_a_study_of_ones_own_that_is_called_small_is_no_twin() -> None:
    assert not small_twin(models_of(BEST, study="mine-small"))
    assert not small_twin(models_of(BEST))
    assert not small_twin(pd.DataFrame({"width": [1, 2]}))


@pytest.mark.parametrize("kind", ["sd", "pop_sd", "ci95", "se"])
def test_every_kind_of_spread_gives_the_same_error(kind: str) -> None:
    sample = np.random.default_rng(0).normal(0.9, 0.01, size=7)
    spread = {
        "sd": sample.std(ddof=1),
        "pop_sd": sample.std(),
        "ci95": 1.96 * sample.std() / math.sqrt(7),
        "se": stats.sem(sample),
    }[kind]
    numbers = published().iloc[[1]].assign(value=sample.mean(), spread=spread, spread_kind=kind, n=7, ci95=np.nan)
    (row,) = compare(models_of(BEST), numbers=numbers).to_dict("records")
    assert row["stderr"] == pytest.approx(stats.sem(sample))
    assert row["standard_errors"] == pytest.approx(stats.ttest_ind(BEST, sample, equal_var=False).statistic)
    assert (SPREAD_KINDS[kind] in row["conventions"]) and (kind == "sd" or SPREAD_KINDS[kind])


def test_a_read_off_has_no_error() -> None:
    settings = {"dataset": "cifar10", "network": "resnet18", "optimizer": "vasso-sgd", "theta": 0.9}
    compared = compare(models_of(BEST, study="vasso", **settings))
    (row,) = compared[compared["ours"].notna()].to_dict("records")
    assert row["difference"] == pytest.approx(0.885 - 0.968)
    assert math.isnan(row["standard_errors"])
    assert "theirs is read off a figure" in row["conventions"]


def sharpness_of(models: pd.DataFrame, label: str, values: Any, epoch: int) -> pd.DataFrame:
    return models[["model_id", "trial_id"]].assign(epoch=epoch, label=label, value=values)


def test_a_measure_of_an_epoch_is_of_that_epoch() -> None:
    changes = {"study": "sam-adaptive", "network": "vgg16_bn", "optimizer": "adam"}
    models = models_of([0.9, 0.92], **changes)
    measured = [
        sharpness_of(models, SAM_SHARPNESS, values, epoch) for epoch, values in ((60, [0.6, 0.8]), (200, [0.3, 0.2]))
    ]
    compared = compare(models, pd.concat(measured)).set_index(["quantity", "epoch"])
    ours = compared.loc[SAM_SHARPNESS]
    ours = ours[ours["settings"].str.contains('"adam"')]["ours"]
    assert ours[60] == pytest.approx(0.7)
    assert ours[200] == pytest.approx(0.25)
    assert math.isnan(ours[1])


def test_an_accuracy_of_an_epoch_is_of_that_epoch() -> None:
    models = models_of([0.9, 0.92], study="sam-adaptive", optimizer="asam-adam", rho=2.0)
    epochs = pd.concat([models[["model_id"]].assign(epoch=epoch, test_acc=epoch / 1000) for epoch in (198, 199, 200)])
    compared = compare(models, None, epochs)
    (row,) = compared[compared["epoch"] == 199].to_dict("records")
    assert row["ours"] == pytest.approx(0.199)


def grid() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Twelve configurations of two seeds of `lpf-sharpness`, one of which did not converge in one seed."""
    rng = np.random.default_rng(1)
    rows = [(width, lr, seed) for width in (4, 6, 8) for lr in (0.005, 0.0075, 0.01, 0.02) for seed in (0, 1)]
    models = models_of([0.5] * len(rows), study="lpf-sharpness", stop_loss=0.01, status="converged")
    models[["width", "lr", "seed"]] = rows
    models["gen_gap"] = rng.random(len(rows))
    models.loc[5, "status"] = "finished"
    models.loc[5, "gen_gap"] = 9.0
    return models, sharpness_of(models, "lpf", models["gen_gap"] + rng.random(len(rows)), 200)


def test_a_correlation_is_of_seed_means_of_what_converged() -> None:
    models, sharpness = grid()
    compared = compare(models, sharpness)
    rows = compared[compared["ours"].notna()]
    (row,) = rows[rows["quantity"] == "tau(lpf, gen_gap)"].to_dict("records")
    both = models.assign(lpf=sharpness["value"]).drop(index=[4, 5]).groupby(["width", "lr"])[["lpf", "gen_gap"]].mean()
    assert row["ours"] == pytest.approx(stats.kendalltau(both["lpf"], both["gen_gap"]).statistic)
    assert row["ours_n"] == 11
    assert row["difference"] == pytest.approx(row["ours"] - 0.606)
    assert math.isnan(row["standard_errors"])
    assert "configurations count whose seeds all converged" in row["conventions"]
    ours = correlate(models.drop(index=[4, 5]), sharpness, bootstrap=0).measures["lpf"].tau
    assert row["ours"] == pytest.approx(ours)


@pytest.mark.parametrize(("x", "y"), [("lpf", "gen_gap"), ("width", "gen_gap"), ("lpf", "width")])
def test_a_correlation_within_an_axis_is_a_mean_over_its_groups(x: str, y: str) -> None:
    models, sharpness = grid()
    compared = compare(models, sharpness)
    rows = compared[(compared["quantity"] == f"tau({x}, {y} | width)") & compared["ours"].notna()]
    both = models.assign(lpf=sharpness["value"]).drop(index=5).groupby(["width", "lr"], as_index=False)
    means = both[["lpf", "gen_gap"]].mean()
    groups = [stats.kendalltau(group[x], group[y]).statistic for _, group in means.groupby("lr")]
    assert len(groups) == 4
    assert rows["ours"].tolist() == pytest.approx([np.mean(groups)] * len(rows)) and len(rows) >= 1
    assert (rows["ours_n"] == 12).all()
    assert rows["conventions"].str.contains("models that converged count").all()


def test_a_correlation_within_an_axis_that_is_not_there() -> None:
    models, sharpness = grid()
    compared = compare(models, sharpness)
    missing = compared.loc[compared["quantity"] == "tau(lpf, momentum | momentum)", "missing"]
    assert missing.tolist() == ["our models do not differ in momentum"]


def test_a_correlation_with_the_noise_level_is_against_the_level() -> None:
    levels = np.repeat(np.arange(10) / 10, 2)
    models = models_of([0.5] * 20, study="lpf-label-noise").assign(label_noise=levels, seed=[0, 1] * 10)
    values = np.random.default_rng(2).random(20) + levels
    whole = compare(models, sharpness_of(models, "pac_bayes", values, 200))
    compared = whole.set_index("quantity")
    row = compared.loc["tau(pac_bayes, label_noise)"]
    expected = stats.kendalltau(np.arange(10), values.reshape(10, 2).mean(axis=1)).statistic
    assert (row["ours"], row["ours_n"]) == (pytest.approx(expected), 10)
    assert compared.loc["tau(lpf, label_noise)", "missing"] == "this quantity is not in these results"
    # the gap at one level is a number of its own
    assert whole.loc[whole["quantity"] == "gen_gap", "ours_n"].tolist() == [2, 2]


def test_nothing_is_changed() -> None:
    models, sharpness = grid()
    before, measured, table = models.copy(), sharpness.copy(), published()
    compared = compare(models, sharpness)
    compared["value"] = 0.0
    pd.testing.assert_frame_equal(models, before)
    pd.testing.assert_frame_equal(sharpness, measured)
    pd.testing.assert_frame_equal(published(), table)


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


def test_settings_in_words() -> None:
    assert in_words('{"dataset": "mnist", "lpf_gamma": 0.0005}') == "mnist, lpf_gamma 0.0005"


def test_the_figure_has_both_sides() -> None:
    models, sharpness = grid()
    correlations = compare(models, sharpness)
    overall = correlations[correlations["quantity"] == "tau(lpf, gen_gap)"]
    data = figure.data(pd.concat([compare(models_of(BEST)), overall]))
    assert list(data["panel"]) == ["test_acc", "best_test_acc", "best_test_acc", "rank correlation τ"]
    assert data["theirs"].tolist() == [0.8841, 0.8851, 0.8851, 0.606]
    assert data["settings"][0] == "cifar10, resnet18, sgd"
    drawn = figure.draw(data)
    points = [trace for trace in drawn.data if trace.mode == "markers"]
    assert [len(trace.x) for trace in points] == [2, 1, 1]
    assert points[0].x.tolist() == [0.8851, 0.8851]
    assert points[0].y.tolist() == pytest.approx([0.885 - 0.8851] * 2)
    theirs, ours = 0.0044 / math.sqrt(5), np.std(BEST, ddof=1) / math.sqrt(4)
    assert list(points[0].error_y.array) == pytest.approx([math.hypot(theirs, ours), 0.0])


def page_of(tmp_path: Path, models: pd.DataFrame) -> str:
    path = report(study={"study": str(models["study"][0])}, models=models, path=tmp_path / "report.html")
    return path.read_text(encoding="utf-8")


def test_the_report_sets_ours_beside_theirs(tmp_path: Path) -> None:
    page = page_of(tmp_path, models_of(BEST))
    assert page.count("Beside the published numbers</h2>") == 2
    assert 'id="plot-published"' in page
    table = page.partition('<section id="published">')[2].partition("</section>")[0]
    assert table.count('<tr><th scope="row">') == 3
    assert "<td>11.49 ± 0.44 % error</td><td>0.8851</td><td>5</td><td>0.885</td>" in table
    assert "no model has these settings (" in table
    # notes have numbers: the interval (2) is said of the best epoch of the logs alone
    assert [row.rpartition("<td>")[2] for row in table.split("</td></tr>")[:3]] == ["1", "2, 3, 1", "2, 4"]
    notes = re.findall("<li>(.*?)</li>", table)
    assert notes[1] == "best epoch, chosen on the test set, on both sides"
    assert notes[0].endswith("logs of experiment 1")
    assert notes[3].endswith("table (43f53208)")
    assert "2 of 2 published numbers whose error is known lie within 2 standard errors of ours." not in page
    assert "1 of 2 published numbers whose error is known lie within 2 standard errors of ours." in page


def test_the_report_says_nothing_where_nothing_is_published(tmp_path: Path) -> None:
    page = page_of(tmp_path, models_of(BEST, study="mine"))
    assert "Beside the published numbers" not in page


def test_the_report_compares_no_small_twin(tmp_path: Path) -> None:
    page = page_of(tmp_path, models_of(BEST, study="lpf-optimizers-small", stand_in=True))
    assert page.count("Beside the published numbers</h2>") == 1
    assert "Small twin: not comparable with the published numbers." in page
    assert "11.49" not in page


def test_the_view(tmp_path: Path, table: pd.DataFrame) -> None:
    results = Results.create(tmp_path / "r", "lpf-optimizers")
    assert query(results, "SELECT count(*) AS n FROM published")["n"].tolist() == [len(table)]
    names = {"dataset": "cifar10", "network": "resnet18", "optimizer": "sgd"}
    arguments = plugins.program_arguments(names)
    for seed, value in enumerate(BEST):
        row = {"model_id": f"m{seed}", "study": "lpf-optimizers", "status": "finished", **names, "seed": seed}
        row |= {"epochs": 7, "lr": 0.1, "epochs_run": 7}
        results.write("models", f"t{seed}", [{**row, "trial_id": f"t{seed}", "best_test_acc": value}], arguments)
    (sql,) = re.findall(r"```sql\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    joined = query(results, sql)
    assert set(joined["printed"]) == {"11.49 ± 0.44 % error", "11.490 % error"}
    assert joined["ours"].tolist() == pytest.approx([0.885, 0.885])
    assert joined["ours_n"].tolist() == [4, 4]
    assert joined["standard_errors"].notna().tolist() == [True, False]
    assert joined["conventions"].str.startswith("epochs 7, the study's 200; ").all()
    wide = query(results, "DESCRIBE wide")["column_name"]
    assert "best_test_acc" in set(wide)
    assert not {"quantity", "printed", "recipe"} & set(wide)
    assert not list(results.path.rglob("*published*"))
