"""SVHN: 73,257 training and 26,032 test colour images of house numbers' digits, 32 x 32 (Netzer et al. 2011).

Source: http://ufldl.stanford.edu/housenumbers, the cropped digits, in the folder `SVHN/`. The digit 0, which the files
call 10, is class 0. Classes are uneven: a fifth of the training images are of the digit 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from torchvision.datasets import SVHN

from flatmin.settings import Setting
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.downloads import Download, Source, check_md5, provide
from flatmin.trainables.images import Labelled, labelled_images, pixel_statistics

SIZES = {"train": 182_040_794, "test": 64_275_384, "extra": 1_329_278_602}
"""Bytes of the files."""


def svhn(
    root: Path,
    *,
    svhn_extra: Annotated[
        bool, Setting(about="Whether the 531,131 easier, extra images are trained on as well.")
    ] = False,
) -> Dataset:
    """Return images `[3, 32, 32]`, normalised by the mean and deviation of all training pixels.

    Args:
        root: Where data sets lie.
        svhn_extra: Whether the extra images follow the training images.

    Raises:
        DataError: The files are not there, or damaged.
    """
    folder, parts = root / "SVHN", ["train", "test", *(["extra"] if svhn_extra else [])]
    downloads = []
    for part in parts:
        url, file, md5 = SVHN.split_list[part]
        downloads.append(Download(file, (url,), md5, SIZES[part]))
    files = tuple(download.path for download in downloads)
    provide(Source("svhn", files, tuple(downloads), "http://ufldl.stanford.edu/housenumbers"), folder)
    read = {part: _part(folder, part) for part in parts}
    train = read["train"]
    if svhn_extra:
        train = Labelled(train.where, torch.cat([train.x, read["extra"].x]), torch.cat([train.y, read["extra"].y]))
    mean, std = pixel_statistics(train.x)
    mend = f"remove {folder}, and `flatmin-sweep launch` downloads it again"
    return labelled_images(train, read["test"], shape=(3, 32, 32), classes=10, mean=mean, std=std, mend=mend)


def _part(folder: Path, part: str) -> Labelled:
    _, file, md5 = SVHN.split_list[part]
    try:
        read = SVHN(str(folder), split=part)
    except RuntimeError:
        check_md5(folder / file, md5, f"remove {folder / file}, and `flatmin-sweep launch` downloads it again")
        raise
    return Labelled(folder / file, torch.from_numpy(read.data.copy()), torch.from_numpy(read.labels.copy()))
