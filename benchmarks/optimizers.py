"""A step of every optimizer against the base step and against the peers that have it: time and memory, in one run.

The base step is torch.optim.SGD's: one pass forward and back and the update. Peers: pytorch_optimizer's SAM and
AdaHessian, and `two-pass SAM`, plain PyTorch with the structure that most codes have (a clone of every parameter, a
first and a second step). Contenders take their steps in turn, in another order each time, all on the same examples.

Time is the median over the repetitions, ratios are to the base step of the same repetition. Two columns are for a
machine that others use too: the ratio of CPU times, and `passes`, a step's time over that of its own passes through the
network, per batch. `outside` is the part of a step that is not spent in such passes, in seconds.

Memory is that of tensors, in copies of the weights beyond the base step: `state` between two steps, `in pass` when the
last pass of a step begins, `at peak`. On CUDA it is what the allocator says; on a CPU every operation's storages are
counted from birth to death, which leaves out what kernels use inside (the same for all).

    python benchmarks/optimizers.py [--quick] [--network resnet18] [--batch 128] [--threads 2] [--only "sam|lpf"]
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from _figures import show
from _memory import Memory, measured_memory
from pytorch_optimizer import SAM, AdaHessian
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

from flatmin.optimizers import TorchOptimizer
from flatmin.plugins import get

SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
MICRO_BATCHES, LANGEVIN_STEPS = 8, 5


class Passes:
    """Passes through a network: each on a batch of its own, timed, and watched as it begins.

    Args:
        network: The network.
        x: The examples of a step.
        y: Their classes.
        memory: What knows how much memory is in use, if memory is what is measured.
    """

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, memory: Memory | None = None) -> None:
        self.network, self.x, self.y, self.memory = network, x, y, memory
        self.seconds, self.examples, self.bytes_before = 0.0, 0, 0

    def backward(self, share: slice = slice(None)) -> Tensor:
        """Return the loss on a share of the examples, after calling backward on it."""
        started = self._begin()
        self.examples += len(self.x[share])
        loss = functional.cross_entropy(self.network(self.x[share]), self.y[share])
        loss.backward()
        self._end(started)
        return loss

    def forward(self) -> Tensor:
        """Return the loss on the examples."""
        started = self._begin()
        loss = functional.cross_entropy(self.network(self.x), self.y)
        self._end(started)
        return loss

    def _begin(self) -> float:
        if self.memory is not None:
            self.bytes_before = self.memory.in_use()
        return now(self.x.device)

    def _end(self, started: float) -> None:
        self.seconds += now(self.x.device) - started


Step = Callable[[Passes], None]


def base(network: nn.Module) -> Step:
    """Return the step that all others are compared with."""
    optimizer = torch.optim.SGD(network.parameters(), **SGD)

    def step(passes: Passes) -> None:
        optimizer.zero_grad()
        passes.backward()
        optimizer.step()

    return step


def ours(name: str, **settings: Any) -> Callable[[nn.Module], Step]:
    """Return what makes steps of one of our optimizers."""

    def build(network: nn.Module) -> Step:
        optimizer = TorchOptimizer(name, network, **settings)

        def step(passes: Passes) -> None:
            size = -(-len(passes.x) // MICRO_BATCHES)
            micro = [slice(start, start + size) for start in range(0, len(passes.x), size)]
            if name.startswith("entropy"):
                optimizer.step([passes.backward] * LANGEVIN_STEPS)
            elif settings.get("lpf_batches", 1) > 1:
                optimizer.step([partial(passes.backward, share) for share in micro])
            else:
                optimizer.step(passes.forward if name in ("adahessian", "scrn") else passes.backward)

        return step

    return build


def pytorch_optimizer_sam(network: nn.Module) -> Step:
    """Return a step of pytorch_optimizer's SAM."""
    optimizer = SAM(network.parameters(), torch.optim.SGD, rho=0.05, **SGD)

    def step(passes: Passes) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            return passes.backward()

        closure()
        optimizer.step(closure)

    return step


