"""Sweeps that keep no weights: every table is there, and what needs weights says that there are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.orchestrator.conftest import Command

from flatmin.errors import ResultsError
from flatmin.orchestrator.launch import LaunchOptions, launch, measure
from flatmin.orchestrator.replay import replay
from flatmin.results import Results

Write = Callable[..., Path]
WITHOUT = LaunchOptions(inline=True, weights=False)


def test_tables_are_whole_and_measure_says_what_is_missing(
    write_study: Write, tmp_path: Path, flatmin_sweep: Command
) -> None:
    study = write_study(write_study().read_text() + "measures: [lambda_max]\n")
    told = flatmin_sweep("launch", str(study), "--results", str(tmp_path / "r"), "--inline", "--no-weights")
    assert told.returncode == 0, told.stderr
    launch(str(study), tmp_path / "with", options=LaunchOptions(inline=True))
    results, whole = Results.open(tmp_path / "r"), Results.open(tmp_path / "with")
    assert not list((tmp_path / "r" / "checkpoints").glob("*"))
    drop = ["seconds", "started_at", "execution"]
    for table, other, key in (
        (results.models().drop(columns=drop), whole.models().drop(columns=drop), "model_id"),
        (results.sharpness().drop(columns="seconds"), whole.sharpness().drop(columns="seconds"), "model_id"),
    ):
        ours, theirs = (frame.sort_values(key, ignore_index=True) for frame in (table, other))
        assert ours.equals(theirs)
    with pytest.raises(ResultsError, match=r"made or imported without weights.*launch the study again"):
        measure(tmp_path / "r", ["l2_norm"], WITHOUT)
    assert replay(tmp_path / "r", results.models()["model_id"][0]).replayed["status"] == "finished"

    again = launch(str(study), tmp_path / "r", options=WITHOUT)
    assert (again.trained, again.measured) == (0, 0), "weights that are left out have not been lost"
    more = launch(str(study), tmp_path / "r", ["measures=lambda_max,l2_norm"], WITHOUT)
    assert (more.trained, more.remaining) == (4, 0), "a new measure trains again"
    assert set(results.sharpness()["label"]) == {"lambda_max", "l2_norm"}
