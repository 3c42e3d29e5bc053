"""The Tune trainable and the announced end of its machine: SIGTERM between two slices of work, and without work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flatmin.errors import FlatminError
from flatmin.lease import Lease
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import read_study
from flatmin.results import Results
from flatmin.trainables import tune_trainable
from flatmin.trainables.tune_trainable import Preempted, TuneTrainable
from flatmin.trial import Execution, Job

STUDY = """\
study: tiny
settings: {dataset: digits, network: mlp, width: 4, optimizer: sgd, lr: 0.05, batch_size: 300, epochs: 3}
seeds: 2
"""


@pytest.fixture
def told() -> Iterator[list[int]]:
    """Take SIGTERM in place of Ray, which ends the process; return what was told so."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def trainable(
    tmp_path: Path, told: list[int], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], tuple[Any, Results]]]:
    """Return a function that makes a trainable whose slices are one step long, with its results."""
    monkeypatch.setattr(tune_trainable, "SLICE_SECONDS", 0.0)
    file = tmp_path / "tiny.yaml"
    file.write_text(STUDY)
    (trial,) = make_plan(read_study(str(file))).trials
    results = Results.create(tmp_path / "r", "tiny")
    with Lease(results) as lease:
        job = Job(trial, str(results.path), lease.token, Execution())

        def make() -> tuple[Any, Results]:
            made = TuneTrainable.__new__(TuneTrainable)  # what Tune adds in its __init__ needs a cluster
            made.setup({"job": 0}, [job])
            return made, results

        yield make


def saved(results: Results) -> bool:
    return any(results.directory.glob("checkpoints/*.state"))


def test_one_that_is_told_between_two_slices_saves_its_job(
    trainable: Callable[[], tuple[Any, Results]], told: list[int]
) -> None:
    one, results = trainable()
    assert one.step()["done"] is False
    assert not saved(results)
    os.kill(os.getpid(), signal.SIGTERM)
    assert not told, "it does not end while a job is under way"
    with pytest.raises(Preempted):
        one.step()
    assert saved(results)
    again, _ = trainable()
    while not again.step()["done"]:
        pass
    assert results.models()["execution"].str.contains('"resumed": true').all()


def test_one_that_is_told_before_its_first_slice_begins_nothing(
    trainable: Callable[[], tuple[Any, Results]], told: list[int]
) -> None:
    one, results = trainable()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted):
        one.step()
    assert not told
    assert not saved(results)


def test_one_without_a_job_ends_at_once(trainable: Callable[[], tuple[Any, Results]], told: list[int]) -> None:
    one, _ = trainable()
    while not one.step()["done"]:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert told == [signal.SIGTERM]


class Picky(Exception):
    """An error that cannot be sent to another process: it is made of two arguments and keeps one."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


def test_an_error_that_cannot_be_sent_is_told_all_the_same(
    trainable: Callable[[], tuple[Any, Results]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*arguments: object) -> None:
        raise Picky("a bug", "step 3")

    monkeypatch.setattr("flatmin.trainables.job.network_builder", raises)
    one, _ = trainable()
    with pytest.raises(FlatminError, match="Picky: a bug at step 3"):
        one.step()
