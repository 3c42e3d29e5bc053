"""Checkpoints: a trial that was stopped anywhere goes on to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flatmin.lease import Lease
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import read_study
from flatmin.results import Results
from flatmin.trainables.checkpoint import load_weights, restore_state, weights_hash
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
                assert results.state_file(one.trial_id).exists()
            for _ in run(job):
                pass
        assert not results.state_file(one.trial_id).exists()
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
        assert not restore_state(results, trainer)


def test_a_damaged_checkpoint_starts_the_trial_again(tmp_path: Path) -> None:
    one = trial(tmp_path, "sgd")
    results = Results.create(tmp_path / "r", "tiny")
    with Lease(results) as lease:
        job = Job(one, str(results.path), lease.token, Execution())
        stop_after(job, 3)
        state = results.state_file(one.trial_id)
        state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
        for _ in run(job):
            pass
    assert len(results.models()) == len(one.models)


def _digits() -> Dataset:
    return load_dataset((("dataset", "digits"),))
