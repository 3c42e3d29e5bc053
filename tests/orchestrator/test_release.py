"""Export and import: the round trip, the bytes, and what is refused by name."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
import types
import warnings
import zipfile
from collections.abc import Callable, Mapping
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

import flatmin
from flatmin import Results
from flatmin.errors import RequestError, ResultsError
from flatmin.orchestrator.cli import main
from flatmin.orchestrator.columns import dictionary
from flatmin.orchestrator.exporters import export_to
from flatmin.orchestrator.inspect import query, status
from flatmin.orchestrator.launch import LaunchOptions, launch, measure
from flatmin.orchestrator.release import SUMS, export, import_study
from flatmin.tables import TABLES

INLINE = LaunchOptions(inline=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("release") / "tiny.yaml"
    file.write_text(
        "study: tiny\nabout: Two widths.\nsource: Nobody 2020\n"
        "settings: {dataset: digits, network: mlp, optimizer: sgd, lr: 0.05, batch_size: 250, epochs: 2}\n"
        "axes: {width: [2, 4]}\nseeds: 2\nmeasures: [l2_norm, 'loss_surface(points_per_axis=3)']\n"
    )
    return file


@pytest.fixture(scope="module")
def results(study: Path) -> Results:
    found: Results = go(study, study.parent / "results").results
    measure(found.path, ["random"], INLINE)
    for attempt in (1, 2):  # of a model that was trained in the end
        row = found.table("models").to_pylist()[0]
        at = {"model_id": row["model_id"], "trial_id": row["trial_id"], "at": row["started_at"]}
        found.write("failures", f"{row['trial_id']}-{attempt}", [{**at, "attempt": attempt, "error": "lost node"}])
    return found


@pytest.fixture(scope="module")
def packed(results: Results) -> Path:
    return export(results, results.path.parent / "study.zip")


def go(study: Path, path: Path, *overrides: str) -> Any:
    return launch(str(study), path, overrides, INLINE, Console(quiet=True))


def contents(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def repack(path: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive; where its sums are not given, right ones are made."""
    with zipfile.ZipFile(path, "w", compression) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
        if SUMS not in files:
            sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
            opened.writestr(SUMS, "".join(f"{value}  {name}\n" for name, value in sums.items()))
    return path


def test_the_tables_come_back_equal(results: Results, packed: Path, tmp_path: Path) -> None:
    again = import_study(packed, tmp_path / "again")
    for table in TABLES:
        assert again.table(table).equals(results.table(table)), table
    assert [len(results.table(table)) for table in TABLES] == [4, 4, 8, 12, 12, 2]
    pd.testing.assert_frame_equal(again.wide(), results.wide())
    assert again.measured() == results.measured()
    assert again.study_file.read_bytes() == results.study_file.read_bytes()
    assert status(again) == status(results)
    assert query(again, "SELECT count(*) AS n FROM sharpness")["n"].tolist() == [12]
    assert flatmin.report(again.path, tmp_path / "report.html").exists()


def test_the_same_results_give_the_same_bytes(results: Results, packed: Path, tmp_path: Path) -> None:
    assert export(results, tmp_path / "b.zip").read_bytes() == packed.read_bytes()
    again = import_study(packed, tmp_path / "again")
    first, second = (contents(archive) for archive in (packed, export(again, tmp_path / "c.zip")))
    assert [name for name in first if first[name] != second[name]] == ["manifest.json", SUMS]  # says: without weights


def test_what_is_in_it_can_be_read_without_this_package(results: Results, packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as opened:
        opened.extractall(tmp_path)
    subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=tmp_path, check=True, capture_output=True)
    frame = pd.read_parquet(tmp_path / "tables" / "models.parquet")
    pd.testing.assert_frame_equal(frame, results.models())
    columns = pd.read_csv(tmp_path / "columns.csv", keep_default_na=False)
    assert list(columns.itertuples(index=False, name=None)) == [
        (entry.table, entry.column, entry.type, entry.unit, entry.about) for entry in dictionary(results)
    ]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["rows"]["models"] == 4
    (run,) = manifest["trained_with"]
    assert run["models"] == 4
    assert {"torch", "flatmin-sweep"} <= set(run["versions"])
    assert manifest["lease"]["host"] == manifest["lease"]["token"] == ""
    readme = (tmp_path / "README.md").read_text()
    assert "# tiny\n\nTwo widths.\n\nSource: Nobody 2020\n" in readme
    assert "4 trained models of 4 planned" in readme


