"""`replay` trains one model again and compares it with its row; `status --watch` looks until all are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import flatmin
from flatmin.errors import RequestError, RequestWarning, ResultsError
from flatmin.orchestrator.cli import app
from flatmin.orchestrator.launch import LaunchOptions, launch, measure
from flatmin.orchestrator.replay import replay
from flatmin.plugins import program_arguments
from flatmin.results import Results

STUDY = """\
study: again
settings:
  {dataset: digits, network: mlp, width: 4, dropout: 0.1, optimizer: adam, batch_size: 200, epochs: 2, precision: fp64}
axes: {lr: [3e-3, 1e-2]}
seeds: 2
measures: [l2_norm, lpf(max_samples=16)]
"""


def launched(folder: Path, stack: int) -> Results:
    (folder / "again.yaml").write_text(STUDY)
    options = LaunchOptions(inline=True, models_per_trial=stack)
    return launch(str(folder / "again.yaml"), folder / "r", options=options).results


def test_a_model_trained_alone_comes_out_the_same_to_the_last_bit(tmp_path: Path) -> None:
    results = launched(tmp_path, 1)
    model_id = results.models()["model_id"][2]
    found = flatmin.replay(results, model_id[:6])
    assert (found.model_id, found.stack_size, found.identical) == (model_id, 1, True)
    assert found.stored["l2_norm"] == found.replayed["l2_norm"] > 0
    assert {found.difference(name) for name in ("train_loss", "test_acc", "lpf(max_samples=16)")} == {0.0}
    assert len(results.models()) == 4


def test_a_member_of_a_stack_comes_out_nearly_so(tmp_path: Path) -> None:
    results = launched(tmp_path, 4)
    model_id = results.models()["model_id"][0]
    found = replay(results, model_id)
    assert found.stack_size == 4
    assert abs(found.difference("train_loss") or 0.0) < 1e-9
    shown = CliRunner().invoke(app, ["replay", model_id, "--results", str(results.path), "--json"])
    said = json.loads(shown.stdout)
    assert said["values"]["train_loss"]["stored"] == results.models()["train_loss"][0]
    table = CliRunner().invoke(app, ["replay", model_id, "--results", str(results.path)]).stdout
    assert "train_loss" in table
    assert "trained in a stack of 4, replayed alone" in table


def test_settings_of_several_values_are_read_back(tmp_path: Path) -> None:
    settings = "{dataset: sinusoids, network: mlp, width: 4, optimizer: sgd, lr: 0.01, batch_size: 200, epochs: 2}"
    study, options = tmp_path / "waves.yaml", LaunchOptions(inline=True)
    study.write_text(f"study: waves\nsettings: {settings}\nmeasures: [fourier]\n")
    results = launch(str(study), tmp_path / "r", options=options).results
    assert replay(results, results.models()["model_id"][0]).identical
    measure(results.path, ["fourier(frequencies=5)"], options)
    assert set(results.sharpness()["label"]) == {"fourier", "fourier(frequencies=5)"}


def test_a_row_that_was_changed_is_seen(tmp_path: Path) -> None:
    results = launched(tmp_path, 1)
    row = results.table("models").to_pylist()[0]
    row["train_loss"] += 1e-6
    arguments = program_arguments({name: row[name] for name in ("dataset", "network", "optimizer")})
    results.write("models", row["trial_id"], [row], arguments)
    found = replay(results, row["model_id"])
    assert not found.identical
    assert found.difference("train_loss") == pytest.approx(-1e-6)
    assert found.difference("test_loss") == 0.0


def rewrite(results: Results, change: Callable[[pa.Table], pa.Table]) -> None:
    for file in (results.directory / "models").glob("*.parquet"):
        pq.write_table(change(pq.read_table(file)), file)


def test_a_row_from_before_a_setting_was_there_is_replayed_and_measured(tmp_path: Path) -> None:
    """`label_smoothing` came later; at its neutral value a model is what it was before."""
    results = launched(tmp_path, 1)
    rewrite(results, lambda rows: rows.drop_columns(["label_smoothing", "data_noise_clip"]))
    model_id = results.models()["model_id"][0]
    assert replay(results, model_id).identical
    done = measure(results.path, ["gradient_norm"], LaunchOptions(inline=True))
    assert (done.measured, done.remaining) == (4, 0)
    rewrite(results, lambda rows: rows.drop_columns(["momentum"] if "momentum" in rows.column_names else ["lr"]))
    with pytest.raises(ResultsError, match=f"model {model_id} has no '(momentum|lr)', which its plug-ins take by now"):
        replay(results, model_id)


def test_a_row_whose_settings_were_changed_is_told(tmp_path: Path) -> None:
    results = launched(tmp_path, 1)
    model_id = results.models()["model_id"][0]
    place = results.table("models").schema.get_field_index("lr")
    rewrite(results, lambda rows: rows.set_column(place, "lr", pa.array([0.02] * len(rows))))
    with pytest.warns(RequestWarning, match=f"the settings in the row of model {model_id} do not give this id"):
        assert not replay(results, model_id).identical


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    results = launched(tmp_path, 1)
    ids = results.models()["model_id"].tolist()
    with pytest.raises(RequestError, match="4 models begin so"):
        replay(results, "")
    with pytest.raises(RequestError, match=f"did you mean '{ids[0]}'"):
        replay(results, ids[0][:-1] + "x")
    with pytest.raises(RequestError, match='query "SELECT model_id FROM models" lists them'):
        replay(results, "zzzz")
    results.remove(results.table_file("models", results.models()["trial_id"][0]))
    with pytest.raises(RequestError, match="is planned, and not trained yet"):
        replay(results, ids[0])


def test_watching_waits_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch makes the directory first and writes its plan a moment later."""
    results, pauses = Results.create(tmp_path / "r", "again"), list[float]()

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr("flatmin.orchestrator.cli_results.time", SimpleNamespace(sleep=sleep))
    shown = CliRunner().invoke(app, ["status", "--results", str(results.path), "--watch", "--every", "2s"])
    assert (shown.exit_code, pauses) == (130, [2.0])


def test_watching_ends_when_nothing_remains(tmp_path: Path) -> None:
    results = launched(tmp_path, 4)
    shown = CliRunner().invoke(app, ["status", "--results", str(results.path), "--watch", "--every", "1s", "--json"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["finished"] == 4