def pytorch_optimizer_adahessian(network: nn.Module) -> Step:
    """Return a step of pytorch_optimizer's AdaHessian."""
    optimizer = AdaHessian(network.parameters(), lr=0.01)

    def step(passes: Passes) -> None:
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward.. with create_graph")
            passes.forward().backward(create_graph=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def two_pass_sam(network: nn.Module) -> Step:
    """Return a step of SAM as most codes have it (first in davda54/sam)."""
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, **SGD)

    def step(passes: Passes) -> None:
        optimizer.zero_grad()
        passes.backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
            old = [p.clone() for p in parameters]
            for p in parameters:
                p.add_(p.grad * (0.05 / (norm + 1e-12)))
        optimizer.zero_grad()
        passes.backward()
        with torch.no_grad():
            for p, kept in zip(parameters, old, strict=True):
                p.copy_(kept)
        optimizer.step()

    return step


CONTENDERS: dict[str, Callable[[nn.Module], Step]] = {
    "torch SGD": base,
    "sgd": ours("sgd", **SGD),
    "sam-sgd": ours("sam-sgd", **SGD),
    "pytorch_optimizer SAM": pytorch_optimizer_sam,
    "two-pass SAM": two_pass_sam,
    "asam-sgd": ours("asam-sgd", **SGD),
    "vasso-sgd": ours("vasso-sgd", **SGD),
    "lpf-sgd": ours("lpf-sgd", **SGD),
    f"lpf-sgd, {MICRO_BATCHES} micro-batches": ours("lpf-sgd", lpf_batches=MICRO_BATCHES, **SGD),
    "smoothout-sgd": ours("smoothout-sgd", **SGD),
    f"entropy-sgd, {LANGEVIN_STEPS} batches": ours("entropy-sgd", entropy_steps=LANGEVIN_STEPS, **SGD),
    "adahessian": ours("adahessian", lr=0.01),
    "pytorch_optimizer AdaHessian": pytorch_optimizer_adahessian,
    "scrn, 1 product": ours("scrn", scrn_smoothness=0.01, scrn_penalty=5.0),  # so small that all are Cauchy points
}


@dataclass
class Found:
    """What was measured of one contender."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    state: int = 0
    in_pass: int = 0
    peak: int = 0


def measure_memory(build: Callable[[nn.Module], Step], options: argparse.Namespace, found: Found) -> None:
    """Take one step on a few examples, so that all state is there, and measure the next."""
    with measured_memory(options.device) as memory:
        before = memory.in_use()
        torch.manual_seed(0)
        network = make_network(options.network).to(options.device)
        step = build(network)
        step(Passes(network, *examples(options, MICRO_BATCHES)))
        x, y = examples(options, options.batch)
        passes = Passes(network, x, y, memory)
        network.zero_grad()
        memory.reset_peak()
        step(passes)
        network.zero_grad()
        found.state = memory.in_use() - before
        found.in_pass, found.peak = passes.bytes_before - before, memory.peak() - before


def take_step(step: Step, passes: Passes, found: Found) -> None:
    """Take a step and note how long it took."""
    passes.seconds, passes.examples = 0.0, 0
    wall, cpu = now(passes.x.device), time.process_time()
    step(passes)
    passes.network.zero_grad()
    found.wall.append(now(passes.x.device) - wall)
    found.cpu.append(time.process_time() - cpu)
    found.outside.append(found.wall[-1] - passes.seconds)
    found.passes.append(found.wall[-1] / passes.seconds * passes.examples / len(passes.x))


def now(device: torch.device) -> float:
    """Return the time, when all that was asked of the device has been done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_network(name: str) -> nn.Module:
    """Return a network for CIFAR-10: torchvision's ResNet-18 with a 3 x 3 stem, or one of the package's own."""
    if name != "resnet18":
        network: nn.Module = get("network", name).load()((3, 32, 32), 10)
        return network
    network = resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


def examples(options: argparse.Namespace, count: int) -> tuple[Tensor, Tensor]:
    """Return random images and classes."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 3, 32, 32, generator=generator), torch.randint(10, (count,), generator=generator)
    return x.to(options.device), y.to(options.device)


def read_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Time and memory of a step of every optimizer.")
    parser.add_argument("--quick", action="store_true", help="a batch of 16 and 3 repetitions")
    parser.add_argument("--network", default="resnet18", help="resnet18, or a network of the package")
    parser.add_argument("--batch", type=int, help="examples in a step (default 128)")
    parser.add_argument("--repetitions", type=int, help="steps of each contender that are timed (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="contenders in whose name this is found, a regular expression")
    options = parser.parse_args()
    options.device = torch.device(options.device)
    options.batch = options.batch or (16 if options.quick else 128)
    options.repetitions = options.repetitions or (3 if options.quick else 5)
    return options


def measure(options: argparse.Namespace) -> dict[str, Found]:
    """Measure every contender: memory first, then time, all in turn."""
    chosen = {name: build for name, build in CONTENDERS.items() if build is base or re.search(options.only, name)}
    found = {name: Found() for name in chosen}
    for name, build in chosen.items():
        measure_memory(build, options, found[name])
    x, y = examples(options, options.batch)
    steps: dict[str, tuple[Step, Passes]] = {}
    for name, build in chosen.items():
        torch.manual_seed(0)
        network = make_network(options.network).to(options.device)
        steps[name] = build(network), Passes(network, x, y)
        take_step(steps[name][0], Passes(network, *examples(options, MICRO_BATCHES)), Found())  # this makes the state
    names = list(chosen)
    for repetition in range(options.repetitions):
        first = repetition * len(names) // options.repetitions
        for name in names[first:] + names[:first]:
            take_step(*steps[name], found[name])
    return found


def table_of(found: dict[str, Found], weights: int, title: str) -> Table:
    """Return the figures as a Markdown table."""
    times = ("seconds", "spread", "x base", "x base (CPU)", "passes", "outside")
    table = Table("optimizer", *times, "state", "in pass", "at peak", box=box.MARKDOWN, title=title)
    reference = found["torch SGD"]

    def ratio(own: Sequence[float], others: Sequence[float]) -> str:
        return f"{statistics.median(a / b for a, b in zip(own, others, strict=True)):.2f}"

    for name, one in found.items():
        graph = "hessian" in name.lower() or name.startswith("scrn")
        table.add_row(
            name,
            f"{statistics.median(one.wall):.3f}",
            f"{min(one.wall):.3f} to {max(one.wall):.3f}",
            ratio(one.wall, reference.wall),
            ratio(one.cpu, reference.cpu),
            "" if graph else f"{statistics.median(one.passes):.2f}",
            "" if graph else f"{statistics.median(one.outside):.3f}",
            *(
                f"{(own - other) / weights:.2f}"
                for own, other in (
                    (one.state, reference.state),
                    (one.in_pass, reference.in_pass),
                    (one.peak, reference.peak),
                )
            ),
        )
    return table


def main() -> None:
    """Measure all contenders and print the table."""
    options = read_options()
    torch.set_num_threads(options.threads)
    weights = sum(4 * parameter.numel() for parameter in make_network(options.network).parameters())
    found = measure(options)
    peak = found["torch SGD"].peak / weights
    only = f", only {options.only}" if options.only else ""
    show(
        table_of(found, weights, f"A step of every optimizer{only}: {options.network}, batch {options.batch}"),
        "optimizers",
        ("torch", "pytorch_optimizer", "flatmin-sweep"),
        device=torch.cuda.get_device_name() if options.device.type == "cuda" else "",
        threads=options.threads,
        about=f"{weights // 4:,} weights, {options.repetitions} repetitions; "
        f"the base step's own peak is {peak:.1f} copies of the weights",
    )


if __name__ == "__main__":
    main()
