"""Handwritten digits: 1,797 images of 8 x 8 that come with scikit-learn (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from flatmin.trainables.dataset import Dataset

TRAIN_SIZE = 1000


def digits(root: Path) -> Dataset:
    """Return 1,000 training and 797 test images `[1, 8, 8]`, standardised pixel by pixel.

    The split is stratified by class and always the same. Pixels that are constant over the training set
    are centred only.

    Args:
        root: Where data sets lie; unused, for the images are bundled with scikit-learn.
    """
    bunch = load_digits()
    x = (bunch.images / 16.0).astype(np.float32)[:, None]
    train_x, test_x, train_y, test_y = train_test_split(
        x, bunch.target.astype(np.int64), train_size=TRAIN_SIZE, random_state=0, stratify=bunch.target
    )
    std = train_x.std(axis=0)
    return Dataset(
        train_x=torch.from_numpy(train_x),
        train_y=torch.from_numpy(train_y),
        test_x=torch.from_numpy(test_x),
        test_y=torch.from_numpy(test_y),
        mean=torch.from_numpy(train_x.mean(axis=0)),
        std=torch.from_numpy(np.where(std > 0, std, 1).astype(np.float32)),
        classes=10,
    )


def write_stand_in(root: Path) -> None:
    """Write nothing: the images come with scikit-learn, and are small."""
