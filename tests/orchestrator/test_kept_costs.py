"""Costs that are kept: the same as counted ones, for as long as nothing they depend on has changed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from flatmin.orchestrator import estimate
from flatmin.orchestrator.kept_costs import KeptCosts
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import read_study
from flatmin.plugins import Plugin, get

COST = {"n_params": 3, "flops": 5}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    monkeypatch.setenv("FLATMIN_DATA", str(folder))
    return folder


def programs() -> list[dict[str, Any]]:
    return [dict(trial.program) for trial in make_plan(read_study("digits-double-descent")).trials][:2]


def test_what_was_counted_is_read_again_and_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        asked.append(len(given))
        return [{**COST, "of": program["width"]} for program in given]

    monkeypatch.setattr(estimate, "_counted_apart", counted)
    monkeypatch.setattr(estimate, "sys", type("Sys", (), {"modules": {}}))
    two = programs()
    first = estimate.program_costs(two[1:])
    assert estimate.program_costs(two) == [{**COST, "of": two[0]["width"]}, *first]
    assert estimate.program_costs(two) == [{**COST, "of": two[0]["width"]}, *first]
    assert asked == [1, 1]


def test_a_data_set_that_comes_or_changes_is_looked_at(root: Path) -> None:
    program = programs()[0]
    KeptCosts().write([program], [COST])
    assert KeptCosts().read(program) == COST
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for change in (lambda: None, lambda: (raw / "images").write_text("0"), lambda: (raw / "images").write_text("01")):
        change()
        assert KeptCosts().read(program) is None
        KeptCosts().write([program], [COST])
        assert KeptCosts().read(program) == COST


def test_what_nobody_asks_for_is_removed(root: Path) -> None:
    one, other = programs()
    KeptCosts().write([one], [COST])
    (old,) = (root / "costs").iterdir()
    os.utime(old, (1, 1))
    KeptCosts().write([other], [COST])
    assert KeptCosts().read(one) is None
    assert KeptCosts().read(other) == COST


def test_a_link_that_leads_nowhere_does_no_harm(root: Path) -> None:
    root.mkdir()
    (root / "imagenet").symlink_to(root / "unmounted")
    program = programs()[0]
    KeptCosts().write([program], [COST])
    assert KeptCosts().read(program) == COST


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("flatmin.orchestrator.kept_costs.data_root", nowhere)
    program = programs()[0]
    KeptCosts().write([program], [COST])
    assert KeptCosts().read(program) is None


def test_reasons_and_damage_are_not_kept(root: Path) -> None:
    one, other = programs()
    kept = KeptCosts()
    kept.write([one, other], [{"error": "no file"}, COST])
    assert kept.read(one) is None
    (file,) = (root / "costs").iterdir()
    file.write_text(json.dumps(COST)[:-3])
    assert kept.read(other) is None


def test_of_foreign_plugins_networks_are_kept_until_their_package_changes_and_data_sets_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("__init__", "net", "blocks"):
        (tmp_path / "my_nets").mkdir(exist_ok=True)
        (tmp_path / "my_nets" / f"{name}.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {
        "network": Plugin("network", "net", "my_nets.net", "net", "Module", {}, ""),
        "dataset": get("dataset", "digits"),
    }
    monkeypatch.setattr("flatmin.orchestrator.kept_costs.get", lambda kind, name: own[kind])
    program = programs()[0]
    KeptCosts().write([program], [COST])
    assert KeptCosts().read(program) == COST
    (tmp_path / "my_nets" / "blocks.py").write_text("changed")
    assert KeptCosts().read(program) is None
    own["dataset"] = Plugin("dataset", "net", "my_nets.net", "net", "Dataset", {}, "")
    KeptCosts().write([program], [COST])
    assert KeptCosts().read(program) is None


def test_a_disk_that_cannot_be_written_costs_time_alone(root: Path) -> None:
    root.parent.joinpath("data").write_text("a file where the folder should be")
    program = programs()[0]
    KeptCosts().write([program], [COST])
    assert KeptCosts().read(program) is None
