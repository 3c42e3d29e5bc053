"""What CIFAR-10 and CIFAR-100 share: files, checksums and reading by torchvision, and the constants that normalise."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torchvision.datasets import CIFAR10

from flatmin.settings import Setting
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.downloads import Download, Source, check_md5, provide
from flatmin.trainables.images import Labelled, labelled_images, pixel_statistics

PixelStatistics = Annotated[
    Literal["lpf", "train", "vasso"],
    Setting(
        about="Mean and deviation that normalise colours: the constants of LPF-SGD, those of all training pixels, or "
        "the constants of VaSSO."
    ),
]

_PUBLISHED = {
    "lpf": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "vasso": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
}
"""Both are of CIFAR-10, and were used for CIFAR-100 as well. The first deviations are means over images of the
deviation within an image (Bisla et al. 2022), the second are of all pixels (Li and Giannakis 2023)."""

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def read_cifar(name: str, published: type[CIFAR10], root: Path, statistics: str, size: int, classes: int) -> Dataset:
    """Return one of the two data sets.

    Args:
        name: Its name here.
        published: Torchvision's class: its files and their checksums.
        root: Where data sets lie.
        statistics: What normalises.
        size: Bytes of the archive.
        classes: How many there are.

    Raises:
        DataError: The files are not there, or damaged.
    """
    checksums = dict([*published.train_list, *published.test_list, (published.meta["filename"], published.meta["md5"])])
    folder = root / published.base_folder
    download = Download(published.filename, (published.url,), published.tgz_md5, size, into=".")
    source = Source(name, tuple(f"{published.base_folder}/{file}" for file in checksums), (download,), PAGE)
    provide(source, root)
    mend = f"remove {folder}, and `flatmin-sweep launch` unpacks or downloads it again"
    try:
        with warnings.catch_warnings():  # numpy 2.4.0 to 2.4.4 warn of pickles of 2009
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            train, test = (_part(published, root, folder, train) for train in (True, False))
    except RuntimeError:  # torchvision does not say which file it is
        for file, md5 in checksums.items():
            check_md5(folder / file, md5, mend)
        raise
    mean, std = pixel_statistics(train.x) if statistics == "train" else _PUBLISHED[statistics]
    return labelled_images(train, test, shape=(3, 32, 32), classes=classes, mean=mean, std=std, mend=mend)


def _part(published: type[CIFAR10], root: Path, folder: Path, train: bool) -> Labelled:
    read = published(root, train=train)
    x = torch.from_numpy(read.data.transpose(0, 3, 1, 2).copy())
    return Labelled(folder, x, torch.tensor(read.targets, dtype=torch.int64))
