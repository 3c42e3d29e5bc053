"""ImageNet (ILSVRC 2012): 1.28 million training and 50,000 validation photographs of 1,000 classes, in files.

Images are read from their files as they are needed (see `flatmin.trainables.streaming`): as uint8 of 224 x 224 they
would be 193 GB. The published validation set is the test set here. The same tree with a part of the classes, as of
ImageNet-100, is a data set of so many classes. Source: Russakovsky et al. 2015, https://image-net.org/download.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import has_file_allowed_extension

from flatmin.errors import DataError, MissingData
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.stand_ins_images import coloured_digits
from flatmin.trainables.streaming import Images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenet(root: Path) -> Dataset:
    """Return the photographs `[3, 224, 224]`, classes in the order of their WordNet ids, normalised as published.

    Args:
        root: Where data sets lie: `imagenet/train/<wnid>/*.JPEG` and `imagenet/val/<wnid>/*.JPEG`.

    Raises:
        DataError: A folder is missing or has no images.
    """
    folder = root / "imagenet"
    wnids = _classes(folder / "train", folder)
    if _classes(folder / "val", folder) != wnids:
        odd = sorted(set(wnids) ^ set(_classes(folder / "val", folder)))
        raise DataError(
            f"{folder}: train and val differ in {len(odd)} class folders, {odd[0]} among them",
            "give both all classes (the validation images come in one folder, to be sorted into folders by their wnid)",
        )
    (train, train_y), (test, test_y) = _listed(folder / "train", wnids), _listed(folder / "val", wnids)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return Dataset(cast(Tensor, train), train_y, cast(Tensor, test), test_y, mean, std, classes=len(wnids))


def _classes(folder: Path, root: Path) -> list[str]:
    names = (
        sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
        if folder.is_dir()
        else []
    )
    if not names:
        raise MissingData(
            f"ImageNet is not at {root}: there are no class folders in {folder}",
            f"unpack ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (https://image-net.org/download, with an "
            f"account) to {root}/train/<wnid>/*.JPEG and {root}/val/<wnid>/*.JPEG, or set FLATMIN_DATA to the folder "
            "that holds 'imagenet'",
        )
    return names


def _listed(folder: Path, wnids: list[str]) -> tuple[Images, Tensor]:
    files: list[Path] = []
    counts = []
    for wnid in wnids:
        own = [
            file
            for file in (folder / wnid).iterdir()
            if has_file_allowed_extension(file.name, (".jpeg", ".jpg", ".png"))
        ]
        if not own:
            raise DataError(f"{folder / wnid} has no images (.JPEG, .jpg or .png)", "unpack that class again")
        files += sorted(own)
        counts.append(len(own))
    return Images(files), torch.arange(len(wnids)).repeat_interleave(torch.tensor(counts))


def write_stand_in(root: Path) -> None:
    """Write 40 training and 20 validation images of four of scikit-learn's digits, enlarged and coloured."""
    wnids = ("n01440764", "n01443537", "n01484850", "n01491361")
    for part, each, first in (("train", 10, 0), ("val", 5, 10)):
        x, y = coloured_digits(4, each, 256, first=first)
        images = {wnid: [Image.fromarray(image) for image in x[y == c]] for c, wnid in enumerate(wnids)}
        write_tree(root / "imagenet" / part, images)


def write_tree(folder: Path, images: Mapping[str, Sequence[Image.Image]]) -> None:
    """Write images of any size, by the WordNet id of their class, as the files of a part of ImageNet."""
    for wnid, own in images.items():
        (folder / wnid).mkdir(parents=True)
        for number, image in enumerate(own):
            image.save(folder / wnid / f"{wnid}_{number}.JPEG")
