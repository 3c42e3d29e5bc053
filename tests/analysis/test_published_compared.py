"""Ours beside published numbers: against closed forms, in the report, and in SQL."""

from __future__ import annotations

import json
import math
import re
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
from flatmin.orchestrator.inspect import query
from flatmin.results import Results

"""What the settings or the source of a row have that no configuration of its study stands for."""


DOCS = Path(__file__).parents[2] / "docs" / "published.md"
SAM_SHARPNESS = "sam_sharpness(batch=128, kind=first_order, label_smoothing=0.1111, metric=element, radius=2)"


def settings_of(row: pd.Series) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(row["settings"])
    return found


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


def test_what_is_not_recorded_has_no_counterpart() -> None:
    ours = models_of(BEST).assign(study="sam-adaptive", batch_size=32)
    compared = compare(ours)
    unknown = compared[[settings_of(row).get("network", "") is None for _, row in compared.iterrows()]]
    assert unknown["printed"].tolist() == ["91.94", "27 %"]
    assert unknown["ours"].isna().all()


def test_other_settings_have_no_counterpart() -> None:
    compared = compare(models_of(BEST))
    assert len(compared) == (published()["study"] == "lpf-optimizers").sum()
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


def test_the_view(tmp_path: Path) -> None:
    results = Results.create(tmp_path / "r", "lpf-optimizers")
    assert query(results, "SELECT count(*) AS n FROM published")["n"].tolist() == [len(published())]
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
    assert not list(results.directory.rglob("*published*"))
