"""Security: each promise, and an attempt to break it."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray._private import ray_constants
from rich.console import Console

from flatmin.errors import RequestError, ResultsError, StudyError
from flatmin.lease import Lease
from flatmin.orchestrator.exporters import export_to
from flatmin.orchestrator.inspect import query
from flatmin.orchestrator.launch import LaunchOptions, launch, measure
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.progress import Display
from flatmin.orchestrator.release import export, import_study
from flatmin.orchestrator.report import write_report
from flatmin.orchestrator.runner import RunOptions
from flatmin.orchestrator.study import read_study
from flatmin.orchestrator.template import new_study
from flatmin.orchestrator.tune import run_on_ray
from flatmin.results import Results
from flatmin.secrets import without_secrets
from flatmin.trainables.job import run
from flatmin.trainables.logs import TrialLog
from flatmin.trial import Execution, Job

STUDY = """\
study: tiny
settings: {dataset: digits, network: mlp, optimizer: sgd, batch_size: 250, epochs: 4}
axes: {width: [2, 4]}
"""

INLINE = LaunchOptions(inline=True)
SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "tiny.yaml"
    file.write_text(STUDY)
    return file


@pytest.fixture(scope="module")
def original(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("original") / "r"
    launch(str(study), results, options=INLINE, console=Console(file=io.StringIO()))
    return results


@pytest.fixture
def trained(original: Path, tmp_path: Path) -> Results:
    """Return results of a study's two models, for one test alone."""
    return Results.open(shutil.copytree(original, tmp_path / "r"))


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.file),)


@pytest.mark.slow
def test_a_launch_listens_on_the_loopback_alone(study: Path, tmp_path: Path) -> None:
    """Every socket of the driver, of Ray's servers and of the workers, while they train."""
    command = [sys.executable, "-m", "flatmin.orchestrator", "launch", str(study), "--results", str(tmp_path / "r")]
    heard: dict[tuple[str, str], str] = {}
    with subprocess.Popen([*command, "epochs=400"], stderr=subprocess.DEVNULL) as driver:
        while driver.poll() is None:
            for process in [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]:
                try:
                    sockets = process.net_connections("inet")
                    heard |= {(process.name(), s.laddr.ip): s.status for s in sockets if s.status == "LISTEN"}
                except psutil.Error:  # it has ended meanwhile
                    continue
            time.sleep(0.2)
    assert driver.returncode == 0
    names = " ".join(name for name, _ in heard)
    assert "gcs_server" in names
    assert "Trainable" in names
    addresses = [ip_address(address) for _, address in heard]
    assert all((getattr(a, "ipv4_mapped", None) or a).is_loopback for a in addresses), heard


def test_a_checkpoint_that_would_execute_code_is_not_read(study: Path, tmp_path: Path) -> None:
    (trial, *_) = make_plan(read_study(str(study))).trials
    results = Results.create(tmp_path / "r", "tiny")
    (tmp_path / "r" / "checkpoints").mkdir()
    for file in results.state_files(trial.trial_id):
        assert isinstance(file, Path)
        with zipfile.ZipFile(file, "w") as archive:  # as torch.save lays it out
            archive.writestr("archive/data.pkl", pickle.dumps({"model_ids": Bomb(tmp_path / "boom")}))
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
    with Lease(results) as lease:
        list(run(Job(trial, str(results.path), lease.token, Execution())))
    assert not (tmp_path / "boom").exists()
    assert len(results.models()) == len(trial.models), "it was trained from the start"
    with pytest.raises(FileExistsError):  # the bomb is one
        pickle.loads(pickle.dumps(Bomb(tmp_path)))


def test_weights_that_would_execute_code_are_not_read(trained: Results, tmp_path: Path) -> None:
    for trial_id in set(trained.models()["trial_id"]):
        weights = trained.weights_file(trial_id)
        assert isinstance(weights, Path)
        weights.write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(ResultsError, match="cannot be read"):
        measure(trained.path, ["l2_norm"], INLINE)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:os.mkdir [BOOM]", "!!python/name:os.system ''", "!!python/object:builtins.object {}"],
)
def test_yaml_that_would_execute_code_is_refused(value: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(f"{STUDY}about: {value.replace('BOOM', str(tmp_path / 'boom'))}\n")
    with pytest.raises(StudyError, match=r"study\.yaml:4: about: the tag !!python/.*; a study has no tags"):
        read_study(str(file))
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT * FROM read_blob('FOLDER/*')",
        "SELECT * FROM '/etc/passwd'",
        "SELECT * FROM parquet_scan('s3://bucket/x.parquet')",
        "ATTACH 'FOLDER/new.db'",
        "COPY (SELECT 1) TO 'FOLDER/out.csv'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SELECT getenv('HOME')",
        "SELECT * FROM models; COPY models TO 'FOLDER/out.csv'",
    ],
)
def test_sql_reaches_nothing_outside_the_results(sql: str, trained: Results, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError):
        query(trained, sql.replace("FOLDER", str(tmp_path)))
    assert sorted(tmp_path.rglob("*")) == before


