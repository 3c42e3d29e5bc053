"""How long the report of 3,000 models and a million rows of epochs takes, and how large it is.

    python benchmarks/report.py [--seeds 5] [--epochs 333] [--measures 25] [-o report.html]

Four axes of 600 configurations, losses that fall, measures that follow the axes: numbers of nobody's training, of which
no two are alike, so that nothing of the page can be left out for being repeated.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from _figures import show
from rich.table import Table

from flatmin.analysis.report import report

AXES: dict[str, list[object]] = {
    "width": [2, 4, 8, 16, 32, 64, 128, 256],
    "lr": [0.001, 0.003, 0.01, 0.03, 0.1],
    "label_noise": [0.0, 0.05, 0.1, 0.2, 0.4],
    "optimizer": ["sgd", "sam-sgd", "adam"],
}
MOST_BYTES = 10_000_000


def models(seeds: int) -> pd.DataFrame:
    """Make the rows of `models/`: a full grid with some seeds."""
    rng = np.random.default_rng(0)
    rows = [(*point, seed) for point in itertools.product(*AXES.values()) for seed in range(seeds)]
    table = pd.DataFrame(rows, columns=[*AXES, "seed"])
    count = len(table)
    gap = 0.05 + 0.02 * np.log2(table["width"]) + 0.3 * table["label_noise"] + 0.02 * rng.normal(size=count)
    train_loss = 0.02 * rng.random(count)
    return table.assign(
        model_id=[f"{number:016x}" for number in range(count)],
        trial_id=[f"{number // 24:016x}" for number in range(count)],
        study="benchmark",
        rho=np.where(table["optimizer"] == "sam-sgd", 0.05, np.nan),
        status=np.where(train_loss < 0.01, "converged", "finished"),
        epochs_run=333,
        train_loss=train_loss,
        train_acc=0.99 - 0.02 * rng.random(count),
        test_loss=2 * gap,
        test_acc=0.99 - gap,
        best_test_acc=0.995 - gap,
        gen_gap=gap,
        loss_gap=2 * gap - train_loss,
        seconds=rng.random(count),
    )


def epochs_of(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """Make the rows of `epochs/`: every model's losses and accuracies."""
    rng = np.random.default_rng(1)
    rows = table.loc[np.repeat(table.index.to_numpy(), count), ["model_id", "trial_id", "train_acc", "test_acc"]]
    epoch = np.tile(np.arange(1, count + 1), len(table))
    done = 1 - np.exp(-epoch / 50)
    noise = rng.normal(size=(4, len(rows))) / 100
    return rows.assign(
        epoch=epoch,
        train_loss=np.exp(-3 * done + noise[0]),
        test_loss=0.2 + np.exp(-2 * done + noise[1]),
        train_acc=rows["train_acc"] * done + noise[2],
        test_acc=rows["test_acc"] * done + noise[3],
    ).reset_index(drop=True)


def sharpness(table: pd.DataFrame, measures: int, epochs: int) -> pd.DataFrame:
    """Make the rows of `sharpness/`: measures that follow the gap more or less."""
    rng = np.random.default_rng(2)
    keys = table[["model_id", "trial_id"]]
    parts = [
        keys.assign(
            epoch=epochs,
            measure=f"measure_{number}",
            label=f"measure_{number}",
            value=np.exp(5 * rng.normal() * table["gen_gap"] + rng.normal(size=len(table))),
            stderr=0.01,
            passes=100.0,
            seconds=0.1,
            converged=True,
        )
        for number in range(measures)
    ]
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    """Write the report and print its time and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=333)
    parser.add_argument("--measures", type=int, default=25)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    table = models(options.seeds)
    epochs, measured = epochs_of(table, options.epochs), sharpness(table, options.measures, options.epochs)
    with tempfile.TemporaryDirectory() as folder:
        path = options.output or Path(folder) / "report.html"
        start, before = time.perf_counter(), time.process_time()
        report(study={"study": "benchmark"}, models=table, epochs=epochs, sharpness=measured, path=path)
        wall, cpu = time.perf_counter() - start, time.process_time() - before
        size = path.stat().st_size
    title = f"The report of {len(table):,} models, {len(epochs):,} rows of epochs, {len(measured):,} of measures"
    found = Table("seconds", "of a core", "MB", "MB allowed", title=title)
    found.add_row(f"{wall:.1f}", f"{cpu:.1f}", f"{size / 1e6:.2f}", f"{MOST_BYTES / 1e6:.0f}")
    show(found, "report", ("pandas", "plotly", "flatmin-sweep"), threads=None)
    if size > MOST_BYTES:
        raise SystemExit("the report is larger than that")


if __name__ == "__main__":
    main()
