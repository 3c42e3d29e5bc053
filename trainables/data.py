"""The data of one stack: on the device, with each model's own labels and noise, gathered by index.

The examples are held once, whatever the number of models. Label noise is a `[K, n]` matrix of classes;
data noise is one standard normal tensor per noise seed, scaled by each model's sigma as batches are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmin.stack import Batch, normal, permutation, stream_key, uniform
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.training import Recipe

_EVALUATION_ROWS = 65_536
"""Examples, over all models, that one forward pass of an evaluation holds."""


@dataclass(frozen=True)
class Split:
    """One part of a data set for K models.

    Attributes:
        x: Normalised inputs `[n, *shape]`, the same for all models.
        y: Classes as used, `[K, n]`.
        true_y: Classes as they are, `[n]`.
        sigma: Each model's data noise `[K]`, or None where there is none.
        noise: Normalised noise of unit sigma `[S, n, *shape]`, one per noise seed.
        noise_row: Which noise each model has, `[K]`.
    """

    x: Tensor
    y: Tensor
    true_y: Tensor
    sigma: Tensor | None = None
    noise: Tensor | None = None
    noise_row: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def select(self, index: Tensor) -> Split:
        """Return the split for some of the models."""
        if self.sigma is None or self.noise_row is None:
            return Split(self.x, self.y[index], self.true_y)
        return Split(self.x, self.y[index], self.true_y, self.sigma[index], self.noise, self.noise_row[index])

    def gather(self, order: Tensor) -> Batch:
        """Return the batch of examples `order`, `[K, b]`, each model its own."""
        return Batch(self._noisy(self.x[order], order), self.y.gather(1, order))

    def chunks(self) -> list[Batch]:
        """Return all examples in fixed order, as batches that fit in memory."""
        size = max(1, _EVALUATION_ROWS // len(self.y))
        batches = []
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            x, y = self.x[start:stop], self.y[:, start:stop]
            if self.sigma is None:
                batches.append(Batch(x, y, shared=True))
            else:
                order = torch.arange(start, stop, device=x.device).expand(len(y), -1)
                batches.append(Batch(self._noisy(x.expand(len(y), *x.shape), order), y))
        return batches

    def _noisy(self, x: Tensor, order: Tensor) -> Tensor:
        if self.sigma is None or self.noise is None or self.noise_row is None:
            return x
        sigma = self.sigma.reshape(-1, *[1] * (x.dim() - 1))
        return x + sigma * self.noise[self.noise_row[:, None], order]


@dataclass(frozen=True)
class StackData:
    """The training, validation and test sets of K models; `val` is None when nothing is held out."""

    train: Split
    val: Split | None
    test: Split

    @property
    def label_flip_rate(self) -> Tensor:
        """The share of training labels that are not the true ones, `[K]`."""
        return (self.train.y != self.train.true_y).double().mean(dim=1)

    def select(self, index: Tensor) -> StackData:
        """Return the data of some of the models."""
        val = self.val.select(index) if self.val else None
        return StackData(self.train.select(index), val, self.test.select(index))


def stack_data(dataset: Dataset, recipes: Sequence[Recipe], device: torch.device, dtype: torch.dtype) -> StackData:
    """Corrupt, split and normalise a data set for the models of a stack.

    Args:
        dataset: The data set as its plug-in returns it.
        recipes: The recipe of each model; `val_size` is the same for all.
        device: Where the tensors go.
        dtype: The type of the inputs.

    Raises:
        ValueError: `val_size` leaves nothing to train on.
    """
    n, held_out = len(dataset.train_x), recipes[0].val_size
    if held_out >= n:
        raise ValueError(f"val_size = {held_out} leaves nothing of {n} training examples; it must be under {n}")
    order = permutation(stream_key("validation"), n) if held_out else torch.arange(n)
    kept, val = order[: n - held_out].sort().values, order[n - held_out :].sort().values

    def normalised(x: Tensor) -> Tensor:
        return ((x.to(dtype) - dataset.mean.to(dtype)) / dataset.std.to(dtype)).to(device)

    def clean(x: Tensor, y: Tensor) -> Split:
        return Split(normalised(x), y.to(device).expand(len(recipes), -1), y.to(device))

    labels = torch.stack([noisy_labels(dataset.train_y, dataset.classes, recipe) for recipe in recipes])
    train = Split(normalised(dataset.train_x[kept]), labels[:, kept].to(device), dataset.train_y[kept].to(device))
    if any(recipe.data_noise > 0 for recipe in recipes):
        train = _with_noise(train, dataset, kept, recipes)
    held = clean(dataset.train_x[val], dataset.train_y[val]) if held_out else None
    return StackData(train, held, clean(dataset.test_x, dataset.test_y))


def noisy_labels(y: Tensor, classes: int, recipe: Recipe) -> Tensor:
    """Return the labels `[n]` that a model trains on.

    Every example draws one uniform number and one class, whatever the level; those whose number is below
    `label_noise` take the class, so a lower level's flips are among a higher one's. The class is
    uniform over all classes, the true one included (Bisla et al. 2022).
    """
    draw = uniform(stream_key("label noise", recipe.noise_seed), y.shape)
    replacement = (uniform(stream_key("label class", recipe.noise_seed), y.shape) * classes).long()
    return torch.where(draw < recipe.label_noise, replacement, y)


def _with_noise(train: Split, dataset: Dataset, kept: Tensor, recipes: Sequence[Recipe]) -> Split:
    seeds = sorted({recipe.noise_seed for recipe in recipes})
    device, dtype = train.x.device, train.x.dtype
    noise = [
        (normal(stream_key("data noise", seed), dataset.train_x.shape)[kept] / dataset.std).to(device, dtype)
        for seed in seeds
    ]
    sigma = torch.tensor([recipe.data_noise for recipe in recipes], dtype=dtype, device=device)
    rows = torch.tensor([seeds.index(recipe.noise_seed) for recipe in recipes], device=device)
    return Split(train.x, train.y, train.true_y, sigma, torch.stack(noise), rows)
