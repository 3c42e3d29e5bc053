"""Images that do not fit in memory: read from their files by worker processes, ahead of the steps that need them.

Each image is read as published for ImageNet: its shorter side resized to 256, the 224 x 224 in the centre. With the
augmentation `random_resized_crop_flip` it is a random part of 8 to 100 % of the area and of 3:4 to 4:3, resized to
224 x 224, and flipped with probability 1/2 (Szegedy et al. 2015, as in torchvision). What is drawn is a function of
order seed, epoch and image alone. Each thread of the trial has a worker process, which reads two steps ahead.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from flatmin.errors import DataError

CROPPED_WHILE_READ = "random_resized_crop_flip"
"""The augmentation that needs the whole image, which is at hand only while it is read."""

SIZE = 224
"""Pixels on a side of what is read."""

_VIEWS = "flatmin.trainables.views"


class Images:
    """Images in files, RGB, as a tensor uint8 `[n, 3, 224, 224]` would hold them.

    Args:
        files: Their paths.
    """

    dtype = torch.uint8

    def __init__(self, files: Sequence[str | Path]) -> None:
        # one block of bytes: a million Python strings would be copied into every worker that looks at them
        self._files = np.array([str(file).encode() for file in files])

    def __len__(self) -> int:
        return len(self._files)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape that the tensor would have."""
        return (len(self), 3, SIZE, SIZE)

    def read(self, number: int, keys: Sequence[int | None] = (None,)) -> list[Tensor]:
        """Return views of one image, each uint8 `[3, 224, 224]`: its centre for None, a random part for a stream's key.

        Raises:
            DataError: The file is no image, or damaged.
        """
        from flatmin.trainables import views  # torchvision, which takes as long to load as torch

        path = self._files[number].decode()
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}", "put a whole copy of it there") from None
        return [views.centre(image) if key is None else views.part(image, key, number) for key in keys]

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Return the centres of images `[...]` as uint8 `[..., 3, 224, 224]`, on the device of the numbers."""
        read = [self.read(number)[0] for number in numbers.flatten().tolist()]
        return torch.stack(read).reshape(*numbers.shape, *self.shape[1:]).to(numbers.device)


@dataclass(frozen=True)
class Window:
    """The images of one step, on the device.

    Attributes:
        ids: View x n + number of each, ascending, int64 `[u]`.
        images: uint8 `[u, 3, 224, 224]`.
        keys: The streams of the views; none where there is one view, the centre.
        n: Images in the whole set.
    """

    ids: Tensor
    images: Tensor
    keys: tuple[int, ...]
    n: int
    dtype = torch.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole set."""
        return (self.n, *self.images.shape[1:])

    def take(self, numbers: Tensor, keys: Sequence[int]) -> Tensor:
        """Return images `[G, b]` of the step, each row in the view of its key."""
        return self.images[torch.searchsorted(self.ids, view_ids(numbers, keys, self.keys, self.n))]


def view_ids(numbers: Tensor, keys: Sequence[int], views: Sequence[int], n: int) -> Tensor:
    """Return the ids of images `[G, b]` in the views of G keys."""
    places = [views.index(key) if views else 0 for key in keys]
    return numbers + n * torch.tensor(places, device=numbers.device)[:, None]


def windows(images: Images, steps: Sequence[Tensor], keys: Sequence[int], device: torch.device) -> Iterator[Window]:
    """Yield the images of every step, read ahead.

    Args:
        images: The set.
        steps: The ids that each step needs, ascending, on the CPU.
        keys: The streams of the views.
        device: Where the images go.

    Yields:
        What the step needs.

    Raises:
        DataError: A file cannot be read.
    """
    # not "fork": the process has threads, of Ray and of CUDA. One server loads torch, and each worker is a fork of it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", _VIEWS])
    loader = DataLoader(
        _Reads(images, tuple(keys)),
        batch_sampler=_Steps(steps),
        collate_fn=_unchanged,
        num_workers=torch.get_num_threads(),
        pin_memory=device.type == "cuda",
        multiprocessing_context=context,
    )
    for ids, read in zip(steps, loader, strict=True):
        if isinstance(read, DataError):
            raise read
        yield Window(ids.to(device), read.to(device, non_blocking=True), tuple(keys), len(images))


class _Steps:
    """The ids of every step as lists, one at a time: those of an epoch would take as much as the files' names."""

    def __init__(self, steps: Sequence[Tensor]) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        return (ids.tolist() for ids in self.steps)


class _Reads(torch.utils.data.Dataset[Tensor]):
    """What a worker does with the ids of a step: it reads every file once, whatever the views of it."""

    def __init__(self, images: Images, keys: tuple[int, ...]) -> None:
        self.images, self.keys = images, keys

    def __getitems__(self, ids: list[int]) -> Tensor | DataError:
        views: dict[int, list[int]] = {}
        for place in ids:
            views.setdefault(place % len(self.images), []).append(place // len(self.images))
        read: dict[int, Tensor] = {}
        try:
            for number, own in views.items():
                images = self.images.read(number, [self.keys[view] for view in own] if self.keys else [None])
                read.update({view * len(self.images) + number: image for view, image in zip(own, images, strict=True)})
        except DataError as error:  # to be raised where it can be caught as what it is
            return error
        # a process that shares a short batch may have none of it
        return torch.stack([read[place] for place in ids]) if ids else torch.empty(0, *self.images.shape[1:]).byte()


def _unchanged(read: Any) -> Any:
    return read
