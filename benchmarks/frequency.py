"""The sinusoids study: ten seeds as one stack, against a plain loop and the published one, for each optimizer.

The 198,145-weight MLP on 200 points at batch 20. `plain` trains one seed after another with the same
arithmetic over tensors in memory: torch's own SGD and Adam, and our `TorchOptimizer` for the others. `published` has
the structure of aryol/CS-439-project: a DataLoader, `backward(create_graph=True, retain_graph=True)` for every
optimizer, and batch losses added up with their graphs for an epoch; AdaHessian and SCRN as it has them, tensor by
tensor, SCRN with its second Hessian-vector product, whose result is thrown away. No evaluations. All run in one
process, with what `prepare_arithmetic` asks of its libraries, which is to the gain of the peers as well.

Prints the CPU time per model and step, or that by the clock with several threads, median and spread over repetitions,
contenders in turn, and the ratios to ours within a repetition: on a machine that others use these are what to read.

    python benchmarks/frequency.py [--threads 2]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from _figures import show
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from flatmin.optimizers import TorchOptimizer
from flatmin.orchestrator.study import read_study
from flatmin.stack.arithmetic import prepare_arithmetic
from flatmin.trainables.datasets.sinusoids import sinusoids
from flatmin.trainables.networks.mlp import mlp
from flatmin.trainables.trainer import StackTrainer, network_builder
from flatmin.trial import Execution, Trial

SEEDS, STEPS, WARM_UP, REPETITIONS = 10, 30, 5, 5
BATCH = 20
OPTIMIZERS = ("sgd", "adam", "adahessian", "scrn")
SETTINGS = {
    "sgd": {"lr": 5e-3},
    "adam": {"lr": 1e-4},
    "adahessian": {"lr": 0.01, "hessian_average": "row"},
    "scrn": {"scrn_penalty": 5.0, "scrn_smoothness": 0.1},
}

Update = Callable[[], None]


def ours(name: str) -> float:
    """Return seconds per model and step of one stack of all seeds."""
    models = [m for m in read_study("frequency-sinusoids").models if m.settings["optimizer"] == name]
    trial, dataset = Trial("benchmark", tuple(models[:SEEDS])), sinusoids(Path())
    build = network_builder(trial.program, dataset.input_shape, dataset.classes)
    return _timed(StackTrainer(trial, dataset, build, Execution()).train()) / SEEDS


def plain(name: str) -> float:
    """Return seconds per step of a plain loop over one seed; the others would take as long."""
    network, dataset = mlp((1,), 1, depth=4, width=256), sinusoids(Path())
    x, y = dataset.train_x, dataset.train_y
    if name in ("sgd", "adam"):
        lr = SETTINGS[name]["lr"]
        optimizer = (torch.optim.SGD if name == "sgd" else torch.optim.Adam)(network.parameters(), lr=lr)
    else:
        optimizer = TorchOptimizer(name, network, **SETTINGS[name])

    def steps() -> Iterator[None]:
        while True:
            for index in torch.split(torch.randperm(len(x)), BATCH):

                def loss(index: Tensor = index) -> Tensor:
                    return functional.mse_loss(network(x[index]), y[index])

                if isinstance(optimizer, TorchOptimizer):
                    optimizer.step(loss)
                else:
                    optimizer.zero_grad()
                    loss().backward()
                    optimizer.step()
                yield

    return _timed(steps())


def published(name: str) -> float:
    """Return seconds per step of the published loop over one seed."""
    network, dataset = mlp((1,), 1, depth=4, width=256), sinusoids(Path())
    loader = DataLoader(TensorDataset(dataset.train_x, dataset.train_y), BATCH, shuffle=True)
    parameters = list(network.parameters())
    update = {
        "sgd": lambda: torch.optim.SGD(parameters, lr=5e-3).step,
        "adam": lambda: torch.optim.Adam(parameters, lr=1e-4).step,
        "adahessian": lambda: published_adahessian(parameters),
        "scrn": lambda: published_scrn(parameters),
    }[name]()

    def steps() -> Iterator[None]:
        while True:
            running: Tensor | float = 0.0
            for x, y in loader:
                for parameter in parameters:
                    parameter.grad = None
                loss = functional.mse_loss(network(x), y)
                loss.backward(create_graph=True, retain_graph=True)
                update()
                running = running + loss
                yield

    return _timed(steps())


def published_adahessian(parameters: list[nn.Parameter]) -> Update:
    """Return AdaHessian's update with lr 0.01, whose diagonal is averaged over the rows of matrices."""
    lr, beta1, beta2, eps = 0.01, 0.9, 0.999, 1e-4
    means, squares, count = [[torch.zeros_like(p) for p in parameters] for _ in range(2)] + [[0]]

    def update() -> None:
        grads = [p.grad for p in parameters]
        vectors = [torch.randint_like(p, high=2) * 2 - 1 for p in parameters]
        products = torch.autograd.grad(grads, parameters, vectors, retain_graph=True)
        count[0] += 1
        with torch.no_grad():
            for p, grad, product, mean, square in zip(parameters, grads, products, means, squares, strict=True):
                size = product.abs()
                size = size.mean(dim=1, keepdim=True).expand_as(size).clone() if size.dim() == 2 else size
                mean.mul_(beta1).add_(grad.detach(), alpha=1 - beta1)
                square.mul_(beta2).addcmul_(size, size, value=1 - beta2)
                root = square.sqrt() / (1 - beta2 ** count[0]) ** 0.5 + eps
                p.add_(-lr * (mean / (1 - beta1 ** count[0]) / root))

    return update


