"""What becomes of a study's training and of its other measures when one cannot be taken, or fails."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.trainables.conftest import Install

from flatmin.errors import RequestError
from flatmin.orchestrator.inspect import status
from flatmin.orchestrator.launch import Launched, LaunchOptions, launch, measure
from flatmin.orchestrator.runner import RunOptions
from flatmin.results import Results

STUDY = """\
study: tiny
settings: {dataset: digits, optimizer: sgd, batch_size: 300, epochs: 2, lr: 0.05}
axes: {network: [%s]}
measures: [l2_norm, %s, lambda_max]
"""

PLUGINS = '''
"""Networks without paths and without losses, and a measure that fails where a file says so."""
from __future__ import annotations
from pathlib import Path
from torch import nn
def smooth(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Smooth."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, classes))
class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(dim=0)
def mixing(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Centred by the batch."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), Centred(), nn.Linear(4, classes))
def moody(engine) -> Estimate:
    """A measure with a bug."""
    from flatmin.sharpness.estimate import exact
    if Path(__file__).with_suffix(".broken").exists():
        raise ValueError("a bug of its own")
    return exact(engine.losses(), passes=1.0)
'''

Run = Callable[..., Launched]


@pytest.fixture
def plugins(install: Install) -> Path:
    """Make them known through entry points; return the file whose being there breaks the measure."""
    groups = {"flatmin.networks": ["smooth", "mixing"], "flatmin.measures": ["moody"]}
    return install("unusual_plugins", PLUGINS, groups).with_suffix(".broken")


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., tuple[Launched, str]]:
    """Return a function that launches a study of some networks with one more measure, and what it says."""

    def run(networks: str, label: str) -> tuple[Launched, str]:
        said, file = io.StringIO(), tmp_path / "study.yaml"
        file.write_text(STUDY % (networks, label))
        options = LaunchOptions(run=RunOptions(gpus_per_trial=0, max_failures=1), inline=True)
        return launch(str(file), tmp_path / "r", (), options, Console(file=said, width=1000)), said.getvalue()

    return run


def rows(results: Results) -> dict[str, list[dict[str, Any]]]:
    network = {row["model_id"]: row["network"] for row in results.table("models").to_pylist()}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in results.table("sharpness").to_pylist():
        found.setdefault(f"{network[row['model_id']]} {row['measure']}", []).append(row)
    return found


def test_a_refused_measure_is_a_row_that_says_why(plugins: Path, go: Any) -> None:
    done, said = go("smooth, mlp", '"path_norm"')
    found = rows(done.results)
    assert done.exit_code == 0
    assert {name: len(of_name) for name, of_name in found.items()} == {
        f"{network} {measure}": 1 for network in ("smooth", "mlp") for measure in ("l2_norm", "path_norm", "lambda_max")
    }
    assert {name for name, (row,) in found.items() if row["value"] is None} == {"smooth path_norm"}
    (row,) = found["smooth path_norm"]
    assert (row["converged"], row["stderr"], row["samples"], row["passes"]) == (False, None, 0, 0.0)
    reason = json.loads(row["settings"])["refused"]
    assert reason.startswith("without its biases the network does not double its output")
    assert f"path_norm has no value: {reason}" in said
    assert done.results.table("failures").num_rows == 0
    again, said = go("smooth, mlp", '"path_norm"')
    assert (again.exit_code, again.trained, again.measured, said) == (0, 0, 0, "")


def test_a_network_that_cannot_be_measured_is_trained(plugins: Path, go: Any) -> None:
    done, _ = go("mixing", '"lpf(data=test)"')
    found = rows(done.results)
    assert done.exit_code == 0
    assert len(found) == 3
    for (row,) in found.values():
        assert row["value"] is None
        assert "depends on the others of its batch" in json.loads(row["settings"])["refused"]


def test_a_failed_measure_costs_neither_the_training_nor_the_others(plugins: Path, go: Any) -> None:
    plugins.touch()
    done, said = go("mlp", "moody")
    assert (done.exit_code, done.trained, done.remaining) == (1, 1, 1)
    assert said.count("ValueError: a bug of its own") == 2
    assert set(rows(done.results)) == {"mlp l2_norm", "mlp lambda_max"}
    (trained,) = done.results.table("models").to_pylist()
    assert done.results.table("failures").num_rows == 2
    assert status(done.results.path).failed == 0
    plugins.unlink()
    mended, _ = go("mlp", "moody")
    assert (mended.exit_code, mended.trained, mended.measured) == (0, 0, 1)
    assert done.results.table("models").to_pylist() == [trained]
    assert {name: len(of_name) for name, of_name in rows(done.results).items()} == {
        "mlp l2_norm": 1,
        "mlp lambda_max": 1,
        "mlp moody": 1,
    }


def test_measures_of_a_subset_are_taken_without_the_one_that_is_refused(plugins: Path, go: Any) -> None:
    done, _ = go("smooth", '"fisher_rao(data=test, subset=80)", "margin(data=test)", "path_norm"')
    assert {name: row["value"] is None for name, (row,) in rows(done.results).items()} == {
        "smooth l2_norm": False,
        "smooth fisher_rao": False,
        "smooth margin": False,
        "smooth path_norm": True,
        "smooth lambda_max": False,
    }


def test_a_set_that_is_not_held_out_is_refused_before_any_work(plugins: Path, go: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"'lpf\(data=val\)': model \w{16} holds no examples out \(val_size = 0\)"):
        go("mlp", '"lpf(data=val)"')
    assert not (tmp_path / "r").exists()
    done, _ = go("mlp", "random")
    with pytest.raises(RequestError, match=r"'lpf\(data=val\)'.*there are: train, test"):
        measure(tmp_path / "r", ["lpf(data=val)"], LaunchOptions(inline=True))
    assert done.results.table("failures").num_rows == 0
