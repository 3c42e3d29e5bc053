"""CIFAR-10: 50,000 training and 10,000 test colour images of 32 x 32 in ten classes (Krizhevsky 2009).

Source: https://www.cs.toronto.edu/~kriz/cifar.html, the Python version, in torchvision's `cifar-10-batches-py/`.
"""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import CIFAR10

from flatmin.trainables.dataset import Dataset
from flatmin.trainables.datasets.cifar import PixelStatistics, read_cifar, write_cifar


def cifar10(root: Path, *, pixel_statistics: PixelStatistics = "lpf") -> Dataset:
    """Return images `[3, 32, 32]` in their published order.

    Args:
        root: Where data sets lie.
        pixel_statistics: What normalises.

    Raises:
        DataError: The files are not there, or damaged.
    """
    return read_cifar("cifar10", CIFAR10, root, pixel_statistics, 170_498_071, 10)


def write_stand_in(root: Path) -> None:
    """Write 300 training and 100 test images of scikit-learn's digits, enlarged and coloured."""
    write_cifar(root, CIFAR10, 10)
