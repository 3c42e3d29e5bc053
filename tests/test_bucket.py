"""Results in a bucket: a real S3 protocol over HTTP, served by moto in this process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pandas as pd
import pytest
from moto.server import ThreadedMotoServer
from tests.orchestrator.conftest import fill

from flatmin import bucket, compact, lease, merged
from flatmin.analysis.reading import read_table
from flatmin.bucket import BucketPath, Changed
from flatmin.errors import LeaseLost, RequestError, ResultsError
from flatmin.lease import Lease
from flatmin.orchestrator.correlate import correlate_table
from flatmin.orchestrator.inspect import query, status
from flatmin.orchestrator.launch import LaunchOptions, launch, measure
from flatmin.orchestrator.release import export, import_study
from flatmin.orchestrator.report import write_report
from flatmin.results import Results
from flatmin.trainables.logs import TrialLog
from flatmin.trial import Job, Trial

STUDY = """\
study: tiny
settings: {dataset: digits, network: mlp, optimizer: sgd, batch_size: 200, epochs: 2}
axes: {width: [2, 3], lr: [0.05, 0.1]}
seeds: 2
measures: [l2_norm]
"""

INLINE = LaunchOptions(inline=True)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Return the address of an S3 server."""
    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def place(server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URI of a bucket of its own, in the environment of this process and those it starts."""
    point_to(server, monkeypatch)
    name = "b-" + request.node.name.replace("_", "-").lower()[:60].strip("-")
    boto3.client("s3", endpoint_url=server).create_bucket(Bucket=name)
    return f"s3://{name}"


def point_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "AWS_ACCESS_KEY_ID": "us",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    bucket._store.cache_clear()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("study") / "tiny.yaml"
    file.write_text(STUDY)
    return str(file)


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.sort_values("model_id", ignore_index=True).drop(columns=["seconds", "started_at", "execution"])


def test_paths(place: str) -> None:
    root = BucketPath.parse(f"{place}/a/b/")
    file = root / "t" / "x.parquet"
    assert (str(root), str(file)) == (f"{place}/a/b", f"{place}/a/b/t/x.parquet")
    assert (file.name, file.stem, file.suffix) == ("x.parquet", "x", ".parquet")
    assert not file.exists()
    assert not root.is_dir()
    with pytest.raises(FileNotFoundError, match="no such object"):
        file.read_bytes()
    file.write_bytes(b"one")
    (root / "t" / "y.tmp").write_bytes(b"two")
    (root / "tt" / "x.parquet").write_bytes(b"three")
    assert file.read_bytes() == b"one"
    assert file.stat().st_size == 3
    assert [entry.name for entry in (root / "t").glob("*.parquet")] == ["x.parquet"]
    assert next(iter((root / "t").glob("*.parquet"))).stat() == file.stat()
    assert sorted(entry.name for entry in root.iterdir()) == ["t", "tt"]
    with bucket.local_copy(file) as copy:
        assert copy.read_bytes() == b"one"
    assert not copy.exists()
    file.unlink()
    file.unlink(missing_ok=True)
    assert not file.exists()


def test_a_conditional_put_takes_only_what_was_read(place: str) -> None:
    file = BucketPath.parse(f"{place}/lease.json")
    tag = file.write_if(b"1", None)
    with pytest.raises(Changed):
        file.write_if(b"2", None)
    new = file.write_if(b"3", tag)
    with pytest.raises(Changed):
        file.write_if(b"4", tag)
    assert file.read_tagged() == (b"3", new)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s4://bucket/x", "results go to a directory, s3://BUCKET/NAME or gs://BUCKET/NAME"),
        ("http://bucket/x", "results go to a directory"),
        ("s3:///x", "give s3://BUCKET/NAME"),
        ("s3://bucket/a/../x", "without '.' and '..'"),
    ],
)
def test_other_uris_are_refused(uri: str, said: str) -> None:
    with pytest.raises(ResultsError) as caught:
        Results(uri)
    assert said in str(caught.value)


def test_a_study_in_a_bucket_is_the_same_as_in_a_directory(place: str, study: str, tmp_path: Path) -> None:
    uri = f"{place}/results/tiny"
    launched = launch(study, uri, options=INLINE)
    assert (launched.trained, launched.remaining, launched.exit_code) == (8, 0, 0)
    launch(study, tmp_path / "r", options=INLINE)
    here, there = Results.open(tmp_path / "r"), Results.open(uri)
    pd.testing.assert_frame_equal(ordered(there.models()), ordered(here.models()))
    pd.testing.assert_frame_equal(there.epochs().drop(columns="seconds"), here.epochs().drop(columns="seconds"))

    again = launch(study, uri, options=INLINE)
    assert (again.trained, again.measured, again.remaining) == (0, 0, 0)
    assert measure(uri, ["gradient_norm"], INLINE).measured == 8  # from the saved weights
    assert status(uri).finished == 8
    assert query(uri, "SELECT count(*) AS n FROM wide WHERE gradient_norm IS NOT NULL")["n"].tolist() == [8]
    assert correlate_table(uri, measures=["l2_norm"]).n == 8
    write_report(uri, tmp_path / "report.html")
    assert "l2_norm" in (tmp_path / "report.html").read_text()
    back = import_study(export(there, tmp_path / "s.zip", weights=True), tmp_path / "back")
    assert back.table("models").equals(there.table("models"))
    assert len(list((tmp_path / "back" / "checkpoints").iterdir())) == len(set(there.models()["trial_id"]))


def test_lost_weights_and_damaged_files_are_made_again(place: str, study: str) -> None:
    results = launch(study, f"{place}/r", options=INLINE).results
    before = ordered(results.models())
    first, second = sorted(set(before["trial_id"]))[:2]
    results.remove(results.weights_file(first))
    damaged = results.table_file("epochs", second)
    assert isinstance(damaged, BucketPath)
    damaged.write_bytes(b"PAR1 damaged")
    launched = launch(study, f"{place}/r", options=INLINE)
    assert launched.trained == (before["trial_id"].isin([first, second])).sum()
    pd.testing.assert_frame_equal(ordered(results.models()), before)


def test_many_files_are_read_once_and_then_from_the_cache(place: str) -> None:
    results = Results.create(f"{place}/many", "tiny")
    rows = [{"model_id": f"{i:016x}", "trial_id": "t", "epoch": 1, "train_loss": float(i)} for i in range(80)]
    for i, row in enumerate(rows):
        results.write("epochs", f"{i:03d}", [row])
    first = results.read("epochs")
    assert first["train_loss"].to_pylist() == [float(i) for i in range(80)]
    assert (results.path / "cache" / "epochs.arrow").exists()
    damaged = results.table_file("epochs", "007")
    assert isinstance(damaged, BucketPath)
    assert results.read("epochs").equals(first)
    time.sleep(1.1)  # buckets tell time in seconds
    results.write("epochs", "007", [{**rows[7], "train_loss": -1.0}])
    assert results.read("epochs")["train_loss"].to_pylist()[7] == -1.0


def test_one_driver_owns_a_bucket(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results.create(f"{place}/r", "tiny")
    with Lease(results) as held:
        lease.check(results, held.token)
        with pytest.raises(ResultsError, match="is in use by process"), Lease(results):
            pass
    with pytest.raises(LeaseLost):
        lease.check(results, held.token)  # given back


def test_of_two_drivers_that_find_an_expired_lease_one_gets_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results.create(f"{place}/r", "tiny")
    first, second = Lease(results), Lease(results)
    read, entered = lease._read, list[Lease]()

    def interrupted(results: Results) -> Any:
        found = read(results)
        if not entered:  # what the first has read is old when it gets it
            entered.append(second)
            second.__enter__()
        return found

    monkeypatch.setattr(lease, "_read", interrupted)
    with pytest.raises(ResultsError, match="was taken by another driver just now"):
        first.__enter__()
    lease.check(results, second.token)
    second.__exit__(None, None, None)


def test_an_owner_that_was_away_learns_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.05)
    results = Results.create(f"{place}/r", "tiny")
    with Lease(results) as first:
        monkeypatch.setattr(lease, "fresh", lambda held: False)
        monkeypatch.setattr(Lease, "_beats", lambda self, held: False)
        with Lease(results) as second:
            until = time.monotonic() + 10
            while not first.lost and time.monotonic() < until:
                time.sleep(0.02)
            with pytest.raises(LeaseLost):
                first.raise_if_lost()
            lease.check(results, second.token)


def test_what_cannot_be_reached_is_said_at_once(place: str, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResultsError, match="'s3://no-such-bucket/r' cannot be used"):
        Results.open("s3://no-such-bucket/r")
    with pytest.raises(ResultsError, match=r"'s3://no-such-bucket/t\.csv' cannot be used"):
        correlate_table("s3://no-such-bucket/t.csv")
    with pytest.raises(ResultsError, match="there is no results directory"):
        Results.open(f"{place}/nowhere")
    BucketPath.parse(f"{place}/full/thesis.tex").write_bytes(b"")
    with pytest.raises(ResultsError, match="is not empty"):
        Results.create(f"{place}/full", "tiny")
    point_to("http://127.0.0.1:9", monkeypatch)
    started = time.monotonic()
    with pytest.raises(ResultsError, match="the bucket did not answer"):
        Results.create(f"{place}/r", "tiny")
    assert time.monotonic() - started < 60


def test_a_trials_log_is_put_there_at_its_end(place: str) -> None:
    log = TrialLog(Job(Trial("tiny", (), committed_as="abc"), f"{place}/r", "token"))
    with log:
        print("said")
    kept = Results(f"{place}/r").log_file("abc")
    assert not kept.exists()
    log.close()
    assert kept.read_text().endswith(" said\n")


def test_tables_of_anybody(place: str, tmp_path: Path) -> None:
    table = pd.DataFrame({"lr": [1.0, 2.0], "flat": [0.1, 0.2]})
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_parquet(tmp_path / "t.parquet")
    root = BucketPath.parse(f"{place}/tables")
    (root / "t.csv").write_bytes(tmp_path / "t.csv")
    (root / "parts" / "t.parquet").write_bytes(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(read_table(f"{place}/tables/t.csv"), table)
    pd.testing.assert_frame_equal(read_table(f"{place}/tables/parts"), table)
    with pytest.raises(RequestError, match="no such file"):
        read_table(f"{place}/tables/u.csv")


def test_ray_workers_write_to_it(place: str, study: str) -> None:
    command = [sys.executable, "-m", "flatmin.orchestrator", "launch", study, "--results", f"{place}/ray"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert status(f"{place}/ray").finished == 8
    assert (Results.open(f"{place}/ray").path / "logs" / "ray.log").exists()


def test_files_are_merged_in_a_bucket(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = fill(f"{place}/r", trials=3)
    before = results.table("epochs")
    compact.compact(results)
    assert [file.name for file in (results.path / "epochs").iterdir()] == list(merged.read(results.path).of("epochs"))
    assert results.table("epochs") == before
    results.write("epochs", "t00003", [{"model_id": "m00003a", "trial_id": "t00003", "epoch": 1}])
    results.write("models", "t00003", [{"model_id": "m00003a", "trial_id": "t00003", "study": "made-up"}])
    published, forgotten = merged.publish, list[str]()

    def overtaken(*arguments: Any) -> None:
        """Publish after the owner of the lease took a trial out, which has been read already."""
        if not forgotten:
            forgotten.append("t00001")
            compact.forget(results, "models", forgotten)
        published(*arguments)

    monkeypatch.setattr(merged, "publish", overtaken)
    compact.compact(results)
    assert {row["trial_id"] for row in results.table("models").to_pylist()} == {"t00000", "t00002", "t00003"}
    assert len(list((results.path / "models").iterdir())) == 1