def test_a_launch_goes_on_from_an_import(study: Path, packed: Path, tmp_path: Path) -> None:
    again = import_study(packed, tmp_path / "again")
    before = again.models()
    assert go(study, again.path).trained == 0
    done = go(study, again.path, "width=2,4,8")
    assert (done.trained, done.remaining) == (2, 0)
    pd.testing.assert_frame_equal(again.models().iloc[:0].reindex(columns=before.columns), before.iloc[:0])
    assert set(before["model_id"]) < set(again.models()["model_id"])


def test_a_new_measure_of_models_without_weights_trains_them_again(study: Path, packed: Path, tmp_path: Path) -> None:
    again = import_study(packed, tmp_path / "again")
    with pytest.raises(ResultsError, match="launch the study again, with these measures"):
        measure(again.path, ["margin"], INLINE)
    before = again.models().set_index("model_id")["train_loss"]
    done = go(study, again.path, "measures=l2_norm,margin")
    assert (done.trained, done.remaining) == (4, 0)
    assert again.wide()["margin"].notna().all()
    pd.testing.assert_series_equal(again.models().set_index("model_id")["train_loss"].loc[before.index], before)


def test_weights_come_along_where_they_are_asked_for(results: Results, tmp_path: Path) -> None:
    again = import_study(export(results, tmp_path / "w.zip", weights=True), tmp_path / "again")
    files = sorted(file.name for file in (results.path / "checkpoints").glob("*.safetensors"))
    for name in files:
        assert (again.path / "checkpoints" / name).read_bytes() == (results.path / "checkpoints" / name).read_bytes()
    assert measure(again.path, ["margin"], INLINE).measured == 4
    next((again.path / "checkpoints").glob("*.safetensors")).unlink()
    with pytest.raises(ResultsError, match=r"\.safetensors' is missing: launch the study again, or export without"):
        export(again, tmp_path / "w2.zip", weights=True)
    assert not (tmp_path / "w2.zip").exists()


def test_nothing_is_overwritten(results: Results, packed: Path, tmp_path: Path) -> None:
    before = packed.read_bytes()
    with pytest.raises(RequestError, match="is there already"):
        export(results, packed)
    assert packed.read_bytes() == before
    with pytest.raises(ResultsError, match="is there already; import into another"):
        import_study(packed, results.path)
    with pytest.raises(RequestError, match="there is no archive"):
        import_study(tmp_path / "nowhere.zip", tmp_path / "r")
    (tmp_path / "r").mkdir()
    assert import_study(packed, tmp_path / "r").path == tmp_path / "r"  # an empty directory is nothing


Change = Callable[[dict[str, bytes]], object]


def other_rows(name: str, column: str, value: str) -> Change:
    """Return a change that puts a value in a column, with sums that fit."""

    def change(files: dict[str, bytes]) -> None:
        rows = pq.read_table(BytesIO(files[name]))
        place = rows.schema.get_field_index(column)
        rows = rows.set_column(place, column, [[value] * len(rows)])
        sink = BytesIO()
        pq.write_table(rows, sink)
        files[name] = sink.getvalue()
        del files[SUMS]

    return change


def with_file(name: str) -> Change:
    return lambda files: (files.update({name: b"x"}), files.pop(SUMS))


