"""What is done to a training set on purpose: which examples are left, which labels are wrong, how noisy inputs are.

In this order: `val_size` examples are held out; `imbalance` thins the classes of the rest; `train_size` takes a part of
what is left; labels are replaced; noise is added to inputs. Each draws from a stream of its own, by the number that an
example has in the whole set, so that one is not changed by another: an example that is left has the wrong label and
the noise that it has in the whole set, at every size.

Every draw is the same on every machine. Orders come from 64-bit integers; labels from uniforms that are multiples
of 2^-53, compared and multiplied (one rounding each); data noise from +, -, x, / and square roots of float64 alone,
which IEEE 754 rounds in one way (logarithms and cosines of libraries differ in the last bit).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.stack import permutation, stream_key, uniform
from flatmin.stack.streams import bits_at
from flatmin.trainables.dataset import Dataset
from flatmin.trainables.streaming import CROPPED_WHILE_READ, Images
from flatmin.trainables.training import Recipe

_OF_BYTES = ("autoaugment_cutout", CROPPED_WHILE_READ)
"""Augmentations whose pixels are made of others, so that noise of each pixel would be another noise."""

_PIECE, _DEVICE_PIECE = 2**15, 2**24
"""Numbers that are drawn at once: on a CPU as many as stay in its cache, elsewhere plenty."""


def check_recipe(dataset: Dataset, recipe: Recipe) -> None:
    """Check that a data set can be corrupted and augmented as a recipe says.

    Raises:
        RequestError: It cannot: the task has no classes, or the inputs are no images.
    """
    asked = {"label_noise": recipe.label_noise > 0, "imbalance": recipe.imbalance > 1}
    for name in (name for name, wanted in asked.items() if wanted and dataset.task != "classification"):
        raise RequestError(
            f"{name} is about the classes of examples, and this data set is a {dataset.task}; leave it out"
        )
    images = dataset.train_x.dtype == torch.uint8 and len(dataset.input_shape) == 3
    if recipe.augmentation != "none" and not images:
        raise RequestError(
            f"augmentation = {recipe.augmentation} works on images of 8 bits, and the examples of this data set are "
            f"{str(dataset.train_x.dtype).removeprefix('torch.')} of shape {list(dataset.input_shape)}; "
            "write augmentation: none"
        )
    streamed = isinstance(dataset.train_x, Images)
    if recipe.augmentation == CROPPED_WHILE_READ and not streamed:
        raise RequestError(
            f"augmentation = {CROPPED_WHILE_READ} is for images that are read from files, as ImageNet's; "
            "write augmentation: crop_flip"
        )
    if recipe.augmentation in _OF_BYTES and recipe.data_noise > 0:
        raise RequestError(
            f"augmentation = {recipe.augmentation} changes images of 8 bits, and data_noise = {recipe.data_noise:g} "
            "makes them floats; crops, flips and cutout go with it"
        )
    if recipe.augmentation != "none" and dataset.task == "segmentation":
        raise RequestError("augmentation moves images and not the masks of a segmentation; write augmentation: none")


def choose(dataset: Dataset, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the numbers of the examples to train on and of those held out, each ascending, int64.

    Raises:
        RequestError: There are not that many, or a class is missing from those to train on.
    """
    n, held_out, seed = len(dataset.train_y), recipe.val_size, recipe.split_seed
    if held_out >= n:
        raise RequestError(f"val_size = {held_out} leaves nothing of {n} training examples; it must be under {n}")
    key = stream_key("validation", seed) if seed else stream_key("validation")
    order = permutation(key, n) if held_out else torch.arange(n)
    left, val = order[: n - held_out].sort().values, order[n - held_out :].sort().values
    if recipe.imbalance > 1:
        left = _long_tailed(left, dataset, recipe)
    if recipe.train_size is not None:
        if recipe.train_size > len(left):
            raise RequestError(
                f"train_size = {recipe.train_size} is more than the {len(left)} of {n} training examples that "
                f"val_size = {held_out} and imbalance = {recipe.imbalance:g} leave; it must be at most {len(left)}"
            )
        left = _shuffled(left, n, stream_key("subset", seed))[: recipe.train_size].sort().values
    _check_left(dataset, left, recipe)
    return left, val


def missing_classes(dataset: Dataset, numbers: Tensor) -> list[int]:
    """Return the classes of the training set that are not among some of its examples; none but in a classification."""
    if dataset.task != "classification":
        return []
    counts = torch.bincount(dataset.train_y[numbers], minlength=dataset.classes)
    return ((counts == 0) & (torch.bincount(dataset.train_y, minlength=dataset.classes) > 0)).nonzero()[:, 0].tolist()


def _check_left(dataset: Dataset, left: Tensor, recipe: Recipe) -> None:
    missing = missing_classes(dataset, left)
    if missing:
        mends = [] if recipe.train_size is None else [f"raise train_size = {recipe.train_size}"]
        mends += [f"lower imbalance = {recipe.imbalance:g}"] if recipe.imbalance > 1 else []
        mends += [f"lower val_size = {recipe.val_size}"] if recipe.val_size else []
        raise RequestError(
            f"none of the {len(left)} training examples that are left is of class {missing[0]}, and of "
            f"{dataset.classes} classes {len(missing)} are missing; {', '.join(mends)}, or take another split_seed"
        )
    if recipe.batch_size > len(left):
        raise RequestError(
            f"batch_size = {recipe.batch_size} is more than the {len(left)} training examples; "
            f"it must be at most {len(left)}, which takes all of them in every step"
        )


