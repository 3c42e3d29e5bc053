"""Results in the experiment trackers that people have: TensorBoard, MLflow, Weights & Biases."""

from __future__ import annotations

import struct
import sys
import types
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tests.orchestrator.conftest import two_widths

from flatmin import Results
from flatmin.errors import RequestError
from flatmin.orchestrator.exporters import export_to


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return two_widths(tmp_path_factory.mktemp("exporters"))


def events(file: Path) -> list[Any]:
    """Return the events of a file of TensorBoard's: records of length, checksum, bytes, checksum."""
    Event = import_module("tensorboardX.proto.event_pb2").Event
    content, found = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def test_tensorboard(results: Results, tmp_path: Path) -> None:
    export_to("tensorboard", results, tmp_path / "tb")
    for row in results.epochs().groupby("model_id"):
        (file,) = (tmp_path / "tb" / str(row[0])).glob("events*")
        found = {(value.tag, event.step): value.simple_value for event in events(file) for value in event.summary.value}
        losses = [found["train_loss", epoch] for epoch in (1, 2)]
        assert losses == pytest.approx(row[1]["train_loss"].tolist(), rel=1e-6)
        assert ("val_loss", 1) not in found  # null
    assert len(list((tmp_path / "tb").iterdir())) == 4
    with pytest.raises(RequestError, match="is there already"):
        export_to("tensorboard", results, tmp_path / "tb")


def test_mlflow(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {"experiments": [], "runs": {}, "ended": []}

    class Client:
        def __init__(self, tracking_uri: str) -> None:
            made["uri"] = tracking_uri

        def create_experiment(self, name: str, artifacts: str) -> str:
            made["experiments"].append(name)
            return "1"

        def create_run(self, experiment: str, start_time: int, run_name: str) -> Any:
            made["runs"][run_name] = {"metrics": [], "params": []}
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_name))

        def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
            assert len(metrics) <= 1000
            assert len(params) <= 100
            made["runs"][run]["metrics"] += metrics
            made["runs"][run]["params"] += params

        def set_terminated(self, run: str) -> None:
            made["ended"].append(run)

    entities = types.ModuleType("mlflow.entities")
    vars(entities).update(Metric=lambda *values: values, Param=lambda *values: values)
    tracking = types.ModuleType("mlflow.tracking")
    vars(tracking).update(MlflowClient=Client)
    for module in (types.ModuleType("mlflow"), entities, tracking):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    export_to("mlflow", results, tmp_path / "ml")
    assert made["uri"] == f"sqlite:///{tmp_path}/ml/mlflow.db"
    assert made["experiments"] == ["tiny"]
    assert sorted(made["ended"]) == sorted(made["runs"]) == sorted(results.models()["model_id"])
    for row in results.wide().to_dict("records"):
        run = made["runs"][row["model_id"]]
        assert ("width", str(row["width"])) in run["params"]
        assert ("final/l2_norm", row["l2_norm"], 0, 0) in run["metrics"]
        assert ("final/loss_surface_points_per_axis_3_", row["loss_surface(points_per_axis=3)"], 0, 0) in run["metrics"]
        assert [step for name, _, _, step in run["metrics"] if name == "train_loss"] == [1, 2]


def test_wandb_is_offline(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Run:
        def __init__(self, **given: Any) -> None:
            self.given, self.ended = given, False
            self.steps: list[tuple[int, float]] = []
            self.summary: dict[str, float] = {}
            made.append(self)

        def log(self, values: Mapping[str, float], step: int) -> None:
            self.steps.append((step, values["train_loss"]))

        def finish(self) -> None:
            self.ended = True

    module = types.ModuleType("wandb")
    vars(module).update(init=Run)
    monkeypatch.setitem(sys.modules, "wandb", module)
    export_to("wandb", results, tmp_path / "wb")
    assert {run.given["mode"] for run in made} == {"offline"}
    assert {run.given["dir"] for run in made} == {str(tmp_path / "wb")}
    wide = results.wide().set_index("model_id")
    epochs = results.epochs()
    for run in made:
        own = epochs[epochs["model_id"] == run.given["id"]]
        assert run.steps == list(zip(own["epoch"], own["train_loss"], strict=True))
        assert run.given["config"]["width"] == wide.loc[run.given["id"], "width"]
        assert run.summary["final/random"] == wide.loc[run.given["id"], "random"]
        assert run.ended
    assert len(made) == 4


@pytest.mark.parametrize(
    ("viewer", "module"), [("tensorboard", "tensorboardX"), ("mlflow", "mlflow.entities"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named_with_the_command(
    viewer: Any, module: str, results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RequestError, match=rf"pip install 'flatmin-sweep\[{viewer}\]'"):
        export_to(viewer, results, tmp_path / "x")
