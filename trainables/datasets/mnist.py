"""MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 x 28 greys (LeCun et al. 1998).

Source: http://yann.lecun.com/exdb/mnist, from torchvision's mirrors, in torchvision's folders: `MNIST/raw/`.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

from flatmin.errors import DataError
from flatmin.settings import Setting
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.downloads import Download, Source, provide
from flatmin.trainables.images import Labelled, each_pixel_statistics, labelled_images
from flatmin.trainables.stand_ins_images import digit_images

MEAN, STD = 0.1307, 0.3081
"""Of all pixels of the training set."""

MEND = "remove it; it is unpacked from its .gz again, which `flatmin-sweep launch` downloads"


def mnist(
    root: Path,
    *,
    mnist_statistics: Annotated[
        Literal["published", "per_pixel"],
        Setting(
            about="Mean and deviation that normalise: the published ones of all pixels, or those of each pixel.",
            neutral="published",
        ),
    ] = "published",
) -> Dataset:
    """Return images `[1, 28, 28]`.

    Args:
        root: Where data sets lie.
        mnist_statistics: What normalises; `per_pixel` over the whole training set, as the CS-439 project does.

    Raises:
        DataError: The files are not there, or damaged.
    """
    folder = root / "MNIST" / "raw"
    downloads = tuple(
        Download(name, tuple(f"{mirror}{name}" for mirror in MNIST.mirrors), md5, into=".")
        for name, md5 in MNIST.resources
    )
    files = tuple(name.removesuffix(".gz") for name, _ in MNIST.resources)
    provide(Source("mnist", files, downloads, "http://yann.lecun.com/exdb/mnist"), folder)
    train, test = _part(folder, "train"), _part(folder, "t10k")
    dataset = labelled_images(train, test, shape=(1, 28, 28), classes=10, mean=[MEAN], std=[STD], mend=MEND)
    if mnist_statistics == "published":
        return dataset
    mean, std = each_pixel_statistics(dataset.train_x)
    return replace(dataset, mean=mean, std=std)


def write_stand_in(root: Path) -> None:
    """Write 300 training and 100 test images of scikit-learn's digits, enlarged."""
    for part, each, first in (("train", 30, 0), ("t10k", 10, 30)):
        x, y = digit_images(10, each, 28, first=first)
        write_idx(root / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", x)
        write_idx(root / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", y.astype(np.uint8))


def write_idx(file: Path, data: npt.NDArray[np.uint8]) -> None:
    """Write an array as a file of MNIST: zeros, 8 for bytes, the axes, their lengths, big-endian; the numbers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack(f">HBB{data.ndim}I", 0, 8, data.ndim, *data.shape) + data.tobytes())


def _part(folder: Path, part: str) -> Labelled:
    images, labels = folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"
    read = []
    for file, reader in ((images, read_image_file), (labels, read_label_file)):
        try:
            read.append(reader(str(file)))
        except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error) or "the header is not that of an IDX file of unsigned bytes"
            raise DataError(f"{file} is damaged ({file.stat().st_size:,} bytes): {reason}", MEND) from None
    x, y = read
    return Labelled(images, x[:, None], y.to(torch.int64), labels)
