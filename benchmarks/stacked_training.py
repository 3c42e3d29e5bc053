"""Training many small models: one stack against one model at a time, in the same run on one core.

Peers: `resident`, a plain PyTorch loop over tensors that stay in memory; `dataloader`, the structure of the
published codes, a shuffling DataLoader (without worker processes, which only slow so small a data set down).
All train the same MLPs on the digits with Adam and take no evaluations, in one process with what `prepare_arithmetic`
asks of its libraries. Prints the median over repetitions of the CPU time per model and step, its spread, and the
ratio to ours within a repetition: on a machine that others use that is what to read. `of peak` is the share that a
gradient's products of matrices reach of what one large product does here.

    python benchmarks/stacked_training.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from _figures import show
from _peak import matmul_peak
from rich.table import Table
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from flatmin.orchestrator.study import read_study
from flatmin.stack.arithmetic import prepare_arithmetic
from flatmin.trainables.cost import network_cost
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.datasets.digits import digits
from flatmin.trainables.networks.mlp import mlp
from flatmin.trainables.trainer import StackTrainer, network_builder
from flatmin.trial import Execution, Trial

CASES = [(32, 16), (32, 64), (32, 256), (250, 64)]
"""Batch size and width."""

MODELS = (8, 32, 100)
WARM_UP, STEPS, REPETITIONS = 5, 80, 5


def ours(batch: int, width: int, models: int, dataset: Dataset) -> float:
    """Return CPU seconds per model and step of one stack."""
    overrides = [f"batch_size={batch}", f"width={width}", f"seeds={models}", "epochs=1000", "eval_every=1000"]
    trial = Trial("benchmark", read_study("digits-double-descent", overrides).models)
    build = network_builder(trial.program, dataset.input_shape, dataset.classes)
    steps = StackTrainer(trial, dataset, build, Execution()).train()
    return seconds_per_step(lambda: next(steps)) / models


def resident(batch: int, width: int, models: int, dataset: Dataset) -> float:
    """Return CPU seconds per step of a plain loop over resident tensors; of one model, for they are alike."""
    x, y = (dataset.train_x - dataset.mean) / dataset.std, dataset.train_y

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from ((x[index], y[index]) for index in torch.split(torch.randperm(len(x)), batch))

    return plain_loop(width, dataset, batches())


def dataloader(batch: int, width: int, models: int, dataset: Dataset) -> float:
    """Return CPU seconds per step of a plain loop over a DataLoader."""
    x = (dataset.train_x - dataset.mean) / dataset.std
    loader = DataLoader(TensorDataset(x, dataset.train_y), batch, shuffle=True)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from loader

    return plain_loop(width, dataset, batches())


def plain_loop(width: int, dataset: Dataset, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return CPU seconds per step of training one model."""
    network = mlp(dataset.input_shape, dataset.classes, width=width)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)

    def step() -> None:
        x, y = next(batches)
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()

    return seconds_per_step(step)


def seconds_per_step(step: Callable[[], object]) -> float:
    """Return CPU seconds of a step, after some that warm caches up."""
    for _ in range(WARM_UP):
        step()
    start = time.process_time()
    for _ in range(STEPS):
        step()
    return (time.process_time() - start) / STEPS


def main() -> None:
    """Run all combinations, ours and the peers in turn, and print the table."""
    torch.set_num_threads(1)
    prepare_arithmetic()
    dataset = digits(Path())
    runs = {"ours": ours, "resident": resident, "dataloader": dataloader}
    heads = (
        "batch",
        "width",
        "models",
        "who",
        "CPU us per model and step",
        "spread",
        "times ours",
        "spread",
        "of peak",
    )
    table = Table(*heads, title="Training MLPs on the digits: one stack, against one model at a time")
    peak = matmul_peak()
    for batch, width in CASES:
        settings = {"network": "mlp", "width": width, "depth": 1, "dropout": 0.0}
        operations = 3 * batch * network_cost(tuple(settings.items()), dataset.input_shape, dataset.classes).flops
        for models in MODELS:
            seconds: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(REPETITIONS):
                for name, run in runs.items():
                    seconds[name].append(run(batch, width, models, dataset))
            for name, values in seconds.items():
                ratios = [value / own for value, own in zip(values, seconds["ours"], strict=True)]
                table.add_row(
                    *map(str, (batch, width, models)),
                    name,
                    f"{1e6 * statistics.median(values):.0f}",
                    f"{1e6 * min(values):.0f} to {1e6 * max(values):.0f}",
                    f"{statistics.median(ratios):.2f}",
                    f"{min(ratios):.2f} to {max(ratios):.2f}",
                    f"{100 * operations / statistics.median(values) / peak:.0f} %",
                )
    about = f"{REPETITIONS} repetitions of {STEPS} steps; one large product: {peak / 1e9:.0f} GFLOP/s"
    show(table, "stacked_training", ("torch", "flatmin-sweep"), about=about)


if __name__ == "__main__":
    main()
