"""The data of one stack: on the device, shared by its models, with each model's own labels, noise and augmentation.

Images stay uint8, held once whatever the number of models and splits. When a batch is gathered: x = u / 255; data
noise, x + sigma z, clipped to [0, 1] if asked; crops, flips and colours; (x - mean) / std; cutout. Evaluations and
measures see images that are not augmented.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch
from torch import Tensor

from flatmin.stack import Batch, permutation, stream_key
from flatmin.trainables.augmentation import cutout, draws, transform_pixels
from flatmin.trainables.corruption import check_recipe, choose, noisy_labels
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.inputs import Inputs, Noise, groups, spread
from flatmin.trainables.streaming import CROPPED_WHILE_READ, Images, Window, view_ids, windows
from flatmin.trainables.training import Recipe

_EVALUATION_ROWS = 65_536
"""Examples, over all models, that one forward pass of an evaluation holds at most."""

_EVALUATION_NUMBERS = {"cpu": 2**22}
_DEVICE_NUMBERS = 2**25
"""Input numbers, over all models, that it holds at most, on a CPU and elsewhere."""


@dataclass(frozen=True)
class Split:
    """One part of a data set for K models.

    Attributes:
        inputs: The inputs of the whole set that it is a part of.
        numbers: Which of them it has, int64 `[n]`.
        y: Targets as used, `[K, n, ...]`.
        true_y: Targets as they are, `[n, ...]`.
        noise: The models' data noise, or None where there is none.
        augmentation: How images are changed while training.
        cutout_size: The side of what cutout covers.
        order_seeds: Each model's seed of that, and of the order of the examples.
        epoch: The epoch whose steps are gathered, or None: nothing is augmented.
    """

    inputs: Inputs
    numbers: Tensor
    y: Tensor
    true_y: Tensor
    noise: Noise | None = None
    augmentation: str = "none"
    cutout_size: int = 16
    order_seeds: tuple[int, ...] = ()
    epoch: int | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def streamed(self) -> bool:
        """Whether the inputs are read from files as they are asked for."""
        return not isinstance(self.inputs.x, Tensor)

    def select(self, index: Tensor) -> Split:
        """Return the split for some of the models."""
        seeds = tuple(self.order_seeds[k] for k in index.tolist()) if self.order_seeds else ()
        noise = self.noise.select(index) if self.noise else None
        same = self.y.stride(0) == 0  # one row, seen by all models
        y = self.y[:1].expand(len(index), *self.y.shape[1:]) if same else self.y[index]
        return replace(self, y=y, noise=noise, order_seeds=seeds)

    def steps(self, epoch: int, orders: Sequence[Tensor]) -> Iterator[Split]:
        """Yield what the batches of each step are gathered from: augmented.

        Models of one order seed have the same order, and their images are made once for all of them.

        Args:
            epoch: The epoch.
            orders: The examples `[K, s]` of every step of it that is to come.

        Yields:
            The split, with what a step needs at hand.
        """
        training, images = replace(self, epoch=epoch), self.inputs.x
        if not isinstance(images, Images):
            yield from (training for _ in orders)
            return
        keys = training._keys(self.order_seeds)
        views = tuple(dict.fromkeys(keys)) if self.augmentation == CROPPED_WHILE_READ else ()
        ids = [torch.unique(view_ids(self.numbers[order], keys, views, len(images))).cpu() for order in orders]
        for window in windows(images, ids, views, self.numbers.device):
            yield training._with(window)

    def gather(self, order: Tensor) -> Batch:
        """Return the batch of examples `order`, `[K, b]`, each model its own."""
        alike = range(len(order)) if self.epoch is None else self.order_seeds
        return Batch(self._made(self.numbers[order], alike), self._targets(order))

    def chunks(self) -> _Chunks:
        """Return all examples in fixed order, not augmented, as batches that fit in memory, made as they are read."""
        room = _EVALUATION_NUMBERS.get(self.numbers.device.type, _DEVICE_NUMBERS)
        rows = min(_EVALUATION_ROWS, room // max(1, math.prod(self.inputs.shape[1:])))
        size = max(1, rows // len(self.y))
        bounds = [(start, min(start + size, len(self))) for start in range(0, len(self), size)]
        return _Chunks(self, bounds)

    def between(self, start: int, stop: int) -> Batch:
        """Return examples `start` to `stop`, not augmented; without noise, all models share the inputs."""
        plain, y, numbers = replace(self, epoch=None), self.y[:, start:stop], self.numbers[start:stop]
        if self.noise is None:
            return Batch(plain._made(numbers[None], [0])[0], y, shared=True)
        return Batch(plain._made(numbers.expand(len(y), -1), [0] * len(y)), y)

    def part(self, count: int) -> Split:
        """Return `count` of the examples, drawn at random, the same for all models; a larger part holds a smaller."""
        chosen = permutation(stream_key("part"), len(self))[:count].sort().values.to(self.numbers.device)
        return replace(self, numbers=self.numbers[chosen], y=self.y[:, chosen], true_y=self.true_y[chosen])

    def _targets(self, order: Tensor) -> Tensor:
        if self.y.dim() == 2:
            return self.y.gather(1, order)
        return self.y[torch.arange(len(order), device=order.device)[:, None], order]

    def _with(self, window: Window) -> Split:
        return replace(self, inputs=replace(self.inputs, x=window))

    def _keys(self, seeds: Iterable[int]) -> list[int]:
        """Return the streams of augmentation; 0 where nothing is augmented."""
        if self.epoch is None or self.augmentation == "none":
            return [0 for _ in seeds]
        return [stream_key("augmentation", seed, self.epoch) for seed in seeds]

    def _made(self, numbers: Tensor, alike: Sequence[int]) -> Tensor:
        """Return the inputs of examples `numbers`, `[K, b]`.

        Args:
            numbers: Of the whole set.
            alike: For each model, one number where the examples are the same: in an epoch, the order seed.
        """
        inputs, noise = self.inputs, self.noise
        if isinstance(inputs.x, Tensor) and not inputs.raw:
            x = inputs.take(numbers, ())
            if noise is None:
                return x
            zero, one = ((end - inputs.mean) / inputs.std for end in (0, 1))
            return noise.added(x, numbers, alike, zero, one)
        first, place = groups(tuple(alike))
        rows = list(first)
        keys = self._keys(alike)
        images = inputs.take(numbers[rows], [keys[k] for k in rows])
        if noise is None:
            return spread(self._finished(images, numbers[rows], [keys[k] for k in rows]), place)
        x = spread(images.to(inputs.mean.dtype), place)
        zero, one = inputs.mean.new_tensor(0), inputs.mean.new_tensor(255)
        return self._finished(noise.added(x, numbers, alike, zero, one), numbers, keys)

    def _finished(self, images: Tensor, numbers: Tensor, keys: Sequence[int]) -> Tensor:
        """Return images `[G, b, C, H, W]`, uint8 or noisy floats, as the networks see them."""
        if (
            self.epoch is None
            or self.augmentation == "none"
            or (self.streamed and self.augmentation == CROPPED_WHILE_READ)
        ):
            return self.inputs.normalised(images)
        drawn = draws(torch.tensor(keys, device=images.device), numbers)
        x = self.inputs.normalised(transform_pixels(images, drawn, self.augmentation))
        return cutout(x, drawn, self.augmentation, self.cutout_size)


class _Chunks(Sequence[Batch]):
    """The examples of a split in order, in batches of which each is made whenever it is asked for.

    Going through them reads a streamed set ahead.
    """

    def __init__(self, split: Split, bounds: Sequence[tuple[int, int]]) -> None:
        self.split, self.bounds = split, bounds

    def __len__(self) -> int:
        return len(self.bounds)

    @overload
    def __getitem__(self, place: int) -> Batch: ...

    @overload
    def __getitem__(self, place: slice) -> _Chunks: ...

    def __getitem__(self, place: int | slice) -> Batch | _Chunks:
        if isinstance(place, slice):
            return _Chunks(self.split, self.bounds[place])
        return self.split.between(*self.bounds[place])

    def __iter__(self) -> Iterator[Batch]:
        split, images = self.split, self.split.inputs.x
        if not isinstance(images, Images):
            yield from (split.between(*bounds) for bounds in self.bounds)
            return
        ids = [split.numbers[start:stop].cpu() for start, stop in self.bounds]
        for bounds, window in zip(self.bounds, windows(images, ids, (), split.numbers.device), strict=True):
            yield split._with(window).between(*bounds)


@dataclass(frozen=True)
class StackData:
    """The training, validation and test sets of K models; `val` is None when nothing is held out."""

    train: Split
    val: Split | None
    test: Split

    @property
    def label_flip_rate(self) -> Tensor:
        """The share of training labels that are not the true ones, `[K]`; 0 where targets are no classes."""
        wrong = self.train.y != self.train.true_y
        return wrong.flatten(1).double().mean(dim=1)

    def select(self, index: Tensor) -> StackData:
        """Return the data of some of the models."""
        val = self.val.select(index) if self.val else None
        return StackData(self.train.select(index), val, self.test.select(index))


def stack_data(dataset: Dataset, recipes: Sequence[Recipe], device: torch.device, dtype: torch.dtype) -> StackData:
    """Corrupt, split and normalise a data set for the models of a stack.

    Args:
        dataset: The data set as its plug-in returns it.
        recipes: The recipe of each model; what says which examples there are is the same for all.
        device: Where the tensors go.
        dtype: The type of the inputs.

    Raises:
        RequestError: The data set cannot be split or corrupted like that.
    """
    for recipe in recipes:
        check_recipe(dataset, recipe)
    kept, val = choose(dataset, recipes[0])
    train = Inputs.of(dataset.train_x, dataset, device, dtype)
    test = Inputs.of(dataset.test_x, dataset, device, dtype)

    def clean(inputs: Inputs, numbers: Tensor, y: Tensor) -> Split:
        true = y[numbers].to(device)
        return Split(inputs, numbers.to(device), true.expand(len(recipes), *true.shape), true)

    own = clean(train, kept, dataset.train_y)
    if any(recipe.label_noise > 0 for recipe in recipes):
        labels = [noisy_labels(dataset.train_y, dataset.classes, recipe)[kept] for recipe in recipes]
        own = replace(own, y=torch.stack(labels).to(device))
    own = replace(
        own,
        noise=Noise.of(train, recipes),
        augmentation=recipes[0].augmentation,
        cutout_size=recipes[0].cutout_size,
        order_seeds=tuple(recipe.order_seed for recipe in recipes),
    )
    held = clean(train, val, dataset.train_y) if len(val) else None
    return StackData(own, held, clean(test, torch.arange(len(dataset.test_y)), dataset.test_y))
