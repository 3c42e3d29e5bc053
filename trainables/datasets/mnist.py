"""MNIST: 60,000 training and 10,000 test images of handwritten digits, 28 x 28 greys (LeCun et al. 1998).

Source: http://yann.lecun.com/exdb/mnist, from torchvision's mirrors, in torchvision's folders: `MNIST/raw/`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.datasets import MNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

from flatmin.errors import DataError
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.downloads import Download, Source, provide
from flatmin.trainables.images import Labelled, labelled_images

MEAN, STD = 0.1307, 0.3081
"""Of all pixels of the training set."""

MEND = "remove it; it is unpacked from its .gz again, which `flatmin-sweep launch` downloads"


def mnist(root: Path) -> Dataset:
    """Return images `[1, 28, 28]`, normalised by the published mean and deviation.

    Args:
        root: Where data sets lie.

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
    return labelled_images(train, test, shape=(1, 28, 28), classes=10, mean=[MEAN], std=[STD], mend=MEND)


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
