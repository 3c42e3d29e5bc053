"""`correlate` on tables of every kind, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from flatmin.orchestrator.cli import app
from flatmin.orchestrator.correlate import correlate_table


@pytest.fixture
def table() -> pd.DataFrame:
    """Twelve configurations of two seeds, one axis of names."""
    rows = [
        {
            "lr": lr,
            "optimizer": optimizer,
            "seed": seed,
            "flat": lr * 10 + seed / 10,
            "gap": lr + (optimizer == "sgd") / 100,
        }
        for lr in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
        for optimizer in ("sgd", "sam")
        for seed in (0, 1)
    ]
    return pd.DataFrame(rows).assign(train_loss=[0.001, 0.02, 0.003] * 8)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_every_kind_of_table_gives_the_same(table: pd.DataFrame, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if suffix == "tsv" else ",")
    asked = [
        "--target",
        "gap",
        "--axes",
        "lr,optimizer",
        "--measures",
        "flat",
        "--filter",
        "train_loss <= 0.01",
        "--json",
    ]
    done = CliRunner().invoke(app, ["correlate", str(path), *asked])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["n"], found["dropped"]) == (16, {"filter train_loss <= 0.01": 8})
    expected = correlate_table(
        str(path), target="gap", axes=["lr", "optimizer"], measures=["flat"], filter="train_loss <= 0.01"
    )
    assert found == json.loads(json.dumps(expected.to_json()))


def test_the_tables_show_the_ranking_with_its_controls(table: pd.DataFrame, tmp_path: Path) -> None:
    table.to_csv(tmp_path / "t.csv", index=False)
    asked = ["--target", "gap", "--axes", "lr,optimizer", "--measures", "flat"]
    shown = CliRunner().invoke(app, ["correlate", str(tmp_path / "t.csv"), *asked]).stdout
    ranking, given_axes, per_axis, more, _ = shown.split("\n\n")
    assert ranking.split("\n")[1].startswith("flat ")
    assert "random (control)" in ranking
    assert "train_loss (control)" in ranking
    assert given_axes.split("\n")[0].split()[:4] == ["measure", "partial", "partial_low", "partial_high"]
    assert per_axis.split("\n")[1].split() == ["flat", "1.000", "(2)", "0.000", "(6)"]
    assert "seeds_to_halve" in more
    assert shown.endswith("docs/statistics.md\n")
