"""TinyImageNet-200: 100,000 training and 10,000 validation photographs of 64 x 64 in 200 classes (CS231n, Stanford).

Source: http://cs231n.stanford.edu, in the folder `tiny-imagenet-200/`. The validation set is the test set here, as
published (the labels of the test set are not public). Images are decoded once and kept beside them, in
`tiny-imagenet-200/decoded.safetensors` (1.4 GB; remove it where images change). Some are grey; they get three equal
channels. PIL's JPEG decoder decides the last bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flatmin.errors import DataError
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.downloads import Download, Source, kept, provide
from flatmin.trainables.images import Labelled, decoded, labelled_images, rgb
from flatmin.trainables.stand_ins_images import coloured_digits

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


def write_stand_in(root: Path) -> None:
    """Write 400 training and 200 validation images of scikit-learn's digits in 20 colours, a class each."""
    wnids = [f"n{number:08}" for number in range(1, 201)]
    parts = []
    for each, first in ((2, 0), (1, 40)):
        x, y = coloured_digits(200, each, 64, first=first)
        parts.append([(wnids[c], Image.fromarray(image)) for image, c in zip(x, y, strict=True)])
    train = {wnid: [image for own, image in parts[0] if own == wnid] for wnid in wnids}
    write_files(root / FOLDER, train, parts[1])


def write_files(
    folder: Path, train: Mapping[str, Sequence[Image.Image]], val: Sequence[tuple[str, Image.Image]]
) -> None:
    """Write images of 64 x 64 as the files of TinyImageNet.

    Args:
        folder: Where they go.
        train: The training images of each class, by its WordNet id.
        val: The class and the image of each validation example.
    """
    for wnid, images in train.items():
        place = folder / "train" / wnid
        (place / "images").mkdir(parents=True)
        names = [f"{wnid}_{number}.JPEG" for number in range(len(images))]
        for name, image in zip(names, images, strict=True):
            image.save(place / "images" / name, quality=95)
        (place / f"{wnid}_boxes.txt").write_text("".join(f"{name}\t0\t0\t63\t63\n" for name in names))
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for number, (wnid, image) in enumerate(val):
        image.save(folder / "val" / "images" / f"val_{number}.JPEG", quality=95)
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(train))
