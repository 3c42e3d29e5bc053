"""HC18: 999 ultrasound images of fetal heads, and which pixels are head: a segmentation (van den Heuvel et al. 2018).

Source: https://zenodo.org/records/1327317, in the folder `HC18/`. As in aryol/CS-439-project, image_segmentation:

- The head is what the annotated contour encloses, and the contour: all that cannot be reached from the first pixel.
- Image and head are resampled linearly to 0.35 mm per pixel, from the first pixel on, and the first 256 x 256 are
  taken: 90 mm across. What is outside the image is 0; values are cut down to whole numbers; a pixel that has any part
  of the head is head. (Within one level of SimpleITK 2.5, which published it, where its last bits differ.)
- Each image is stretched to its full range, (x - min) / (max - min); kept here in 256 levels.
- 300 images at random are the test set, and 699 the training set: of all in the order of their names (the published
  split was of the order in which a file system listed them, which nobody knows).

The published masks lay one pixel of the original image off it; these do not. Some images are of one fetus (`000_HC.png`
and `000_2HC.png`), and such a split has fetuses in both sets: `hc18_by_fetus` keeps them apart.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from flatmin.errors import DataError
from flatmin.settings import Setting
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.downloads import Download, Source, kept, provide
from flatmin.trainables.images import decoded
from flatmin.trainables.stand_ins_images import head_ultrasound

SPACING, SIZE = 0.35, 256
"""Millimetres per pixel, and pixels, after resampling."""

TEST_SHARE = 300 / 999

_TABLE = "training_set_pixel_size_and_HC.csv"
_ZENODO = "https://zenodo.org/records/1327317"
_SOURCE = Source(
    "hc18",
    ("training_set", _TABLE),
    # Zenodo shows their checksums on the page; the archive is checked by those in it
    (
        Download("training_set.zip", (f"{_ZENODO}/files/training_set.zip?download=1",), into="."),
        Download(_TABLE, (f"{_ZENODO}/files/{_TABLE}?download=1",)),
    ),
    _ZENODO,
)

Array = npt.NDArray[np.float64]


def hc18(
    root: Path,
    *,
    hc18_seed: Annotated[int, Setting(about="Seed of which images are tested on.", ge=0)] = 0,
    hc18_by_fetus: Annotated[bool, Setting(about="Whether all images of a fetus are in one of the two sets.")] = False,
) -> Dataset:
    """Return images `[1, 256, 256]` and masks: 0 is background, 1 head; classes weigh by their rarity in training.

    Args:
        root: Where data sets lie.
        hc18_seed: Of the split; numpy's shuffle of the published code.
        hc18_by_fetus: Take whole fetuses until there are 300 test images or more.

    Raises:
        DataError: The files are not there, or damaged.
    """
    folder = root / "HC18"
    provide(_SOURCE, folder)
    sizes = _pixel_sizes(folder)
    table = hashlib.blake2b(repr(sorted(sizes.items())).encode(), digest_size=4).hexdigest()
    read = kept(folder / f"resampled-{table}.safetensors", lambda: _prepare(folder, sizes))
    order = np.random.RandomState(hc18_seed).permutation(len(sizes))
    held = round(TEST_SHARE * len(sizes))
    if hc18_by_fetus:
        order, held = _by_fetus(sorted(sizes), order, held)
    test, train = torch.from_numpy(order[:held]), torch.from_numpy(order[held:])
    x, y = read["x"], read["y"]
    head = y[train].count_nonzero().double() / y[train].numel()
    return Dataset(
        x[train],
        y[train],
        x[test],
        y[test],
        mean=torch.zeros(1, 1, 1),
        std=torch.ones(1, 1, 1),
        classes=2,
        task="segmentation",
        class_weights=(1 / torch.stack([1 - head, head])).float(),
    )


def _by_fetus(names: list[str], order: npt.NDArray[np.int64], held: int) -> tuple[npt.NDArray[np.int64], int]:
    """Return the order with the images of each fetus together, and how many to hold so that none is divided."""
    fetus = [names[place].split("_")[0] for place in order]
    together = {name: place for place, name in reversed([*enumerate(fetus)])}
    first = np.array([together[name] for name in fetus])
    places = np.argsort(first, kind="stable")
    while held < len(places) and first[places[held]] == first[places[held - 1]]:
        held += 1
    return order[places], held


def _pixel_sizes(folder: Path) -> dict[str, float]:
    """Return millimetres per pixel of each image by its name."""
    table = folder / _TABLE
    mend = f"remove {table}, and `flatmin-sweep launch` downloads it again"
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} is no table in UTF-8: {error}", mend) from None
    try:
        sizes = {row["filename"]: float(row["pixel size(mm)"]) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{table}: a row has no column 'filename' or no number in 'pixel size(mm)': {error}", mend
        ) from None
    there = {file.name for file in (folder / "training_set").glob("*_*HC.png")}
    wrong = [name for name, size in sizes.items() if not 1e-3 < size < 1e3]
    if wrong:
        raise DataError(
            f"{table}: the pixel size of {wrong[0]} is {sizes[wrong[0]]:g} mm, and should be about 0.1", mend
        )
    if there != set(sizes):
        odd = sorted(there ^ set(sizes))
        raise DataError(
            f"{table} and {folder / 'training_set'} differ: {odd[0]} is in one of them ({len(odd)} such)", mend
        )
    return sizes


def _prepare(folder: Path, sizes: dict[str, float]) -> dict[str, Tensor]:
    """Return all images uint8 `[n, 1, 256, 256]` and masks uint8 `[n, 256, 256]`, in the order of their names."""
    x = torch.empty(len(sizes), 1, SIZE, SIZE, dtype=torch.uint8)
    y = torch.empty(len(sizes), SIZE, SIZE, dtype=torch.uint8)
    for place, name in enumerate(sorted(sizes)):
        image, head = _pair(folder / "training_set" / name)
        small = np.floor(_resampled(image, sizes[name]) + 1e-9)
        span = small.max() - small.min()
        x[place, 0] = torch.from_numpy(np.rint((small - small.min()) * (255 / (span or 1))).astype(np.uint8))
        y[place] = torch.from_numpy((_resampled(255 * head.astype(np.float64), sizes[name]) >= 1).astype(np.uint8))
    return {"x": x, "y": y}


def _pair(file: Path) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return an image and which of its pixels are head."""
    mend = f"remove {file.parent}, and `flatmin-sweep launch` unpacks or downloads it again"
    contour_file = file.with_name(file.stem + "_Annotation.png")
    image = decoded(file, ("L",), mend)
    contour = np.array(decoded(contour_file, ("L",), mend, size=image.size)) > 0
    outside, _ = ndimage.label(~contour)
    head = outside != outside[0, 0]
    if contour[0, 0] or not head.any() or np.array_equal(head, contour):
        raise DataError(f"{contour_file}: the contour encloses nothing", mend)
    return np.array(image, dtype=np.float64), head