def published_scrn(parameters: list[nn.Parameter]) -> Update:
    """Return SCRN's update with rho 5 and l 0.1, ten inner steps where the gradient is small."""
    rho, smooth, eps, noise, inner = 5.0, 0.1, 1e-3, 0.1, 10

    def products(grads: list[Tensor], vectors: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(grads, parameters, vectors, retain_graph=True))

    def norm(vectors: list[Tensor]) -> Tensor:
        return torch.sqrt(sum((v.norm() ** 2 for v in vectors), torch.zeros(())))

    def update() -> None:
        grads = [p.grad for p in parameters]
        fixed = [g.detach() for g in grads]
        size = norm(fixed)
        if size >= smooth**2 / rho:
            curved = products(grads, fixed)
            c = sum((g * h).sum() for g, h in zip(fixed, curved, strict=True)) / (rho * size**2)
            length = -c + torch.sqrt(c**2 + 2 * size / rho)
            change = [-length * g / size for g in fixed]
        else:
            sigma, change = noise * (eps * rho) ** 0.5 / smooth, [torch.zeros_like(g) for g in fixed]
            noisy = [g + sigma * torch.rand_like(g) for g in fixed]
            for _ in range(inner):
                curved = products(grads, change)
                pull = rho / 2 * norm(change)
                moves = zip(change, noisy, curved, strict=True)
                change = [d - (g + h + pull * d) / (20 * smooth) for d, g, h in moves]
        curved = products(grads, change)
        whole = zip(fixed, change, curved, strict=True)
        sum((g * d).sum() + (d * h).sum() / 2 + rho / 6 * d.norm() ** 3 for g, d, h in whole)
        with torch.no_grad():
            for p, d in zip(parameters, change, strict=True):
                p.add_(d)

    return update


def _timed(steps: Iterator[object]) -> float:
    """Return the seconds of a step, of CPU time or with several threads by the clock, after some that warm up."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for _ in islice(steps, WARM_UP):
        pass
    gc.collect()
    start = now()
    for _ in islice(steps, STEPS):
        pass
    return (now() - start) / STEPS


def main() -> None:
    """Run all optimizers, the contenders in turn, and print the table."""
    parser = argparse.ArgumentParser(description="Ten seeds of the sinusoids' network, beside loops over one.")
    parser.add_argument("--threads", type=int, default=1)
    threads: int = parser.parse_args().threads
    torch.set_num_threads(threads)
    prepare_arithmetic()
    warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph=True")
    contenders = {"ours": ours, "plain": plain, "published": published}
    title = f"A step of the sinusoids study: {SEEDS} seeds as one stack, against loops over one seed"
    title += f"; {threads} threads" if threads > 1 else ""
    what = "CPU ms" if threads == 1 else "ms by the clock"
    table = Table("optimizer", "who", f"{what} per model and step", "spread", "times ours", "spread", title=title)
    for name in OPTIMIZERS:
        seconds: dict[str, list[float]] = {who: [] for who in contenders}
        for _ in range(REPETITIONS):
            for who, run in contenders.items():
                seconds[who].append(1e3 * run(name))
        for who, values in seconds.items():
            ratios = [value / own for value, own in zip(values, seconds["ours"], strict=True)]
            table.add_row(
                name,
                who,
                f"{statistics.median(values):.2f}",
                f"{min(values):.2f} to {max(values):.2f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
            )
    about = f"{REPETITIONS} repetitions of {STEPS} steps, batches of {BATCH}"
    show(table, "frequency", ("torch", "flatmin-sweep"), threads=threads, about=about)


if __name__ == "__main__":
    main()
