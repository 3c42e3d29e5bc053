"""Faults of a bucket: a server that is away for a while, and two drivers that start at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import boto3  # type: ignore[import-untyped]
import pandas as pd
import pytest
from moto.server import ThreadedMotoServer
from tests.faults.conftest import TIMEOUT, Judge, finish, no_process_left, start, wait_for

from flatmin import bucket
from flatmin.bucket import BucketPath
from flatmin.results import Results


class Server:
    """An S3 server of this process; what it holds outlives it, as another has the same."""

    def __init__(self) -> None:
        self._moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self.host, self.port = self._moto.get_host_and_port()

    def stop(self) -> None:
        self._moto.stop()

    def start(self) -> None:
        self._moto = ThreadedMotoServer("127.0.0.1", port=self.port, verbose=False)
        self._moto.start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Start a server, and let this process and those it starts use it."""
    made = Server()
    values = {
        "AWS_ACCESS_KEY_ID": "us",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{made.host}:{made.port}",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    bucket._store.cache_clear()
    boto3.client("s3").create_bucket(Bucket="faults")
    yield made
    boto3.resource("s3").Bucket("faults").objects.all().delete()
    made.stop()
    bucket._store.cache_clear()


@pytest.mark.slow
def test_a_bucket_that_is_away_for_a_while_is_waited_for(
    plugin: Path, unharmed: list[pd.DataFrame], server: Server, monkeypatch: pytest.MonkeyPatch, judge: Judge
) -> None:
    """It goes while trials are under way and write checkpoints, under Ray, and comes back after some seconds."""
    monkeypatch.setenv("FLATMIN_FAULT", "slow")
    place = BucketPath.parse("s3://faults/away")
    driver = start(plugin, place, "--checkpoint-every", "1s")
    with no_process_left(driver):
        wait_for(lambda: any((place / "checkpoints").glob("*.state")), driver)
        server.stop()
        time.sleep(6.0)
        server.start()
        finish(driver)
    judge("bucket unreachable for 6 s", 1, place, unharmed)
    assert Results.open(place).failures().empty
    assert not list((place / "checkpoints").glob("*.state"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", "bucket"])
def test_of_two_drivers_that_start_at_once_one_trains(
    kind: str,
    plugin: Path,
    unharmed: list[pd.DataFrame],
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    judge: Judge,
) -> None:
    monkeypatch.setenv("FLATMIN_FAULT", "slower")  # neither is done before the other has begun
    place = tmp_path / "r" if kind == "directory" else BucketPath.parse("s3://faults/two")
    drivers = [start(plugin, place, "--inline") for _ in range(2)]
    with no_process_left(drivers[0]), no_process_left(drivers[1]):
        said = [driver.communicate(timeout=TIMEOUT)[1] for driver in drivers]
    (refused,) = (text for text, driver in zip(said, drivers, strict=True) if driver.returncode == 2)
    assert "in use by process" in refused or "taken by another driver" in refused
    assert sorted(driver.returncode for driver in drivers) == [0, 2]
    judge(f"two drivers at once, {kind}", 1, place, unharmed)
