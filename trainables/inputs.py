"""The inputs that a stack of models shares, and the noise that each of them adds.

What costs no time on the small sets of floats costs no memory on the large ones of images: floats are normalised once,
and small noise is kept; images are normalised, and large noise is drawn, whenever a batch is made.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from flatmin.stack import stream_key
from flatmin.trainables.corruption import data_noise
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.streaming import Images, Window
from flatmin.trainables.training import Recipe

_KEPT_NUMBERS = 2**26
"""Noise of at most so many numbers is kept; drawing it anew takes some 80 ns a number on one core."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a whole set, or of what is at hand of it.

    Attributes:
        x: uint8 images as they are, or floats that are normalised, `[n, *shape]`, on the device; or images in files.
        mean, std: What normalisation subtracts and divides by, in the type of the weights.
    """

    x: Tensor | Images | Window
    mean: Tensor
    std: Tensor

    @staticmethod
    def of(x: Tensor | Images, dataset: Dataset, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Return inputs of a data set on a device."""
        mean, std = dataset.mean.to(dtype), dataset.std.to(dtype)
        if isinstance(x, Tensor):
            x = (x if x.dtype == torch.uint8 else (x.to(dtype) - mean) / std).to(device)
        return Inputs(x, mean.to(device), std.to(device))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole set, `n` first."""
        return tuple(self.x.shape)

    @property
    def raw(self) -> bool:
        """Whether they are images, to be normalised when they are used."""
        return self.x.dtype == torch.uint8

    def take(self, numbers: Tensor, keys: Sequence[int]) -> Tensor:
        """Return examples `[G, b]`, each row in the view of its key if there are views."""
        if isinstance(self.x, Tensor):
            return _rows(self.x, numbers)
        return self.x.take(numbers, keys) if isinstance(self.x, Window) else self.x[numbers]

    def normalised(self, images: Tensor) -> Tensor:
        """Return images as the network sees them: uint8, or noisy floats in their units, which are overwritten."""
        scale, shift = 1 / (255 * self.std.double()), -self.mean.double() / self.std.double()
        # one pass to convert and two in place: a product of mixed types takes twice as long
        x = images.to(self.std.dtype, memory_format=torch.contiguous_format)
        return x.mul_(scale.to(x.dtype)).add_(shift.to(x.dtype))


@dataclass(frozen=True)
class Noise:
    """The data noise of K models: of example i under a seed it is sigma x z, with a z that never changes.

    Attributes:
        seeds: The noise seed of each model.
        sigma: Their deviations `[K]`, in the range of inputs before normalisation.
        clip: Which of them cut noisy inputs off at 0 and 1.
        shape: Of one example.
        n: Examples in the whole set.
        divisor: What z is divided by to be in the units of the inputs: std of normalised ones, 1 / 255 of images.
        kept: z / divisor of some seeds by seed, `[n, *shape]`.
    """

    seeds: tuple[int, ...]
    sigma: Tensor
    clip: tuple[bool, ...]
    shape: tuple[int, ...]
    n: int
    divisor: Tensor
    kept: dict[int, Tensor]

    @staticmethod
    def of(inputs: Inputs, recipes: Sequence[Recipe]) -> Noise | None:
        """Return the noise of models on a training set, or None where there is none."""
        if all(recipe.data_noise == 0 for recipe in recipes):
            return None
        std = inputs.std
        seeds = tuple(recipe.noise_seed for recipe in recipes)
        noise = Noise(
            seeds,
            torch.tensor([recipe.data_noise for recipe in recipes], dtype=std.dtype, device=std.device),
            tuple(recipe.data_noise_clip for recipe in recipes),
            inputs.shape[1:],
            inputs.shape[0],
            torch.tensor(1 / 255, dtype=torch.float64, device=std.device) if inputs.raw else std.double(),
            {},
        )
        if len(set(seeds)) * math.prod(inputs.shape) > _KEPT_NUMBERS:
            return noise
        every = torch.arange(inputs.shape[0], device=std.device)
        return replace(noise, kept={seed: noise.drawn([seed], every[None])[0] for seed in set(seeds)})

    def select(self, index: Tensor) -> Noise:
        """Return the noise of some of the models."""
        chosen = index.tolist()
        seeds, clip = tuple(self.seeds[k] for k in chosen), tuple(self.clip[k] for k in chosen)
        return replace(self, seeds=seeds, sigma=self.sigma[index], clip=clip)

    def drawn(self, seeds: Sequence[int], numbers: Tensor) -> Tensor:
        """Return z / divisor of examples `numbers` `[S, b]`, each row under its seed, `[S, b, *shape]`."""
        if self.kept:
            return torch.stack([_rows(self.kept[seed], row) for seed, row in zip(seeds, numbers, strict=True)])
        keys = torch.tensor([[stream_key("data noise", seed)] for seed in seeds], device=numbers.device)
        z = data_noise(keys, numbers, self.shape, self.n, torch.float64)
        return (z / self.divisor).to(self.sigma.dtype)

    def added(self, x: Tensor, numbers: Tensor, alike: Sequence[int], zero: Tensor, one: Tensor) -> Tensor:
        """Return inputs `[K, b, *shape]` with noise.

        Args:
            x: The inputs without.
            numbers: Which examples they are, `[K, b]`.
            alike: For each model, one number where the examples are the same.
            zero: What 0 is in these inputs, and so the least that a clipped one can be.
            one: What 1 is.
        """
        first, place = groups(tuple(zip(alike, self.seeds, strict=True)))
        z = spread(self.drawn([self.seeds[k] for k in first], numbers[list(first)]), place)
        each = (-1, *[1] * (z.dim() - 1))
        noisy = x + self.sigma.reshape(each) * z
        if not any(self.clip):
            return noisy
        clip = torch.tensor(self.clip, device=noisy.device).reshape(each)
        return torch.where(clip, torch.clamp(noisy, zero, one), noisy)


def _rows(x: Tensor, numbers: Tensor) -> Tensor:
    """Return `x[numbers]`, which copies whole rows here and single numbers there: 15 times as fast on images."""
    return x.index_select(0, numbers.flatten()).reshape(*numbers.shape, *x.shape[1:])


@lru_cache(maxsize=64)
def groups(labels: tuple[Hashable, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the first place of every label, and for each place which of those labels it has."""
    order = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return tuple(labels.index(label) for label in order), tuple(order[label] for label in labels)


def spread(rows: Tensor, place: Sequence[int]) -> Tensor:
    """Return what each model has, `[K, ...]`, of what G groups have, `[G, ...]`; a view where that can be."""
    if len(rows) == len(place):
        return rows
    return rows.expand(len(place), *rows.shape[1:]) if len(rows) == 1 else rows[list(place)]
