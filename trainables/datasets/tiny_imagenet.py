"""TinyImageNet-200: 100,000 training and 10,000 validation photographs of 64 x 64 in 200 classes (CS231n, Stanford).

Source: http://cs231n.stanford.edu, in the folder `tiny-imagenet-200/`. The validation set is the test set here, as
published (the labels of the test set are not public). Images are decoded once and kept beside them, in
`tiny-imagenet-200/decoded.safetensors` (1.4 GB; remove it where images change). Some are grey; they get three equal
channels. PIL's JPEG decoder decides the last bits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flatmin.errors import DataError
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.downloads import Download, Source, kept, provide
from flatmin.trainables.images import Labelled, decoded, labelled_images, rgb

FOLDER = "tiny-imagenet-200"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as published."""

_SOURCE = Source(
    "tiny_imagenet",
    (f"{FOLDER}/wnids.txt", f"{FOLDER}/train", f"{FOLDER}/val/images", f"{FOLDER}/val/val_annotations.txt"),
    (
        Download(
            "tiny-imagenet-200.zip",
            ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
            "90528d7ca1a48142e341f4ef8d21d0de",
            248_100_043,
            into=".",
        ),
    ),
    "http://cs231n.stanford.edu",
)


def tiny_imagenet(root: Path) -> Dataset:
    """Return images `[3, 64, 64]`, classes in the order of `wnids.txt`, normalised by ImageNet's mean and deviation.

    Args:
        root: Where data sets lie.

    Raises:
        DataError: The files are not there, or damaged.
    """
    provide(_SOURCE, root)
    folder = root / FOLDER
    mend = f"remove {folder}, and `flatmin-sweep launch` unpacks or downloads it again"
    wnids = _text(folder / "wnids.txt", mend).split()
    read = kept(folder / "decoded.safetensors", lambda: _decode(folder, wnids, mend))
    return labelled_images(
        Labelled(folder / "train", read["train_x"], read["train_y"]),
        Labelled(folder / "val", read["test_x"], read["test_y"]),
        shape=(3, 64, 64),
        classes=len(wnids),
        mean=MEAN,
        std=STD,
        mend=mend,
    )


def _decode(folder: Path, wnids: list[str], mend: str) -> dict[str, Tensor]:
    number = {wnid: place for place, wnid in enumerate(wnids)}
    train, test = [], []
    for wnid in wnids:
        files = sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
        if not files:
            raise DataError(f"there is no image in {folder / 'train' / wnid / 'images'}", mend)
        train += [(file, number[wnid]) for file in files]
    counts = {len(list((folder / "train" / wnid / "images").glob("*.JPEG"))) for wnid in wnids}
    if len(counts) > 1:
        raise DataError(
            f"{folder / 'train'}: classes have {min(counts)} to {max(counts)} images, and should be alike", mend
        )
    annotations = folder / "val" / "val_annotations.txt"
    for place, line in enumerate(_text(annotations, mend).splitlines(), start=1):
        file, wnid = [*line.split("\t"), "", ""][:2]
        if wnid not in number:
            raise DataError(f"{annotations}, line {place}: '{wnid}' is not in {folder / 'wnids.txt'}", mend)
        test.append((folder / "val" / "images" / file, number[wnid]))
    there = len(list((folder / "val" / "images").glob("*.JPEG")))
    if len({file for file, _ in test}) != len(test) or len(test) < there:
        raise DataError(
            f"{annotations} has {len(test)} lines, and there are {there} images beside it, one for each", mend
        )
    return {**_read("train", train, mend), **_read("test", test, mend)}


def _text(file: Path, mend: str) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text in UTF-8: {error}", mend) from None


def _read(part: str, files: list[tuple[Path, int]], mend: str) -> dict[str, Tensor]:
    x = torch.empty(len(files), 3, 64, 64, dtype=torch.uint8)
    for place, (file, _) in enumerate(files):
        x[place] = rgb(decoded(file, ("RGB", "L"), mend, size=(64, 64)))
    return {f"{part}_x": x, f"{part}_y": torch.tensor([label for _, label in files])}
