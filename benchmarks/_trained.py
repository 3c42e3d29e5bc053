"""What the benchmarks of sharpness share: a timer, and a narrow ResNet-18 trained on generated images."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from _published import BATCH
from torch import Tensor, nn
from torch.nn import functional

from flatmin.sharpness import Engine
from flatmin.stack import Batch, StackedNetwork, stream_key
from flatmin.trainables.networks.resnet18_narrow import resnet18_narrow

TOLERANCE = 0.02
SHAPE, CLASSES = (3, 32, 32), 10
CHUNK = 64


@dataclass
class Timer:
    """CPU and wall seconds of what was done under it, one number per time."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what is done inside, to the end of what was asked of the device."""
        wall, cpu = now(), time.process_time()
        yield
        self.wall.append(now() - wall)
        self.cpu.append(time.process_time() - cpu)

    def median(self) -> float:
        """Return the median of the CPU seconds; of the wall's on a GPU, where the CPU waits."""
        return statistics.median(self.of_device())

    def of_device(self) -> list[float]:
        """Return the seconds that count on this device."""
        return self.wall if torch.cuda.is_available() else self.cpu


def now() -> float:
    """Return the time, when all that was asked of the device has been done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Trained:
    """A trained network and the examples it was trained on."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def first(self, count: int) -> Trained:
        """Return it with the first examples only."""
        return Trained(self.model, self.x[:count], self.y[:count])

    def loss(self) -> float:
        """Return the mean loss, by the plainest forward pass."""
        with torch.no_grad():
            parts = zip(torch.split(self.x, BATCH), torch.split(self.y, BATCH), strict=True)
            return sum(float(functional.cross_entropy(self.model(x), y, reduction="sum")) for x, y in parts) / len(
                self.x
            )

    def engine(self, memory: int = 2**31) -> Engine:
        """Return our engine of it."""
        params, buffers = StackedNetwork.stack([self.model])
        key = torch.tensor([stream_key("measure", 0)], device=self.x.device)
        batches = [Batch(self.x, self.y[None], shared=True)]
        return Engine(StackedNetwork(self.model), params, buffers, batches, key, memory=memory)


def trained(options: argparse.Namespace) -> Trained:
    """Train the network on generated images: a smooth pattern per class under noise, one label in ten random."""
    generator = torch.Generator().manual_seed(0)
    patterns = functional.interpolate(torch.randn(CLASSES, 3, 4, 4, generator=generator), SHAPE[1:], mode="bilinear")
    y = torch.randint(CLASSES, (options.examples,), generator=generator)
    x = patterns[y] + torch.randn(options.examples, *SHAPE, generator=generator)
    noisy = torch.rand(options.examples, generator=generator) < 0.1
    y = torch.where(noisy, torch.randint(CLASSES, y.shape, generator=generator), y)
    torch.manual_seed(0)
    x, y = x.to(options.device), y.to(options.device)
    model = resnet18_narrow(SHAPE, CLASSES, width=options.width).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = options.epochs * -(-options.examples // CHUNK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(options.epochs):
        for index in torch.split(torch.randperm(len(x), generator=generator).to(x.device), CHUNK):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return Trained(model.eval(), x, y)
