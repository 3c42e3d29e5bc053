"""Handwritten digits: 1,797 images of 8 x 8 that come with scikit-learn (Alpaydin and Kaynak 1998).

They are read without scikit-learn, whose import takes as long as torch's, and every worker would wait for it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from flatmin.trainables.dataset import Dataset

TRAIN_SIZE = 1000

_FILE = "datasets/data/digits.csv.gz"
"""Where scikit-learn keeps them: 64 pixels from 0 to 16 and the digit, an image in each line."""

_ORDER = Path(__file__).with_name("digits_order.npy")
"""The training examples and then those of the test set, as `train_test_split(train_size=1000, random_state=0,
stratify=target)` of scikit-learn draws them from all."""


def digits(root: Path) -> Dataset:
    """Return 1,000 training and 797 test images `[1, 8, 8]`, standardised pixel by pixel.

    The split is stratified by class and always the same. Pixels that are constant over the training set
    are centred only.

    Args:
        root: Where data sets lie; unused, for the images are bundled with scikit-learn.
    """
    images, labels = bundled_digits()
    train, test = np.split(np.load(_ORDER), [TRAIN_SIZE])
    x, y = (images / 16.0).astype(np.float32)[:, None], torch.from_numpy(labels)
    std = x[train].std(axis=0)
    return Dataset(
        train_x=torch.from_numpy(x[train]),
        train_y=y[train],
        test_x=torch.from_numpy(x[test]),
        test_y=y[test],
        mean=torch.from_numpy(x[train].mean(axis=0)),
        std=torch.from_numpy(np.where(std > 0, std, 1).astype(np.float32)),
        classes=10,
    )


def bundled_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the images uint8 `[1797, 8, 8]`, from 0 to 16, and their classes int64 `[1797]`."""
    spec = find_spec("sklearn")
    file = Path(spec.origin).parent / _FILE if spec and spec.origin else None
    if file and file.is_file():
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits  # a version of it that keeps them elsewhere

    bunch = load_digits()
    return bunch.images.astype(np.uint8), bunch.target.astype(np.int64)


def write_stand_in(root: Path) -> None:
    """Write nothing: the images come with scikit-learn, and are small."""
