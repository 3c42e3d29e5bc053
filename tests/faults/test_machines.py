"""Faults of processes and machines under Ray: hangs, announced ends, memory, nodes and heads that are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from ray.cluster_utils import Cluster
from tests.faults.conftest import Judge, finish, no_process_left, start, under_way, wait_for, workers

from flatmin.results import Results


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["sleep", "stop"])
def test_a_trial_that_hangs_is_ended_and_tried_again(
    fault: str,
    plugin: Path,
    unharmed: list[pd.DataFrame],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    judge: Judge,
) -> None:
    """It sleeps for ever in a step, or its whole process is stopped."""
    monkeypatch.setenv("FLATMIN_FAULT", fault)
    driver = start(plugin, tmp_path / "r", "--hang-timeout", "30s")
    with no_process_left(driver):
        finish(driver)
    judge({"sleep": "trial hangs", "stop": "worker SIGSTOPped"}[fault], 1, tmp_path / "r", unharmed)
    failures = Results.open(tmp_path / "r").failures()
    assert set(failures["error"]) == {"Hung: no sign of life for 30 s (--hang-timeout)"}
    if fault == "sleep":
        (log,) = (tmp_path / "r" / "logs").glob(f"{failures['trial_id'][0]}.log")
        assert "flatmin_faulty.py" in log.read_text(), "the log says where it hung"


def safe(results: Path) -> set[str]:
    """Return the trials that are saved or committed."""
    return {file.name[:16] for kind in ("checkpoints/*.state", "models/*.parquet") for file in results.glob(kind)}


@pytest.mark.slow
def test_a_worker_that_is_told_to_end_leaves_a_checkpoint_and_no_failure(
    plugin: Path, unharmed: list[pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: Judge
) -> None:
    """As on a spot machine: SIGTERM, and gone after the grace. It is no failure: none is allowed here."""
    monkeypatch.setenv("FLATMIN_FAULT", "slower")
    driver = start(plugin, tmp_path / "r", "--checkpoint-every", "1h", "--max-failures", "0")
    with no_process_left(driver):
        wait_for(lambda: bool(workers(driver.pid)), driver)
        time.sleep(1.0)  # some steps
        told = workers(driver.pid)
        for worker in told:
            worker.send_signal(signal.SIGTERM)
        wait_for(lambda: len(safe(tmp_path / "r")) >= len(told), driver)
        for worker in told:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        finish(driver)
    judge("spot notice: worker SIGTERMed, then gone", 1, tmp_path / "r", unharmed)
    results = Results.open(tmp_path / "r")
    assert results.models()["execution"].str.contains('"resumed": true').any()
    failures = results.failures()
    assert failures["error"].str.contains("going away").any()
    assert set(failures["attempt"]) == {0}


@pytest.mark.slow
def test_a_machine_whose_memory_runs_out_gets_fewer_trials(
    plugin: Path, unharmed: list[pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: Judge
) -> None:
    """Ray's memory monitor kills a worker, which ends Tune's whole run."""
    used = psutil.virtual_memory()
    threshold = 1 - 0.6 * used.available / used.total  # beside what else this machine does
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{threshold:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.setenv("FLATMIN_FAULT", "swell")
    driver = start(plugin, tmp_path / "r", "--max-failures", "1")
    with no_process_left(driver):
        said = finish(driver)
    judge("machine out of memory, worker killed by Ray", 1, tmp_path / "r", unharmed)
    assert "OutOfMemoryError" in " ".join(Results.open(tmp_path / "r").failures()["error"]), said


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, plugin: Path) -> Iterator[Cluster]:
    """Start a head without CPUs and two nodes with one each, all on this machine; they know the plug-in."""
    monkeypatch.setenv("FLATMIN_FAULT", "slow")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def pids(node: Any) -> list[int]:
    return [info.process.pid for infos in node.all_processes.values() for info in infos]


@pytest.mark.slow
def test_a_node_that_is_killed_costs_what_it_did_since_its_checkpoints(
    cluster: Cluster, plugin: Path, unharmed: list[pd.DataFrame], tmp_path: Path, judge: Judge
) -> None:
    driver = start(plugin, tmp_path / "r", "--address", cluster.address, "--max-failures", "1")
    with no_process_left(driver):
        wait_for(lambda: len(list(tmp_path.glob("r/checkpoints/*-b.state"))) == 2, driver)
        (node, *_) = (node for node in cluster.worker_nodes if workers(node.all_processes["raylet"][0].process.pid))
        family = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
        cluster.remove_node(node, allow_graceful=False)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        finish(driver)
    judge("node SIGKILLed", 1, tmp_path / "r", unharmed)
    failures = Results.open(tmp_path / "r").failures()
    assert set(failures["attempt"]) == {0}, "it had got on, so it does not count"


@pytest.mark.slow
def test_a_head_that_is_killed_ends_the_driver_and_another_cluster_goes_on(
    cluster: Cluster, plugin: Path, unharmed: list[pd.DataFrame], tmp_path: Path, judge: Judge
) -> None:
    driver = start(plugin, tmp_path / "r", "--address", cluster.address)
    with no_process_left(driver):
        wait_for(lambda: under_way(tmp_path / "r"), driver)
        family = [
            child
            for node in [cluster.head_node, *cluster.worker_nodes]
            for pid in pids(node)
            for child in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        ]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        os.kill(driver.pid, signal.SIGKILL)  # it ran on the head
        driver.wait()
    again = start(plugin, tmp_path / "r")
    with no_process_left(again):
        finish(again)
    judge("head SIGKILLed with its driver, launched again", 1, tmp_path / "r", unharmed)
