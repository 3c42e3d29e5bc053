"""What is published of the sizes of data sets, for the costs of a plan whose files are not here yet.

A data set of a known size stands for the real one where only counts and shapes are looked at: its images hold no
numbers, and its labels go through the classes in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from flatmin.trainables.dataset import Dataset, Task
from flatmin.trainables.streaming import Images


@dataclass(frozen=True)
class Published:
    """The size of a data set as published.

    Attributes:
        train: Training examples.
        test: Test examples.
        shape: The shape of one of them, uint8.
        classes: How many there are.
        task: What is learned.
        streamed: Whether its images are read from their files as they are needed.
    """

    train: int
    test: int
    shape: tuple[int, int, int]
    classes: int
    task: Task = "classification"
    streamed: bool = False


_SIZES = {
    "cifar10": Published(50_000, 10_000, (3, 32, 32), 10),  # Krizhevsky 2009
    "cifar100": Published(50_000, 10_000, (3, 32, 32), 100),
    "hc18": Published(699, 300, (1, 256, 256), 2, "segmentation"),  # 999 images, as `datasets/hc18.py` divides them
    "imagenet": Published(1_281_167, 50_000, (3, 224, 224), 1000, streamed=True),  # Russakovsky et al. 2015, table 2
    "mnist": Published(60_000, 10_000, (1, 28, 28), 10),  # LeCun et al. 1998
    "svhn": Published(73_257, 26_032, (3, 32, 32), 10),  # Netzer et al. 2011
    "tiny_imagenet": Published(100_000, 10_000, (3, 64, 64), 200),  # CS231n, Stanford
}

_SVHN_EXTRA = 531_131


def published_size(program: Mapping[str, Any]) -> Published | None:
    """Return the size of the data set that a program names, or None where none is published here."""
    found = _SIZES.get(str(program["dataset"]))
    if found is not None and program.get("svhn_extra"):
        return Published(found.train + _SVHN_EXTRA, found.test, found.shape, found.classes)
    return found


@cache
def of_size(size: Published) -> Dataset:
    """Return a data set of a size, without images: every class is as large as the others, or one larger."""

    def targets(count: int) -> torch.Tensor:
        classes = torch.arange(count) % size.classes
        if size.task == "classification":
            return classes
        return classes.to(torch.uint8)[:, None, None].expand(count, *size.shape[1:])

    def images(count: int) -> torch.Tensor:
        if size.streamed:
            return cast(torch.Tensor, Images([Path()] * count))
        return torch.empty(count, *size.shape, dtype=torch.uint8, device="meta")

    return Dataset(
        images(size.train),
        targets(size.train),
        images(size.test),
        targets(size.test),
        mean=torch.zeros(1),
        std=torch.ones(1),
        classes=size.classes,
        task=size.task,
    )
