"""Training convolutional networks: one stack against one model at a time, side by side in one run.

Peers: `resident`, a plain PyTorch loop over tensors in memory; with `--device cuda` also `tuned`, the same in
channels-last bf16 with torch.compile; `dataloader`, the structure of the published codes: a DataLoader (two workers
beside a GPU) over images that are cropped and flipped one by one, in fp32. All train the same networks on generated
images with SGD, and take no evaluations: a narrow ResNet-18 on the shape of CIFAR, and LeNet on that of MNIST.

Seconds are CPU seconds of the process, and wall seconds of a device that is waited for. Printed are medians over
repetitions, contenders in turn, ratios to ours within a repetition, and the share of what one large product of matrices
reaches in fp32 (a bf16 peak is higher).

    python benchmarks/convolutions.py [--device cuda] [--widths 4 6 8] [--batches 32 128] [--models 8]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from _figures import show
from _peak import matmul_peak
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import transforms

from flatmin.orchestrator.study import read_study
from flatmin.stack.arithmetic import prepare_arithmetic
from flatmin.trainables import dataset as flatmin_dataset
from flatmin.trainables.cost import network_cost
from flatmin.trainables.job import plugin_settings
from flatmin.trainables.trainer import StackTrainer, network_builder
from flatmin.trial import Execution, Trial

EXAMPLES = {"cpu": 2048, "cuda": 50_000}
LR, WORKERS = 0.01, 2


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        name: What the table calls it.
        settings: Network and its settings.
        shape: Of an image.
        batch: Examples in a step.
    """

    name: str
    settings: Mapping[str, Any]
    shape: tuple[int, int, int]
    batch: int


class Steps:
    """Counts and times steps.

    Args:
        options: The command line's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.steps, self.warm_up = options.device, options.steps, options.warm_up

    def seconds(self, step: Callable[[], object]) -> float:
        """Return the seconds of a step: of the CPU, or wall seconds of a device."""
        for _ in range(self.warm_up):
            step()
        self._wait()
        start = self._now()
        for _ in range(self.steps):
            step()
        self._wait()
        return (self._now() - start) / self.steps

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _now(self) -> float:
        return time.perf_counter() if self.device == "cuda" else time.process_time()


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Return what the options ask for."""
    for batch in options.batches:
        for width in options.widths:
            for plain in (False, True) if options.plain else (False,):
                kind = {"width": width, "batch_norm": not plain, "skip": not plain}
                name = f"ResNet-18, width {width}" + (", without BatchNorm and skip" if plain else "")
                yield Case(name, {"network": "resnet18_narrow", **kind}, (3, 32, 32), batch)
        yield Case("LeNet", {"network": "lenet"}, (1, 28, 28), batch)


def images(case: Case, device: str) -> flatmin_dataset.Dataset:
    """Return generated images in ten classes."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (EXAMPLES[device], *case.shape), dtype=torch.uint8, generator=draw)
    y = torch.randint(0, 10, (EXAMPLES[device],), generator=draw)
    mean, std = torch.full((case.shape[0], 1, 1), 0.5), torch.full((case.shape[0], 1, 1), 0.25)
    return flatmin_dataset.Dataset(x, y, x[:10], y[:10], mean, std, 10)


def trial_of(case: Case, models: int, precision: str = "fp32") -> Trial:
    """Return a trial of so many models that differ in their seeds."""
    study = {
        "study": "convolutions",
        "settings": {
            "dataset": "cifar10",
            "optimizer": "sgd",
            "batch_size": case.batch,
            "lr": LR,
            "momentum": 0.9,
            "precision": precision,
            "epochs": 1000,
            "eval_every": 1000,
            **case.settings,
        },
        "seeds": models,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "study.yaml"
        file.write_text(yaml.safe_dump(study))
        return Trial("benchmark", read_study(str(file)).models)


def ours(
    case: Case,
    options: argparse.Namespace,
    vectorize: Literal["auto", "vmap", "loop"] = "auto",
    precision: str = "fp32",
) -> float:
    """Return seconds per model and step of one stack."""
    trial, data = trial_of(case, options.models, precision), images(case, options.device)
    build = network_builder(trial.program, case.shape, 10)
    execution = Execution(device=options.device, vectorize=vectorize, channels_last=options.channels_last)
    steps = StackTrainer(trial, data, build, execution).train()
    return Steps(options).seconds(lambda: next(steps)) / options.models


def ours_vmap(case: Case, options: argparse.Namespace) -> float:
    """Return the same with all models side by side, whatever the device."""
    return ours(case, options, "vmap")


def ours_loop(case: Case, options: argparse.Namespace) -> float:
    """Return the same with one model after another."""
    return ours(case, options, "loop")


def ours_bf16(case: Case, options: argparse.Namespace) -> float:
    """Return the same as `ours` with bf16 arithmetic, which `tuned` has too."""
    return ours(case, options, precision="bf16")


def resident(case: Case, options: argparse.Namespace, tuned: bool = False) -> float:
    """Return seconds per step of a plain loop over tensors in memory."""
    data = images(case, options.device)
    x, y = _normalised(data).to(options.device), data.train_y.to(options.device)
    network = network_builder(trial_of(case, 1).program, case.shape, 10)().to(options.device)
    if tuned:
        x, network = x.contiguous(memory_format=torch.channels_last), network.to(memory_format=torch.channels_last)
        network = torch.compile(network)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = torch.randperm(len(x), device=x.device)
            yield from ((x[index], y[index]) for index in torch.split(order, case.batch))

    return Steps(options).seconds(_plain_step(network, batches(), options.device, bf16=tuned))


def tuned(case: Case, options: argparse.Namespace) -> float:
    """Return the same in channels-last bf16, compiled."""
    return resident(case, options, tuned=True)


class _OneByOne(Dataset[tuple[Tensor, Tensor]]):
    """Images that are normalised, cropped and flipped one by one, as torchvision's data sets do it."""

    def __init__(self, data: TensorDataset, size: int) -> None:
        own = [transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip()]
        self._data, self._change = data, transforms.Compose(own)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self._data[index]
        return self._change(x), y