def _shuffled(numbers: Tensor, n: int, key: int) -> Tensor:
    """Return some of the numbers under `n` in a random order, in which any others would not change their order."""
    there = torch.zeros(n, dtype=torch.bool)
    there[numbers] = True
    order = permutation(key, n)
    return order[there[order]]


def _long_tailed(left: Tensor, dataset: Dataset, recipe: Recipe) -> Tensor:
    """Return the examples of classes that shrink exponentially: class c of C keeps n_max / imbalance^(c / (C - 1)).

    n_max is the size of the largest class; a class that has fewer keeps what it has (Cui et al. 2019, section 5.1).
    """
    order = _shuffled(left, len(dataset.train_y), stream_key("imbalance", recipe.split_seed))
    y = dataset.train_y[order]
    largest = int(torch.bincount(y).max())
    kept = []
    for c in range(dataset.classes):
        share = recipe.imbalance ** (-c / max(1, dataset.classes - 1))
        kept.append(order[y == c][: int(largest * share + 1e-6)])
    return torch.cat(kept).sort().values


def noisy_labels(y: Tensor, classes: int, recipe: Recipe) -> Tensor:
    """Return the labels `[n]` that a model trains on.

    Every example draws one uniform number and one class, whatever the level; those whose number is below
    `label_noise` take the class, so a lower level's flips are among a higher one's. The class is uniform over all
    classes, the true one included (`uniform`, Bisla et al. 2022: (C - 1) / C of those drawn are wrong), or over the
    others (`symmetric`: all of them are).
    """
    draw = uniform(stream_key("label noise", recipe.noise_seed), y.shape)
    among = classes if recipe.label_noise_kind == "uniform" else classes - 1
    place = (uniform(stream_key("label class", recipe.noise_seed), y.shape) * among).long()
    replacement = place if recipe.label_noise_kind == "uniform" else (y + 1 + place) % classes
    return torch.where(draw < recipe.label_noise, replacement, y)


def data_noise(keys: Tensor, numbers: Tensor, shape: tuple[int, ...], n: int, dtype: torch.dtype) -> Tensor:
    """Return the standard normal noise of some examples, `[*numbers.shape, *shape]`; drawn in float64.

    It is a function of key, example and place in the example alone (Box and Muller 1958): in the flattened set of
    N = n x prod(shape) numbers, h = ceil(N / 2), number e takes the cosine of counter e, and number h + e its sine.

    Args:
        keys: The streams, int64, which broadcast against `numbers`.
        numbers: Which examples of the whole set, int64.
        shape: Of one example.
        n: Examples in the whole set.
        dtype: The type of the result.
    """
    size = math.prod(shape)
    rows, row_keys = numbers.reshape(-1), keys.broadcast_to(numbers.shape).reshape(-1)
    drawn = torch.empty(len(rows), size, dtype=dtype, device=rows.device)
    step = max(1, (_PIECE if rows.device.type == "cpu" else _DEVICE_PIECE) // size)
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        index = rows[piece, None] * size + torch.arange(size, device=rows.device)
        drawn[piece] = _normal_at(row_keys[piece, None], index, n * size)
    return drawn.reshape(*numbers.shape, *shape)


def _normal_at(keys: Tensor, index: Tensor, count: int) -> Tensor:
    half = (count + 1) // 2
    late = (index >= half).long()
    drawn = bits_at(keys, index - half * late)
    radius = _minus_two_log(drawn >> 32 & 0xFFFFFFFF).sqrt_()
    # sin(a) = cos(a - a quarter), and cos(a) = sin(a quarter - |a|), in turns of 2^32
    turn = drawn.sub_(late << 30).bitwise_and_(0xFFFFFFFF)
    return _sine((turn - 2**31).abs_().sub_(2**30)).mul_(radius)


def _minus_two_log(k: Tensor) -> Tensor:
    """Return -2 ln u of u = (k + 1/2) / 2^32, k int64 in 0 .. 2^32 - 1.

    u = 2^e m, sqrt(1/2) <= m < sqrt(2), and ln m = 2 (s + s^3 / 3 + ...), s = (m - 1) / (m + 1), |s| < 0.172.
    """
    m, e = torch.frexp(k.double().add_(0.5).mul_(2.0**-32))
    small = m < math.sqrt(0.5)
    m, e = torch.where(small, 2 * m, m), e - small.int()
    s = (m - 1).div_(m.add_(1))
    square, series = s * s, torch.full_like(s, 1 / 19)
    for power in range(17, 0, -2):
        series.mul_(square).add_(1 / power)
    return series.mul_(s).mul_(-4.0).sub_(e.double().mul_(2 * math.log(2)))


def _sine(turn: Tensor) -> Tensor:
    """Return sin(2 pi turn / 2^32) of integers in -2^30 .. 2^30, by its series up to the 21st power."""
    x = turn.double().mul_(2 * math.pi * 2.0**-32)
    square, series = x * x, torch.full_like(x, 1 / math.factorial(21))
    for power in range(19, 0, -2):
        series.mul_(square).add_((-1) ** (power // 2) / math.factorial(power))
    return series.mul_(x)
