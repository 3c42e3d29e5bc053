"""What CIFAR-10 and CIFAR-100 share: files, checksums and reading by torchvision, and the constants that normalise."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from flatmin.settings import Setting
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.downloads import Download, Source, check_md5, provide
from flatmin.trainables.images import Labelled, labelled_images, pixel_statistics
from flatmin.trainables.stand_ins import stand_in_checksums
from flatmin.trainables.stand_ins_images import coloured_digits

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
    published = _with_checksums(published, stand_in_checksums(root))
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


def _with_checksums(published: type[CIFAR10], own: dict[str, str]) -> type[CIFAR10]:
    """Return torchvision's class with the checksums of a stand-in, by file, where there are any."""

    def replaced(file: str, md5: str) -> str:
        return own.get(f"{published.base_folder}/{file}", md5)

    tables = {
        table: [[file, replaced(file, md5)] for file, md5 in getattr(published, table)]
        for table in ("train_list", "test_list")
    }
    meta = {**published.meta, "md5": replaced(published.meta["filename"], published.meta["md5"])}
    return type(published.__name__, (published,), {**tables, "meta": meta})


def _part(published: type[CIFAR10], root: Path, folder: Path, train: bool) -> Labelled:
    read = published(root, train=train)
    x = torch.from_numpy(read.data.transpose(0, 3, 1, 2).copy())
    return Labelled(folder, x, torch.tensor(read.targets, dtype=torch.int64))


def write_cifar(root: Path, published: type[CIFAR10], classes: int) -> None:
    """Write 300 training and 100 test images of scikit-learn's digits, enlarged and coloured, as one of the two."""
    folder = root / published.base_folder
    train, test = [name for name, _ in published.train_list], [name for name, _ in published.test_list]
    for names, each, first in ((train, 300 // classes, 0), (test, 100 // classes, 30)):
        x, y = coloured_digits(classes, each, 32, first=first)
        flat = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        for name, part in zip(names, np.split(np.arange(len(y)), len(names)), strict=True):
            write_batch(folder / name, published, flat[part], y[part].tolist())
    meta = {published.meta["key"]: [f"class {c}" for c in range(classes)]}
    write_pickle(folder / published.meta["filename"], meta)


def write_batch(file: Path, published: type[CIFAR10], x: npt.NDArray[np.uint8], y: Sequence[int]) -> None:
    """Write images `[n, 3072]` and their classes as a file of one of the two."""
    fine = issubclass(published, CIFAR100)
    labels = {"fine_labels": y, "coarse_labels": [c // 5 for c in y]} if fine else {"labels": y}
    write_pickle(file, {"batch_label": "a batch", "data": x, "filenames": ["x.png"] * len(y), **labels})


def write_pickle(file: Path, entry: dict[str, Any]) -> None:
    """Write a dictionary as those of 2009 are: protocol 2, numpy's modules under their old names."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(entry)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(buffer.getvalue().replace(b"numpy._core.", b"numpy.core."))


class _Pickler(pickle.Pickler):
    """Writes arrays as numpy did in 2009: `align` of a data type is the number 0."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented
