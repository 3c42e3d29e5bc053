"""Checkpoints: a trial that was stopped anywhere goes on to the same bits."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from flatmin import files
from flatmin.bucket import Place
from flatmin.lease import Lease
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import read_study
from flatmin.results import Results
from flatmin.trainables import checkpoint
from flatmin.trainables.checkpoint import Checkpoints, load_weights, weights_hash
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.job import load_dataset, run
from flatmin.trainables.trainer import StackTrainer, network_builder
from flatmin.trial import Execution, Job, Trial

STUDY = """\
study: tiny
settings: {dataset: digits, network: %s, dropout: 0.3, lr: 0.05, batch_size: 300, epochs: 5, label_noise: 0.2}
axes: {optimizer: [%s], stop_loss: [0.0, 1.2], data_noise: [0.0, 0.1]}
seeds: 2
"""


def trial(tmp_path: Path, optimizer: str) -> Trial:
    file = tmp_path / f"{optimizer}.yaml"
    file.write_text(STUDY % ("mlp", optimizer))
    (only,) = make_plan(read_study(str(file))).trials
    return only


def stop_after(job: Job, steps: int) -> None:
    work = run(job)
    for _ in range(steps):
        next(work)
    work.close()


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "sam-sgd"])
def test_stopped_and_gone_on_is_bitwise_the_undisturbed_run(tmp_path: Path, optimizer: str) -> None:
    """Stopped in the middle of an epoch, at its end, and one step before the last."""
    one = trial(tmp_path, optimizer)
    weights, rows = [], []
    for name, stops in (("whole", []), ("stopped", [2, 2, 5, 10])):
        results = Results.create(tmp_path / name, "tiny")
        with Lease(results) as lease:
            job = Job(one, str(results.path), lease.token, Execution())
            for steps in stops:
                stop_after(job, steps)
                assert any(file.exists() for file in results.state_files(one.trial_id))
            for _ in run(job):
                pass
        assert not any(file.exists() for file in results.state_files(one.trial_id))
        trainer = StackTrainer(one, _digits(), network_builder(one.program, (1, 8, 8), 10), Execution())
        weights.append(load_weights(results, one, trainer.network, [], torch.device("cpu")))
        drop = ["seconds", "started_at", "execution"]
        rows.append((results.models().drop(columns=drop), results.epochs().drop(columns="seconds")))
    assert torch.equal(weights[0][0], weights[1][0])
    assert rows[0][0].equals(rows[1][0])
    assert rows[0][1].equals(rows[1][1])
    # The metadata's hashes are those of the initial weights, made again from the seed.
    assert weights[0][2] == [weights_hash(row) for row in trainer.progress.params]


def test_a_study_may_list_its_values_in_another_order_after_a_kill(tmp_path: Path) -> None:
    """The stack's members keep their places, so every model goes on as itself."""
    plain, text = tmp_path / "a.yaml", STUDY % ("mlp", "sgd")
    plain.write_text(text)
    turned = tmp_path / "b.yaml"
    turned.write_text(text.replace("[0.0, 1.2]", "[1.2, 0.0]").replace("[0.0, 0.1]", "[0.1, 0.0]"))
    (one,), (other,) = (make_plan(read_study(str(file))).trials for file in (plain, turned))
    assert one == other
    results, whole = Results.create(tmp_path / "r", "tiny"), Results.create(tmp_path / "whole", "tiny")
    with Lease(results) as lease:
        stop_after(Job(one, str(results.path), lease.token, Execution()), 7)
        list(run(Job(other, str(results.path), lease.token, Execution())))
    with Lease(whole) as lease:
        list(run(Job(one, str(whole.path), lease.token, Execution())))
    drop = ["seconds", "started_at", "execution"]
    assert results.models().drop(columns=drop).equals(whole.models().drop(columns=drop))


def test_a_checkpoint_of_models_in_other_places_is_not_used(tmp_path: Path) -> None:
    one = trial(tmp_path, "sgd")
    turned = Trial(one.study, one.models[::-1], one.measures)
    results = Results.create(tmp_path / "r", "tiny")
    with Lease(results) as lease:
        stop_after(Job(one, str(results.path), lease.token, Execution()), 3)
        trainer = StackTrainer(turned, _digits(), network_builder(one.program, (1, 8, 8), 10), Execution())
        assert turned.trial_id == one.trial_id
        assert not Checkpoints(results, trainer).restore()


def test_a_torn_checkpoint_falls_back_to_the_one_before_and_two_to_the_start(tmp_path: Path) -> None:
    """What the same kill has torn is passed over; which of the two was left is seen from where training goes on."""
    one = trial(tmp_path, "sgd")
    results = Results.create(tmp_path / "r", "tiny")
    with Lease(results) as lease:
        job = Job(one, str(results.path), lease.token, Execution(checkpoint_seconds=0.0))
        stop_after(job, 8)  # the last two steps are kept
        trainer = StackTrainer(one, _digits(), network_builder(one.program, (1, 8, 8), 10), Execution())
        pair = sorted(results.state_files(one.trial_id), key=lambda file: place(file))
        assert place(pair[1]) == (2, 0)  # four steps an epoch
        assert place(pair[0]) < place(pair[1])
        newest, before = pair[1].read_bytes(), place(pair[0])
        for torn in (newest[: len(newest) // 2], newest[:-100], b""):
            pair[1].write_bytes(torn)
            assert Checkpoints(results, trainer).restore()
            assert (trainer.progress.epoch, trainer.progress.step) == before
            assert not pair[1].exists()
        for file in pair:
            file.write_bytes(b"PK torn")
        list(run(job))
    assert len(results.models()) == len(one.models)


def place(file: Place) -> tuple[int, int]:
    progress = torch.load(io.BytesIO(file.read_bytes()), weights_only=True)["progress"]
    return progress["epoch"], progress["step"]


def test_what_goes_wrong_while_a_checkpoint_is_written_is_raised_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trial(tmp_path, "sgd")
    results = Results.create(tmp_path / "r", "tiny")

    def refused(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    with Lease(results) as lease:
        monkeypatch.setattr("flatmin.trainables.checkpoint.write_atomically", refused)
        with pytest.raises(OSError, match="Input/output error"):
            list(run(Job(one, str(results.path), lease.token, Execution(checkpoint_seconds=0.0))))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes written are those of the step at which the checkpoint was taken, not of a later one."""
    one = trial(tmp_path, "sgd")
    results = Results.create(tmp_path / "r", "tiny")
    trainer = StackTrainer(one, _digits(), network_builder(one.program, (1, 8, 8), 10), Execution())
    release, write = threading.Event(), files.write_atomically

    def slowly(*given: Any) -> None:
        assert release.wait(30)
        write(*given)

    monkeypatch.setattr(checkpoint, "write_atomically", slowly)
    training, checkpoints = trainer.train(), Checkpoints(results, trainer)
    next(training)
    taken = trainer.progress.params.clone()
    checkpoints.save()
    for _ in range(3):
        next(training)
        assert not checkpoints.ready
    release.set()
    checkpoints.close()
    (file,) = (file for file in results.state_files(one.trial_id) if file.exists())
    saved = torch.load(io.BytesIO(file.read_bytes()), weights_only=True)["progress"]
    assert saved["step"] == 1
    assert torch.equal(saved["params"], taken)


def _digits() -> Dataset:
    return load_dataset((("dataset", "digits"),))
