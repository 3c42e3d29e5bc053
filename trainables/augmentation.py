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

import torch
from torch import Tensor
from torch.nn.functional import pad

from flatmin.stack.streams import bits_at

PADDING = 4
"""Black pixels on each side of an image that is cropped."""

CUTOUT_PROBABILITY = 0.5

_TOP, _LEFT, _FLIP, _POLICY, _CUT, _CUT_TOP, _CUT_LEFT = 0, 1, 2, 3, 8, 9, 10
_DRAWS = 11
"""Uniform numbers of an example in an epoch, and what each is for; AutoAugment has five, from `_POLICY` on."""


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
        from flatmin.trainables.autoaugment import autoaugmented  # torchvision, which takes as long to load as torch

        changed = autoaugmented(changed, each[:, _POLICY:_CUT])
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