def test_no_secret_is_written(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A plug-in shows the whole environment in its error, as a careless one would, and prints it to its log."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MY_API_TOKEN", SECRET[::-1])

    def careless(*_: Any) -> None:
        raise ValueError(f"{dict(os.environ)}")

    console = Console(file=io.StringIO())
    with monkeypatch.context() as broken:
        broken.setattr("flatmin.trainables.job.network_builder", careless)
        options = LaunchOptions(RunOptions(max_failures=0), inline=True)
        results = launch(str(study), tmp_path / "r", options=options, console=console).results
    assert len(results.failures()) == 2
    (trial, *_) = make_plan(read_study(str(study))).trials
    log = TrialLog(Job(trial, str(results.path), ""))
    with log:
        print(dict(os.environ))
    log.close()
    assert "HOME" in (tmp_path / "r" / "logs" / f"{trial.trial_id}.log").read_text()
    launch(str(study), tmp_path / "r", options=INLINE)
    write_report(results.path, tmp_path / "report.html")
    export(results, tmp_path / "study.zip")
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 10
    tables = [str(pq.read_table(file).to_pydict()) for file in written if file.suffix == ".parquet"]
    texts = [*tables, *(file.read_bytes().decode("latin-1") for file in written), *capfd.readouterr()]
    texts.append(console.file.getvalue())  # type: ignore[attr-defined]
    for text in texts:
        assert SECRET not in text
        assert SECRET[::-1] not in text


@pytest.mark.parametrize("uri", [f"s3://AKIAEXAMPLE:{SECRET.replace('/', '_')}@bucket/x", "gs://user@bucket/x"])
def test_a_uri_with_credentials_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ResultsError, match="holds no credentials") as refused:
        Results(uri)
    assert uri.partition("://")[2].partition("@")[0] not in str(refused.value)
    assert without_secrets(f"cannot reach {uri}!") == f"cannot reach {uri[:5]}***@bucket/x!"


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "a\\b", "..", ".", "", "a\n", "x\0y", "-rf", "é"])
def test_names_of_studies_lead_nowhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        new_study(name, folder=tmp_path / "in")
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.replace("study: tiny", f"study: {name!r}"))
    with pytest.raises(StudyError):
        read_study(str(file))
    assert sorted(tmp_path.rglob("*")) == [file]


@pytest.mark.parametrize("setting", ["dataset", "network", "optimizer"])
@pytest.mark.parametrize("name", ["../../x", "os:system", "/etc/passwd", "flatmin.trainables.networks.mlp"])
def test_names_of_plugins_are_looked_up_and_never_opened(setting: str, name: str, study: Path) -> None:
    with pytest.raises(RequestError, match=f"there is no {setting}"):
        read_study(str(study), [f"{setting}={name}"])


@pytest.mark.parametrize("trial_id", ["../outside", "/tmp/outside", "a/b", "..", "", "x\0"])
def test_a_trial_id_of_somebody_elses_table_leads_nowhere(trial_id: str, trained: Results) -> None:
    """Files are named after it, and removed: weights that are lost make `launch` train again."""
    for place in (trained.weights_file, trained.state_files, trained.log_file):
        with pytest.raises(ResultsError, match="is no name of a trial"):
            place(trial_id)
    with pytest.raises(ResultsError, match="is no name of a trial"):
        trained.table_file("models", trial_id)


def test_a_model_id_of_somebody_elses_table_leads_nowhere(trained: Results, tmp_path: Path) -> None:
    """TensorBoard gets a folder named after each model."""
    for table in ("models", "epochs"):
        for file in (trained.directory / table).glob("*.parquet"):
            rows = pq.read_table(file)
            evil = pa.array([f"../../evil{one}" for one in rows["model_id"].to_pylist()])
            pq.write_table(rows.set_column(0, "model_id", evil), file)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ResultsError, match="is no name of a trial"):
        export_to("tensorboard", trained, tmp_path / "a" / "b" / "c")
    assert sorted(tmp_path.iterdir()) == before


def test_the_address_local_is_a_private_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes the word for a cluster of one's own, too, and would let it listen on all interfaces."""
    seen = list[tuple[str, bool]]()

    def init(address: str, **given: object) -> None:
        seen.append((address, ray_constants.ENABLE_RAY_CLUSTER))
        raise RuntimeError("enough")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    results, options = Results.create(tmp_path / "r", "tiny"), RunOptions(address="local")
    with Display(Console(file=io.StringIO()), 0, 0) as display, pytest.raises(RequestError, match="enough"):
        run_on_ray(results, list, options, display, Lease(results))
    assert set(seen) == {("local", False)}


@pytest.mark.parametrize("name", ["../evil.txt", "checkpoints/../../evil.safetensors", "/tmp/evil.safetensors"])
def test_an_archive_unpacks_nothing_outside(name: str, trained: Results, tmp_path: Path) -> None:
    archive = export(trained, tmp_path / "s.zip")
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr(name, b"x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match="does not belong"):
        import_study(archive, tmp_path / "in" / "r")
    assert [file for file in sorted(tmp_path.rglob("*")) if file not in (*before, tmp_path / "in")] == []
    assert not Path("/tmp/evil.safetensors").exists()


def test_a_link_in_an_archive_becomes_no_link(trained: Results, tmp_path: Path) -> None:
    """Weights that are a link to a file outside: what is unpacked is a plain file with the link's own bytes."""
    archive = export(trained, tmp_path / "s.zip")
    link = zipfile.ZipInfo("checkpoints/evil.safetensors")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive) as opened:
        members = {name: opened.read(name) for name in opened.namelist() if name != "SHA256SUMS"}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as made:
        for name, content in members.items():
            made.writestr(name, content)
        made.writestr(link, "/etc/passwd")
    with pytest.raises(RequestError, match=r"'SHA256SUMS' is missing"):
        import_study(tmp_path / "x.zip", tmp_path / "in")
    sums = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n"
        for name, content in {**members, link.filename: b"/etc/passwd"}.items()
    )
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as made:
        made.writestr("SHA256SUMS", sums)
    import_study(tmp_path / "x.zip", tmp_path / "in")
    assert not any(file.is_symlink() for file in (tmp_path / "in").rglob("*"))
    assert (tmp_path / "in" / "checkpoints" / "evil.safetensors").read_bytes() == b"/etc/passwd"
