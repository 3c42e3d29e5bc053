"""Training many small models: one stack against one model at a time, in the same run on one core.

Peers: `resident`, a plain PyTorch loop over tensors that stay in memory; `dataloader`, the structure of the
published codes, a shuffling DataLoader (without worker processes, which only slow so small a data set down).
All train the same MLPs on the digits with Adam at batch 250 and take no evaluations. Prints the median over
repetitions of the time per model and step, its spread, and the ratio to ours.

    python benchmarks/stacked_training.py
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from flatmin.orchestrator.study import read_study
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.datasets.digits import digits
from flatmin.trainables.networks.mlp import mlp
from flatmin.trainables.trainer import StackTrainer, network_builder
from flatmin.trial import Execution, Trial

BATCH, EPOCHS, REPETITIONS = 250, 25, 5


def ours(width: int, models: int, dataset: Dataset) -> float:
    """Return seconds per model and step of one stack."""
    overrides = [f"width={width}", f"seeds={models}", f"epochs={EPOCHS}", f"eval_every={EPOCHS}"]
    trial = Trial("benchmark", read_study("digits-double-descent", overrides).models)
    trainer = StackTrainer(
        trial, dataset, network_builder(trial.program, dataset.input_shape, dataset.classes), Execution()
    )
    start = time.perf_counter()
    steps = 0
    for _ in trainer.train():
        steps += 1
        if steps == EPOCHS * len(dataset.train_x) // BATCH - 1:  # the last one also evaluates, which no peer does
            break
    return (time.perf_counter() - start) / (steps * models)


def resident(width: int, models: int, dataset: Dataset) -> float:
    """Return seconds per model and step of a plain loop over resident tensors."""
    x, y = (dataset.train_x - dataset.mean) / dataset.std, dataset.train_y

    def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(x[index], y[index]) for index in torch.split(torch.randperm(len(x)), BATCH)]

    return plain_loop(width, models, dataset, batches)


def dataloader(width: int, models: int, dataset: Dataset) -> float:
    """Return seconds per model and step of a plain loop over a DataLoader."""
    x = (dataset.train_x - dataset.mean) / dataset.std
    loader = DataLoader(TensorDataset(x, dataset.train_y), BATCH, shuffle=True)
    return plain_loop(width, models, dataset, lambda: list(loader))


def plain_loop(
    width: int, models: int, dataset: Dataset, batches: Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]
) -> float:
    """Return seconds per model and step of training models one after the other; three of them, for they are alike."""
    start, steps = time.perf_counter(), 0
    for _ in range(min(models, 3)):
        network = mlp(dataset.input_shape, dataset.classes, width=width)
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(EPOCHS):
            for x, y in batches():
                optimizer.zero_grad()
                functional.cross_entropy(network(x), y).backward()
                optimizer.step()
                steps += 1
    return (time.perf_counter() - start) / steps


def main() -> None:
    """Run all combinations, ours and the peers in turn, and print the table."""
    torch.set_num_threads(1)
    dataset = digits(Path())
    table = Table("width", "models", "who", "us per model and step", "spread", "times ours")
    for width in (8, 64, 256):
        for models in (5, 30):
            runs = {"ours": ours, "resident": resident, "dataloader": dataloader}
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(REPETITIONS):
                for name, run in runs.items():
                    seconds[name].append(run(width, models, dataset))
            own = statistics.median(seconds["ours"])
            for name, values in seconds.items():
                median = statistics.median(values)
                spread = f"{1e6 * min(values):.0f} to {1e6 * max(values):.0f}"
                table.add_row(str(width), str(models), name, f"{1e6 * median:.0f}", spread, f"{median / own:.2f}")
    Console(width=100).print(table)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "flatmin-sweep"))
    print(f"{platform.platform()}, {platform.machine()}, 1 thread, Python {platform.python_version()}, {versions}")


if __name__ == "__main__":
    main()