REFUSED: Mapping[str, tuple[Change, str]] = {
    "damaged": (
        lambda files: files.update({"study.yaml": files["study.yaml"] + b"#"}),
        "'study.yaml' is damaged: its SHA-256",
    ),
    "missing": (lambda files: files.pop("tables/epochs.parquet"), "'tables/epochs.parquet' is missing"),
    "missing, unlisted": (
        lambda files: (files.pop("tables/epochs.parquet"), files.pop(SUMS)),
        "'tables/epochs.parquet' is missing",
    ),
    "unlisted": (
        lambda files: files.update({"checkpoints/abc.safetensors": b""}),
        "'checkpoints/abc.safetensors' is not in SHA256SUMS",
    ),
    "extra": (with_file("notes.txt"), "'notes.txt' does not belong"),
    "upwards": (with_file("../outside.txt"), "'../outside.txt' does not belong"),
    "upwards in a folder": (with_file("checkpoints/../../x.safetensors"), "does not belong"),
    "absolute": (with_file("/tmp/x.safetensors"), "'/tmp/x.safetensors' does not belong"),
    "backslash": (with_file("checkpoints\\..\\x.safetensors"), "does not belong"),
    "a trial that is a path": (
        other_rows("tables/epochs.parquet", "trial_id", "../../outside"),
        "'tables/epochs.parquet' has a trial_id that is no name",
    ),
    "no table": (
        lambda files: (files.update({"tables/plan.parquet": b"PAR1"}), files.pop(SUMS)),
        "'tables/plan.parquet' is not a table",
    ),
    "another table": (
        lambda files: (files.update({"tables/plan.parquet": files["tables/epochs.parquet"]}), files.pop(SUMS)),
        "'tables/plan.parquet' lacks the column study",
    ),
    "another version": (
        lambda files: (
            files.update({"manifest.json": files["manifest.json"].replace(b'"format": 1', b'"format": 2')}),
            files.pop(SUMS),
        ),
        "'manifest.json' has format 2, schema 1; this version reads 1 and 1",
    ),
    "no manifest": (
        lambda files: (files.update({"manifest.json": b"[]"}), files.pop(SUMS)),
        "'manifest.json' cannot be read",
    ),
    "sums": (lambda files: files.update({SUMS: b"nonsense"}), "'SHA256SUMS' is damaged"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_wrong_in_an_archive_is_refused_by_name(what: str, packed: Path, tmp_path: Path) -> None:
    change, said = REFUSED[what]
    files = contents(packed)
    change(files)
    (tmp_path / "in").mkdir()
    archive = repack(tmp_path / "in" / "x.zip", files)
    with pytest.raises(RequestError) as refused:
        import_study(archive, tmp_path / "in" / "r")
    assert said in str(refused.value)
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "x.zip"]


def test_bombs_and_other_archives_are_refused(packed: Path, tmp_path: Path) -> None:
    files = contents(packed) | {"README.md": b"0" * 10_000_000}
    with pytest.raises(RequestError, match=r"'README\.md' is compressed"):
        import_study(repack(tmp_path / "bomb.zip", files, zipfile.ZIP_DEFLATED), tmp_path / "r")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as opened:
        opened.writestr("README.md", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            opened.writestr("README.md", b"")
    with pytest.raises(RequestError, match=r"'README\.md' is in it twice"):
        import_study(tmp_path / "twice.zip", tmp_path / "r")
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(RequestError, match=r"text\.zip' is damaged, or not a zip archive"):
        import_study(tmp_path / "text.zip", tmp_path / "r")
    (tmp_path / "cut.zip").write_bytes(packed.read_bytes()[:-2000])
    with pytest.raises(RequestError, match=r"cut\.zip' is damaged, or not a zip archive"):
        import_study(tmp_path / "cut.zip", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_every_flipped_byte_is_noticed(packed: Path, tmp_path: Path) -> None:
    content = packed.read_bytes()
    with zipfile.ZipFile(packed) as opened:
        starts = {info.filename: info.header_offset + 30 + len(info.filename) + 40 for info in opened.infolist()}
    for name, start in starts.items():
        damaged = bytearray(content)
        damaged[start] ^= 1
        (tmp_path / "x.zip").write_bytes(damaged)
        with pytest.raises(RequestError, match=name.replace(".", r"\.")):
            import_study(tmp_path / "x.zip", tmp_path / "r")


def test_empty_results_make_the_round_trip(tmp_path: Path) -> None:
    empty = Results.create(tmp_path / "r", "made-up")
    again = import_study(export(empty, tmp_path / "x.zip"), tmp_path / "again")
    assert again.models().empty
    assert query(again, "SELECT * FROM wide").empty


def test_the_commands(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["flatmin-sweep", *arguments])
        monkeypatch.setattr("warnings.showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    there, archive = str(tmp_path / "r"), str(tmp_path / "x.zip")
    assert run("import", str(packed), "--results", there) == (0, f"{there}\n", "")
    assert run("export", "--results", there, "-o", archive) == (0, f"{archive}\n", "")
    code, out, err = run("export", "--results", there, "-o", archive)
    assert (code, out) == (2, "")
    assert "is there already" in err
    code, _, err = run("export", "--results", there, "-o", str(tmp_path / "tb"), "--to", "tensorboard", "--weights")
    assert (code, "leave one out" in err) == (2, True)


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
