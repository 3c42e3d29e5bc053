"""Faults of the place that results are written to, and of the clocks of those that write: disks, buckets, leases."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from tests.faults.conftest import Judge, finish, no_process_left, start, under_way, wait_for

from flatmin.results import Results

SHIFTED = """\
import os, time
_time, _shift = time.time, float(os.environ["FLATMIN_SHIFT"])
time.time = lambda: _time() + _shift
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MB; only root may."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(ballast: Path) -> None:
    with open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.slow
def test_a_full_disk_is_waited_for(
    plugin: Path, unharmed: list[pd.DataFrame], small_disk: Path, monkeypatch: pytest.MonkeyPatch, judge: Judge
) -> None:
    """It is full while trials want to be committed, and freed some seconds later."""
    monkeypatch.setenv("FLATMIN_FAULT", "slow")
    driver = start(plugin, small_disk / "r", "--inline", "--max-failures", "0")
    ballast = small_disk / "ballast"
    with no_process_left(driver):
        wait_for(lambda: under_way(small_disk / "r"), driver)
        with pytest.raises(OSError, match="No space left"):
            fill(ballast)
        threading.Timer(6.0, ballast.unlink).start()
        said = finish(driver)
    assert "No space left on device" in said
    assert "tried again until some is freed" in said
    judge("disk full, freed after 6 s", 1, small_disk / "r", unharmed)
    assert Results.open(small_disk / "r").failures().empty


@pytest.mark.slow
@pytest.mark.parametrize("hours", [-7, 7])
def test_a_driver_whose_clock_has_jumped_takes_no_lease_and_is_believed(
    hours: int,
    plugin: Path,
    unharmed: list[pd.DataFrame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    judge: Judge,
) -> None:
    """The first driver's clock is right; the second's, on another host as it seems, is off; then it goes on itself."""
    folder = tmp_path / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SHIFTED)
    monkeypatch.setenv("FLATMIN_FAULT", "slow sleep")  # the first is at it until it is killed
    first = start(plugin, tmp_path / "r", "--inline")
    with no_process_left(first):
        wait_for(lambda: under_way(tmp_path / "r"), first)
        with monkeypatch.context() as shifted:
            shifted.setenv("FLATMIN_SHIFT", str(hours * 3600))
            shifted.syspath_prepend(str(folder))
            shifted.setenv("PYTHONPATH", str(folder), prepend=":")
            second = start(plugin, tmp_path / "r", "--inline")
            said = finish(second, code=2)
            assert f"in use by process {first.pid}" in said
            first.kill()
            first.wait()
            third = start(plugin, tmp_path / "r", "--inline")
            with no_process_left(third):
                finish(third)
    judge(f"clock off by {hours} h", 2, tmp_path / "r", unharmed)
    seconds = Results.open(tmp_path / "r").models()["seconds"]
    assert seconds.between(0, 3600).all(), "durations are told by a clock that does not jump"


def test_the_clock_of_these_tests_is_shifted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(SHIFTED)
    monkeypatch.setenv("FLATMIN_SHIFT", "3600")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    code = "import time, datetime; print(time.time() - datetime.datetime.now().timestamp() > 3000)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
