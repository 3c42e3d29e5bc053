"""What data sets of images share: checks of what was read, the statistics of pixels, decoding of files."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flatmin.errors import DataError
from flatmin.trainables.dataset import Dataset


@dataclass(frozen=True)
class Labelled:
    """Images and their classes as they were read.

    Attributes:
        where: What they were read from, for messages.
        x: uint8 `[n, C, H, W]`.
        y: int64 `[n]`.
        labels: What the classes were read from, where that is another file.
    """

    where: Path
    x: Tensor
    y: Tensor
    labels: Path | None = None


def labelled_images(
    train: Labelled,
    test: Labelled,
    *,
    shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    mend: str,
) -> Dataset:
    """Return a data set of classified images, checked.

    Args:
        train: The training set.
        test: The test set.
        shape: What each image should be, `(C, H, W)`.
        classes: How many there are.
        mean: What normalisation subtracts from each channel, of values in [0, 1].
        std: What it divides by.
        mend: What to do where something is wrong.

    Raises:
        DataError: Images are of another size or type, labels are out of range, or a class is missing.
    """
    for part in (train, test):
        if part.x.dtype != torch.uint8 or tuple(part.x.shape[1:]) != shape:
            found = f"{str(part.x.dtype).removeprefix('torch.')} {list(part.x.shape[1:])}"
            raise DataError(f"{part.where}: images are {found}, and should be uint8 {list(shape)}", mend)
        if len(part.x) != len(part.y):
            raise DataError(f"{part.where}: there are {len(part.x)} images and {len(part.y)} labels", mend)
        check_classes(part.labels or part.where, part.y, classes, mend)
    return Dataset(train.x, train.y, test.x, test.y, _per_channel(mean), _per_channel(std), classes)


def _per_channel(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None]


def check_classes(where: Path, y: Tensor, classes: int, mend: str) -> None:
    """Check that labels are in range, and every class has one.

    Raises:
        DataError: A label is not, or a class has none.
    """
    wrong = ((y < 0) | (y >= classes)).nonzero()[:, 0]
    if len(wrong):
        raise DataError(
            f"{where}: the label of example {int(wrong[0])} is {int(y[wrong[0]])}, and should be 0 to {classes - 1}",
            mend,
        )
    missing = (torch.bincount(y, minlength=classes) == 0).nonzero()[:, 0].tolist()
    if missing:
        raise DataError(f"{where}: no example is of class {missing[0]}; {len(missing)} of {classes} are missing", mend)


def pixel_statistics(x: Tensor) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation of each channel of images uint8 `[n, C, H, W]`, divided by 255.

    >>> pixel_statistics(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1))
    ([0.5], [0.7071067811865476])
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(x.shape[1]):
        counts = torch.bincount(x[:, channel].flatten(), minlength=256).double()
        mean = (counts * levels).sum() / counts.sum()
        means.append(mean.item())
        stds.append(((counts * (levels - mean) ** 2).sum() / (counts.sum() - 1)).sqrt().item())
    return means, stds


def each_pixel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each pixel of images uint8 `[n, C, H, W]`, divided by 255.

    They are those of scikit-learn's `StandardScaler` on values from 0 to 255: deviations are of the images themselves
    (n, not n - 1), and 1 of 255 where a pixel is the same in all images.

    >>> each_pixel_statistics(torch.tensor([[0, 9], [255, 9]], dtype=torch.uint8).reshape(2, 1, 1, 2))[0]
    tensor([[[0.5000, 0.0353]]])
    """
    n, parts = len(x), torch.split(x, 4096)
    sums = torch.stack([part.sum(dim=0) for part in parts]).sum(dim=0)
    squares = torch.stack([part.int().square().sum(dim=0) for part in parts]).sum(dim=0)
    deviations = (n * squares - sums**2).double().sqrt() / n  # of integers: exact but for the root
    return (sums.double() / n / 255).float(), (torch.where(deviations > 0, deviations, 1.0) / 255).float()


def decoded(file: Path, modes: Collection[str], mend: str, size: tuple[int, int] | None = None) -> Image.Image:
    """Return an image from a file.

    Args:
        file: The file.
        modes: The modes of PIL that it may have.
        mend: What to do where it is damaged.
        size: The width and height that it should have, or None for any.

    Raises:
        DataError: It is not there, damaged, or of another mode or size.
    """
    try:
        with Image.open(file) as image:
            image.load()
    except FileNotFoundError:
        raise DataError(f"there is no {file}", mend) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image: {error}", mend) from None
    if image.mode not in modes:
        raise DataError(f"{file} is of mode {image.mode}, and should be {' or '.join(modes)}", mend)
    if size is not None and image.size != size:
        raise DataError(f"{file} has {_across(image.size)} pixels, and should have {_across(size)}", mend)
    return image


def rgb(image: Image.Image) -> Tensor:
    """Return an image as uint8 `[3, H, W]`; one of greys has three equal channels."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _across(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