def _resampled(image: Array, pixel: float) -> Array:
    """Return an image `[H, W]` at 0.35 mm per pixel, `[256, 256]`."""
    for _ in range(2):  # rows, then columns
        place = np.arange(SIZE) * (SPACING / pixel)
        last = len(image) - 1
        low = np.minimum(place.astype(int), last)
        part = np.where(low < last, place - low, 0)[:, None]
        rows = (1 - part) * image[low] + part * image[np.minimum(low + 1, last)]
        image = np.where(place[:, None] <= last + 0.5, rows, 0).T
    return image


def write_stand_in(root: Path) -> None:
    """Write 30 drawn ultrasounds of 25 fetuses."""
    names = [f"{fetus:03}_HC.png" for fetus in range(25)] + [f"{fetus:03}_2HC.png" for fetus in range(5)]
    write_files(root / "HC18", {name: head_ultrasound(seed) for seed, name in enumerate(names)}, 0.25)


def write_files(folder: Path, images: Mapping[str, tuple[Image.Image, Image.Image]], pixel: float) -> None:
    """Write images as the files of HC18.

    Args:
        folder: Where they go.
        images: The grey image and the contour of the head, by name.
        pixel: Millimetres per pixel.
    """
    (folder / "training_set").mkdir(parents=True)
    for name, (image, contour) in images.items():
        image.save(folder / "training_set" / name)
        contour.save(folder / "training_set" / name.replace(".png", "_Annotation.png"))
    with (folder / _TABLE).open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "pixel size(mm)", "head circumference (mm)"])
        rows.writerows([name, pixel, 100.0] for name in images)
