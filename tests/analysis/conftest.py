"""Synthetic tables with the columns of a results directory: a double descent that nobody had to train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest

WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256)
PEAK = 16


@dataclass(frozen=True)
class Tables:
    models: pd.DataFrame
    epochs: pd.DataFrame
    sharpness: pd.DataFrame


def make_tables(
    *,
    widths: Sequence[int] = WIDTHS,
    noises: Sequence[float] = (0.0, 0.2),
    seeds: int = 3,
    epochs: int = 6,
    diverged: int = 1,
) -> Tables:
    """A model per width, label noise and seed; test error peaks at width 16 and is lowest at 256.

    The first measure falls with the width exactly as the gap rises on average, the second one is only noise.
    The models of one width and noise share a trial; the first `diverged` models have nulls for results.
    """
    rng = np.random.default_rng(0)
    rows = [_model(width, noise, seed, rng) for width in widths for noise in noises for seed in range(seeds)]
    models = pd.DataFrame(rows)
    lost = models.index[:diverged]
    models.loc[lost, "status"] = "diverged"
    for column in models.filter(regex="(_loss|_acc|_gap)$"):
        models.loc[lost, str(column)] = np.nan
    keys = models[["model_id", "trial_id"]]
    curves = [_epoch(models, epoch, epochs) for epoch in range(1, epochs + 1)]
    values = {
        "lpf": 1.0 / models["width"] * (1 + 0.1 * rng.random(len(models))),
        "eps_sharpness(radius=0.1)": pd.Series(rng.random(len(models))),
    }
    sharpness = [_measure(keys, label, value, epochs) for label, value in values.items()]
    return Tables(models, pd.concat(curves, ignore_index=True), pd.concat(sharpness, ignore_index=True))


def _model(width: int, noise: float, seed: int, rng: np.random.Generator) -> dict[str, object]:
    place = np.log2(width / PEAK)
    valley = 0.45 / width + 0.15 + 0.25 * np.exp(-((place * 1.6) ** 2)) - 0.03 * max(0.0, place)
    test_error = min(0.95, valley + noise / 2 + 0.01 * rng.normal())
    train_error = max(0.0, (0.5 + noise) * (1 - width / PEAK))
    return {
        "model_id": f"{width:04d}{round(noise * 100):04d}{seed:08d}",
        "trial_id": f"trial{width:04d}{round(noise * 100):04d}",
        "study": "fake-double-descent",
        "dataset": "digits",
        "network": "mlp",
        "width": width,
        "label_noise": noise,
        "lr": 0.003,
        "milestones": [100, 200],
        "seed": seed,
        "status": "converged" if train_error == 0 else "finished",
        "epochs_run": 6,
        "n_params": 75 * width + 10,
        "train_loss": 0.01 + 2 * train_error,
        "train_acc": 1 - train_error,
        "train_acc_clean": 1 - train_error,
        "val_loss": np.nan,
        "val_acc": np.nan,
        "test_loss": 2.5 * test_error,
        "test_acc": 1 - test_error,
        "best_test_acc": 1 - test_error,
        "best_test_epoch": 6,
        "gen_gap": test_error - train_error,
        "loss_gap": 2.5 * test_error - 2 * train_error - 0.01,
        "label_flip_rate": noise * 0.9,
        "seconds": 2.0 + seed,
        "device": "cpu",
        "host": "laptop",
        "started_at": pd.Timestamp("2026-01-02T03:04:05Z"),
        "execution": json.dumps(
            {"stack_size": 3, "versions": {"torch": "2.9.0", "flatmin": "0.1.0"}, "commit": "abc1234"}
        ),
    }


def _epoch(models: pd.DataFrame, epoch: int, last: int) -> pd.DataFrame:
    """All curves start at an error of 0.9 and end where the model ends."""
    done = epoch / last
    columns: dict[str, Any] = {
        "epoch": epoch,
        "train_loss": 2.3 * (1 - done) + models["train_loss"] * done,
        "train_acc": 0.1 * (1 - done) + models["train_acc"] * done,
        "val_loss": np.nan,
        "val_acc": np.nan,
        "test_loss": 2.3 * (1 - done) + models["test_loss"] * done,
        "test_acc": 0.1 * (1 - done) + models["test_acc"] * done,
        "lr": 0.003,
        "seconds": 0.1,
    }
    return models[["model_id", "trial_id"]].assign(**columns)


def _measure(keys: pd.DataFrame, label: str, value: pd.Series[float], epoch: int) -> pd.DataFrame:
    return keys.assign(
        epoch=epoch,
        measure=label.partition("(")[0],
        label=label,
        value=value,
        stderr=0.02 * value.abs(),
        samples=100,
        passes=100.0,
        converged=True,
        metric="filter",
        seconds=0.5,
        settings="{}",
    )


@pytest.fixture(scope="module")
def tables() -> Tables:
    """Eleven widths, two label noises, three seeds; one model diverged."""
    return make_tables()


@pytest.fixture(scope="module")
def study() -> dict[str, object]:
    """A resolved study."""
    return {
        "study": "fake-double-descent",
        "about": "Test error against width.",
        "source": "Nobody et al. 2026",
        "settings": {"dataset": "digits", "lr": 0.003},
        "axes": {"width": list(WIDTHS), "label_noise": [0.0, 0.2]},
        "seeds": 3,
        "measures": ["lpf", "eps_sharpness(radius=0.1)"],
    }
