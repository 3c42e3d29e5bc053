"""Random changes of images while training: each image has its own, and they are made in batches on the device.

| `augmentation` | what is done, in this order |
|---|---|
| `flip` | mirrored left to right with probability 1/2 |
| `crop_flip` | a window at a random place of the image with 4 zero pixels around it, then `flip` |
| `crop_flip_cutout` | `crop_flip`, then cutout |
| `autoaugment_cutout` | `crop_flip`, then one of AutoAugment's 25 policies for CIFAR-10, then cutout |

Zeros are put around pixels, so they are black; cutout sets normalised pixels to zero, the mean colour. The draws are a
function of a stream and of the example's number alone, whatever else is in the batch.
Sources: Krizhevsky et al. 2012 (flip), He et al. 2016 (crop), DeVries and Taylor 2017 (cutout), Cubuk et al. 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.v2 import functional

from flatmin.stack.streams import bits_at

PADDING = 4
"""Black pixels on each side of an image that is cropped."""

CUTOUT_PROBABILITY = 0.5

_TOP, _LEFT, _FLIP, _POLICY, _CHANCE, _SIGN, _CUT, _CUT_TOP, _CUT_LEFT = 0, 1, 2, 3, 4, 6, 8, 9, 10
_DRAWS = 11
"""Uniform numbers of an example in an epoch, and what each is for; chances and signs have two."""


def draws(keys: Tensor, numbers: Tensor) -> Tensor:
    """Return what examples draw: uniform numbers, float64 `[G, b, 11]`.

    Args:
        keys: The stream of each row, int64 `[G]`.
        numbers: Which example of the data set each image is, int64 `[G, b]`.
    """
    index = numbers.unsqueeze(-1) * _DRAWS + torch.arange(_DRAWS, device=numbers.device)
    return (bits_at(keys[:, None, None], index) >> 11 & (1 << 53) - 1).double().mul_(2.0**-53)


def transform_pixels(images: Tensor, drawn: Tensor, augmentation: str) -> Tensor:
    """Return images flipped, cropped and so on, before normalisation.

    Args:
        images: `[G, b, C, H, W]`, uint8, or floats in the range of [0, 1] where data noise was added.
        drawn: What each image draws, `[G, b, 11]`.
        augmentation: One of the table above, or `none`. AutoAugment's operations are defined for uint8 alone.
    """
    if augmentation == "none":
        return images
    flat, each = images.flatten(0, 1), drawn.flatten(0, 1)
    changed = _cropped(flat, each, 0 if augmentation == "flip" else PADDING)
    if augmentation == "autoaugment_cutout":
        changed = _autoaugmented(changed, each)
    return changed.reshape(images.shape)


def cutout(x: Tensor, drawn: Tensor, augmentation: str, size: int = 16) -> Tensor:
    """Return normalised images, about half of them with a square set to zero; written in place.

    The square's first row and column are uniform over -(size // 2) .. H - size // 2 - 1, so that its centre is uniform
    over the image, and what of it is outside is cut off.

    Args:
        x: `[G, b, C, H, W]`, normalised.
        drawn: What each image draws, `[G, b, 11]`.
        augmentation: One of the table above; where it has no cutout, images stay as they are.
        size: The side of the square, in pixels.
    """
    if not augmentation.endswith("_cutout"):
        return x
    rows = _covered(drawn[..., _CUT_TOP], x.shape[-2], size) & (drawn[..., _CUT] < CUTOUT_PROBABILITY).unsqueeze(-1)
    columns = _covered(drawn[..., _CUT_LEFT], x.shape[-1], size)
    # a product of floats: filling by a mask of bools takes eight times as long on a CPU
    keep = 1 - rows.to(x.dtype).unsqueeze(-1) * columns.to(x.dtype).unsqueeze(-2)
    return x.mul_(keep.unsqueeze(2))


def _covered(draw: Tensor, length: int, size: int) -> Tensor:
    """Return which of the places along one side a window covers, bool `[..., length]`."""
    first = _below(draw, length).sub_(size // 2).unsqueeze(-1)
    places = torch.arange(length, device=draw.device)
    return (places >= first) & (places < first + size)


def _below(draw: Tensor, count: int) -> Tensor:
    """Return integers in 0 .. count - 1 from uniform numbers."""
    return (draw * count).long()


def _cropped(images: Tensor, drawn: Tensor, padding: int) -> Tensor:
    """Return a window of each image `[n, C, H, W]` with zeros around it, mirrored or not.

    Each window is one copy of consecutive memory: `H` rows of the padded image, from its first pixel on.
    """
    n, channels, height, width = images.shape
    flipped = drawn[:, _FLIP] < 0.5
    top, left = (_below(drawn[:, place], 2 * padding + 1) for place in (_TOP, _LEFT))
    left = torch.where(flipped, 2 * padding - left, left)  # a mirrored window is a window of the mirrored image
    # one more row below, for the rest of the last row of the last window
    padded = pad(torch.cat([images, images.flip(-1)]), (padding, padding, padding, padding + 1))
    row, plane = width + 2 * padding, padded.shape[-2] * padded.shape[-1]
    image = torch.arange(n, device=images.device) + n * flipped
    start = (image * channels * plane + top * row + left)[:, None] + torch.arange(
        channels, device=images.device
    ) * plane
    windows = padded.reshape(-1).unfold(0, height * row, 1).index_select(0, start.flatten())
    return windows.view(n, channels, height, row)[..., :width]


def _autoaugmented(images: Tensor, drawn: Tensor) -> Tensor:
    """Return images `[n, C, H, W]` after both operations of a random policy each; those that are alike, at once."""
    images = images.clone()
    policies = _policies(images.shape[-2], images.shape[-1])
    policy = _below(drawn[:, _POLICY], len(policies)).tolist()
    negative, chances = drawn[:, _SIGN : _SIGN + 2] < 0.5, drawn[:, _CHANCE : _CHANCE + 2].tolist()
    for place in range(2):
        alike: dict[tuple[str, float], list[int]] = {}
        for image, (own, minus) in enumerate(zip(policy, negative[:, place].tolist(), strict=True)):
            name, chance, magnitudes = policies[own][place]
            if chances[image][place] < chance:
                alike.setdefault((name, magnitudes[minus]), []).append(image)
        for (name, magnitude), numbers in alike.items():
            index = torch.tensor(numbers, device=images.device)
            images[index] = OPERATIONS[name](images[index], magnitude)
    return images


Operation = tuple[str, float, tuple[float, float]]
"""An operation's name, the chance that it is carried out, and its magnitude as it is and with the other sign."""


