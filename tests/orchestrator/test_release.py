"""Export and import: the round trip, the bytes, and what is refused by name."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from tests.orchestrator.conftest import INLINE, Command, go, two_widths

import flatmin
from flatmin import Results
from flatmin.errors import RequestError, ResultsError
from flatmin.orchestrator.columns import dictionary
from flatmin.orchestrator.inspect import query, status
from flatmin.orchestrator.launch import measure
from flatmin.orchestrator.release import SUMS, export, import_study
from flatmin.tables import TABLES


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return two_widths(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def study(results: Results) -> Path:
    return results.directory.parent / "tiny.yaml"


@pytest.fixture(scope="module")
def packed(results: Results) -> Path:
    return export(results, results.directory.parent / "study.zip")


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
    assert go(study, again.directory).trained == 0
    done = go(study, again.directory, "width=2,4,8")
    assert (done.trained, done.remaining) == (2, 0)
    pd.testing.assert_frame_equal(again.models().iloc[:0].reindex(columns=before.columns), before.iloc[:0])
    assert set(before["model_id"]) < set(again.models()["model_id"])


def test_a_new_measure_of_models_without_weights_trains_them_again(study: Path, packed: Path, tmp_path: Path) -> None:
    again = import_study(packed, tmp_path / "again")
    with pytest.raises(ResultsError, match="launch the study again, with these measures"):
        measure(again.path, ["margin"], INLINE)
    before = again.models().set_index("model_id")["train_loss"]
    done = go(study, again.directory, "measures=l2_norm,margin")
    assert (done.trained, done.remaining) == (4, 0)
    assert again.wide()["margin"].notna().all()
    pd.testing.assert_series_equal(again.models().set_index("model_id")["train_loss"].loc[before.index], before)


def test_weights_come_along_where_they_are_asked_for(results: Results, tmp_path: Path) -> None:
    again = import_study(export(results, tmp_path / "w.zip", weights=True), tmp_path / "again")
    files = sorted(file.name for file in (results.path / "checkpoints").glob("*.safetensors"))
    for name in files:
        assert (again.path / "checkpoints" / name).read_bytes() == (results.path / "checkpoints" / name).read_bytes()
    assert measure(again.path, ["margin"], INLINE).measured == 4
    next((again.directory / "checkpoints").glob("*.safetensors")).unlink()
    with pytest.raises(ResultsError, match=r"\.safetensors' is missing: launch the study again, or export without"):
        export(again, tmp_path / "w2.zip", weights=True)
    assert not (tmp_path / "w2.zip").exists()


def test_nothing_is_overwritten(results: Results, packed: Path, tmp_path: Path) -> None:
    before = packed.read_bytes()
    with pytest.raises(RequestError, match="is there already"):
        export(results, packed)
    assert packed.read_bytes() == before
    with pytest.raises(ResultsError, match="is there already; import into another"):
        import_study(packed, results.directory)
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


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (6, 99, r"x\.zip' is damaged, or not a zip archive: zip file version 9\.9"),
        (8, 0x01, "is compressed or encrypted"),
        (8, 0x20, "is compressed or encrypted"),
        (8, 0x40, "is compressed or encrypted"),
    ],
    ids=["version", "encrypted", "patch", "strongly encrypted"],
)
def test_what_zipfile_cannot_read_is_refused(place: int, value: int, said: str, packed: Path, tmp_path: Path) -> None:
    """By the central directory, whose entries hold the version that is needed and the flags at these places."""
    content = bytearray(packed.read_bytes())
    content[content.index(b"PK\x01\x02") + place] = value
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(RequestError, match=said):
        import_study(tmp_path / "x.zip", tmp_path / "r")


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


def test_the_commands(packed: Path, tmp_path: Path, flatmin_sweep: Command) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        done = flatmin_sweep(*arguments)
        return done.returncode, done.stdout.decode(), done.stderr

    there, archive = str(tmp_path / "r"), str(tmp_path / "x.zip")
    assert run("import", str(packed), "--results", there) == (0, f"{there}\n", "")
    assert run("export", "--results", there, "-o", archive) == (0, f"{archive}\n", "")
    code, out, err = run("export", "--results", there, "-o", archive)
    assert (code, out) == (2, "")
    assert "is there already" in err
    code, _, err = run("export", "--results", there, "-o", str(tmp_path / "tb"), "--to", "tensorboard", "--weights")
    assert (code, "leave one out" in err) == (2, True)
