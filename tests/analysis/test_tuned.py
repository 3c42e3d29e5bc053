"""The choice on held-out examples: against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from flatmin.analysis.report import report
from flatmin.analysis.tuned import tuned


def row(optimizer: str, seed: int, val_acc: float, test_acc: float, **settings: object) -> dict[str, object]:
    values = {"optimizer": optimizer, "seed": seed, "val_acc": val_acc, "val_loss": 1.0, "test_acc": test_acc}
    fixed = {
        "study": "s",
        "dataset": "digits",
        "network": "mlp",
        "status": "finished",
        "gen_gap": 0.1,
        "lr": None,
        "rho": None,
    }
    name = f"{optimizer}-{seed}-{settings}"
    return {"model_id": name, "trial_id": name, **fixed, **values, **settings}


@pytest.fixture
def models() -> pd.DataFrame:
    return pd.DataFrame(
        [
            row("sgd", 0, 0.80, 0.70, lr=0.1),
            row("sgd", 1, 0.90, 0.74, lr=0.1),
            row("sgd", 0, 0.84, 0.99, lr=0.3),  # better on the test set, which has no say
            row("sgd", 1, 0.84, 0.99, lr=0.3),
            row("sam-sgd", 0, 0.90, 0.80, lr=0.1, rho=0.1),
            row("sam-sgd", 1, 0.90, 0.82, lr=0.1, rho=0.1),
            row("sam-sgd", 0, 0.88, 0.95, lr=0.1, rho=0.5),
            row("sam-sgd", 1, 0.88, 0.95, lr=0.1, rho=0.5),
        ]
    )


def test_each_optimizer_is_chosen_by_its_mean_on_held_out_examples(models: pd.DataFrame) -> None:
    found = tuned(models).set_index("optimizer")
    assert list(found.index) == ["sam-sgd", "sgd"], "by falling test accuracy"
    assert found["point"].to_dict() == {"sgd": {"lr": 0.1}, "sam-sgd": {"rho": 0.1}}, "what was varied"
    assert found["points"].to_dict() == {"sgd": 2, "sam-sgd": 2}
    assert found["n"].to_dict() == {"sgd": 2, "sam-sgd": 2}
    sgd = found.loc["sgd"]
    assert [sgd["val_acc"], sgd["test_acc"]] == pytest.approx([0.85, 0.72])
    assert sgd["test_se"] == pytest.approx(math.sqrt(0.0008) / math.sqrt(2))


def test_ties_go_to_the_lower_loss(models: pd.DataFrame) -> None:
    models["val_acc"] = 0.9
    models.loc[models["lr"] == 0.3, "val_loss"] = 0.5
    assert tuned(models).set_index("optimizer").loc["sgd", "point"] == {"lr": 0.3}


def test_a_point_with_a_diverged_seed_was_tried_and_is_not_chosen(models: pd.DataFrame) -> None:
    models.loc[1, "status"] = "diverged"
    sgd = tuned(models).set_index("optimizer").loc["sgd"]
    assert (sgd["point"], sgd["points"]) == ({"lr": 0.3}, 2)
    models.loc[2, "status"] = "diverged"
    sgd = tuned(models).set_index("optimizer").loc["sgd"]
    assert (sgd["point"], sgd["points"], sgd["n"]) == (None, 2, 0)
    assert pd.isna(sgd["test_acc"])


def test_other_settings_are_conditions_to_compare_within(models: pd.DataFrame) -> None:
    wider = models.assign(width=64, test_acc=models["test_acc"] - 0.1)
    found = tuned(pd.concat([models.assign(width=32), wider], ignore_index=True))
    assert found[["width", "optimizer"]].to_numpy().tolist() == [
        [32, "sam-sgd"],
        [32, "sgd"],
        [64, "sam-sgd"],
        [64, "sgd"],
    ]
    assert found["test_acc"].tolist() == pytest.approx([0.81, 0.72, 0.71, 0.62])


def test_one_seed_has_no_standard_error(models: pd.DataFrame) -> None:
    assert tuned(models[models["seed"] == 0])["test_se"].isna().all()


def test_nothing_to_choose_is_no_table(models: pd.DataFrame) -> None:
    assert tuned(models.assign(val_acc=None)).empty
    assert tuned(models[models["optimizer"] == "sgd"]).empty
    assert tuned(models[models["lr"].eq(0.1) & models["rho"].ne(0.5)]).empty, "one point of each"


def test_the_report_shows_the_choice_where_there_is_one(models: pd.DataFrame, tmp_path: Path) -> None:
    page = report(study={"study": "s"}, models=models, path=tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Optimizers at an equal budget" in page and "<td>rho: 0.1</td>" in page
    assert "have other numbers of points" not in page
    page = report(study={"study": "s"}, models=models[:6], path=tmp_path / "u.html").read_text(encoding="utf-8")
    assert "have other numbers of points" in page
    page = report(study={"study": "s"}, models=models[:2], path=tmp_path / "n.html").read_text(encoding="utf-8")
    assert "Optimizers at an equal budget" not in page