@cache
def _policies(height: int, width: int) -> list[tuple[Operation, Operation]]:
    """Return AutoAugment's policies for CIFAR-10 with magnitudes for images of a size.

    A magnitude is a level of 0 to 9 along the range of its operation (Cubuk et al. 2019, table 6).
    """
    ranges = {
        **dict.fromkeys(("ShearX", "ShearY"), 0.3),
        "TranslateX": 150 / 331 * width,
        "TranslateY": 150 / 331 * height,
        "Rotate": 30.0,
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9),
    }

    def operation(name: str, chance: float, level: int | None) -> Operation:
        if name in ranges and level is not None:
            magnitude = ranges[name] * level / 9
            return name, chance, (magnitude, -magnitude)
        other = {"Posterize": 8.0 - round((level or 0) * 4 / 9), "Solarize": 255 * (1 - (level or 0) / 9)}
        return name, chance, (other.get(name, 0.0), other.get(name, 0.0))

    published = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    return [(operation(*first), operation(*second)) for first, second in published]


def _affine(images: Tensor, *, translate: tuple[int, int] = (0, 0), shear: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    degrees = [math.degrees(math.atan(slope)) for slope in shear]
    centre = [0.0, 0.0] if any(shear) else None  # sheared about the corner, as in the AutoAugment paper's code
    moved: Tensor = functional.affine(
        images, angle=0.0, translate=list(translate), scale=1.0, shear=degrees, center=centre
    )
    return moved


OPERATIONS: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "ShearX": lambda images, slope: _affine(images, shear=(slope, 0.0)),
    "ShearY": lambda images, slope: _affine(images, shear=(0.0, slope)),
    "TranslateX": lambda images, pixels: _affine(images, translate=(int(pixels), 0)),
    "TranslateY": lambda images, pixels: _affine(images, translate=(0, int(pixels))),
    "Rotate": lambda images, degrees: functional.rotate(images, degrees),
    "Brightness": lambda images, change: functional.adjust_brightness(images, 1 + change),
    "Color": lambda images, change: functional.adjust_saturation(images, 1 + change),
    "Contrast": lambda images, change: functional.adjust_contrast(images, 1 + change),
    "Sharpness": lambda images, change: functional.adjust_sharpness(images, 1 + change),
    "Posterize": lambda images, bits: functional.posterize(images, int(bits)),
    "Solarize": lambda images, threshold: functional.solarize(images, threshold),
    "AutoContrast": lambda images, _: functional.autocontrast(images),
    "Equalize": lambda images, _: functional.equalize(images),
    "Invert": lambda images, _: functional.invert(images),
}
"""AutoAugment's operations on images uint8 `[n, C, H, W]`, all of one magnitude; pixels from outside are black."""
