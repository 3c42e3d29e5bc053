"""SVHN: 73,257 training and 26,032 test colour images of house numbers' digits, 32 x 32 (Netzer et al. 2011).

Source: http://ufldl.stanford.edu/housenumbers, the cropped digits, in the folder `SVHN/`. The digit 0, which the files
call 10, is class 0. Classes are uneven: a fifth of the training images are of the digit 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import scipy.io
import torch
from torchvision.datasets import SVHN

from flatmin.settings import Setting
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.downloads import Download, Source, check_md5, provide
from flatmin.trainables.images import Labelled, labelled_images, pixel_statistics
from flatmin.trainables.stand_ins import stand_in_checksums
from flatmin.trainables.stand_ins_images import coloured_digits

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
    published = _published(root)
    downloads = []
    for part in parts:
        url, file, md5 = published.split_list[part]
        downloads.append(Download(file, (url,), md5, SIZES[part]))
    files = tuple(download.path for download in downloads)
    provide(Source("svhn", files, tuple(downloads), "http://ufldl.stanford.edu/housenumbers"), folder)
    read = {part: _part(published, folder, part) for part in parts}
    train = read["train"]
    if svhn_extra:
        train = Labelled(train.where, torch.cat([train.x, read["extra"].x]), torch.cat([train.y, read["extra"].y]))
    mean, std = pixel_statistics(train.x)
    mend = f"remove {folder}, and `flatmin-sweep launch` downloads it again"
    return labelled_images(train, read["test"], shape=(3, 32, 32), classes=10, mean=mean, std=std, mend=mend)


def _published(root: Path) -> type[SVHN]:
    """Return torchvision's class, with the checksums of a stand-in where there is one."""
    checksums = stand_in_checksums(root)
    own = {part: [url, file, checksums.get(f"SVHN/{file}", md5)] for part, (url, file, md5) in SVHN.split_list.items()}
    published: type[SVHN] = type("SVHN", (SVHN,), {"split_list": own})
    return published


def _part(published: type[SVHN], folder: Path, part: str) -> Labelled:
    _, file, md5 = published.split_list[part]
    try:
        read = published(str(folder), split=part)
    except RuntimeError:
        check_md5(folder / file, md5, f"remove {folder / file}, and `flatmin-sweep launch` downloads it again")
        raise
    return Labelled(folder / file, torch.from_numpy(read.data.copy()), torch.from_numpy(read.labels.copy()))


def write_stand_in(root: Path) -> None:
    """Write 300 training, 100 test and 100 extra images of scikit-learn's digits, enlarged and coloured."""
    for part, each, first in (("train", 30, 0), ("test", 10, 30), ("extra", 10, 40)):
        x, y = coloured_digits(10, each, 32, first=first)
        write_mat(root / "SVHN" / SVHN.split_list[part][1], x, np.where(y == 0, 10, y).astype(np.uint8))


def write_mat(file: Path, x: npt.NDArray[np.uint8], y: npt.NDArray[np.uint8]) -> None:
    """Write images `[n, 32, 32, 3]` and their digits, 10 for 0, as a file of SVHN."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(file, {"X": x.transpose(1, 2, 3, 0), "y": y[:, None]}, do_compression=True)