def dataloader(case: Case, options: argparse.Namespace) -> float:
    """Return seconds per step of the published loop."""
    data = images(case, options.device)
    one_by_one = _OneByOne(TensorDataset(_normalised(data), data.train_y), case.shape[1])
    own = {"num_workers": WORKERS, "persistent_workers": True, "pin_memory": True} if options.device == "cuda" else {}
    loader = DataLoader(one_by_one, case.batch, shuffle=True, **own)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    network = network_builder(trial_of(case, 1).program, case.shape, 10)().to(options.device)
    return Steps(options).seconds(_plain_step(network, batches(), options.device))


def _normalised(data: flatmin_dataset.Dataset) -> Tensor:
    return (data.train_x / 255 - data.mean) / data.std


def _plain_step(
    network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], device: str, *, bf16: bool = False
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=0.9)

    def step() -> None:
        x, y = next(batches)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = functional.cross_entropy(network(x.to(device)), y.to(device))
        loss.backward()
        optimizer.step()

    return step


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Stacks of convolutional networks, beside one model at a time.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--widths", type=int, nargs="*", help="of the narrow ResNet-18 (default 4; on a GPU 4 6 8)")
    parser.add_argument("--batches", type=int, nargs="*", help="batch sizes (default 32; on a GPU 32 128 512)")
    parser.add_argument("--plain", action="store_true", help="the ResNet-18 without BatchNorm and skip as well")
    parser.add_argument("--models", type=int, help="of the stack (default 8; on a GPU 27)")
    parser.add_argument("--channels-last", action="store_true", help="for our stacks")
    parser.add_argument("--steps", type=int, help="that are timed (default 4; on a GPU 50)")
    parser.add_argument("--warm-up", type=int, help="steps before (default 3; on a GPU 10)")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    defaults = {"widths": ([4], [4, 6, 8]), "batches": ([32], [32, 128, 512]), "models": (8, 27)}
    for name, (on_cpu, else_) in {**defaults, "steps": (4, 50), "warm_up": (3, 10)}.items():
        if getattr(options, name) is None:
            setattr(options, name, else_ if on_gpu else on_cpu)
    return options


def main() -> None:
    """Run all cases, the contenders in turn, and print the table."""
    options = read_options()
    torch.set_num_threads(1)
    prepare_arithmetic()
    who = {"ours": ours, "ours, side by side": ours_vmap, "resident": resident, "dataloader": dataloader}
    if options.device == "cuda":
        who = {
            "ours": ours,
            "ours, bf16": ours_bf16,
            "ours, one by one": ours_loop,
            "tuned": tuned,
            **{k: who[k] for k in list(who)[2:]},
        }
    batches = ", ".join(map(str, options.batches))
    head = ("network", "batch", "models", "who", "ms per model and step", "spread", "times ours", "spread ", "of peak")
    table = Table(
        *head, title=f"Stacks of {options.models} convolutional networks, beside one model at a time, batch {batches}"
    )
    peak = matmul_peak(options.device)
    for case in cases(options):
        operations = (
            3 * case.batch * network_cost(plugin_settings("network", trial_of(case, 1).program), case.shape, 10).flops
        )
        found: dict[str, list[float]] = {name: [] for name in who}
        for _ in range(options.repetitions):
            for name, run in who.items():
                found[name].append(1e3 * run(case, options))
        for name, values in found.items():
            ratios = [value / own for value, own in zip(values, found["ours"], strict=True)]
            table.add_row(
                case.name,
                str(case.batch),
                str(options.models),
                name,
                f"{statistics.median(values):.2f}",
                f"{min(values):.2f} to {max(values):.2f}",
                f"{statistics.median(ratios):.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{100 * operations / statistics.median(values) * 1e3 / peak:.0f} %",
            )
    device = torch.cuda.get_device_name() if options.device == "cuda" else ""
    most = f"one large product in fp32: {peak / 1e12:.3g} TFLOP/s"
    about = f"median of {options.repetitions} repetitions of {options.steps} steps; {most}"
    show(table, "convolutions", ("torch", "torchvision"), device=device, about=about)


if __name__ == "__main__":
    main()
