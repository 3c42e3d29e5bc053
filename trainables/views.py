"""The views that are taken of a large image, uint8 `[3, 224, 224]`: its centre, or a random part, mirrored or not.

See `flatmin.trainables.streaming`, which loads this, and torchvision with it, when the first file is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional

from flatmin.stack.streams import bits_at
from flatmin.trainables.streaming import SIZE

_RESIZE = 256
_SCALE, _RATIO, _TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
_DRAWS = 2 * _TRIES + 3


def centre(image: Image.Image) -> Tensor:
    """Return the centre of an image whose shorter side is resized to 256."""
    return _pixels(functional.center_crop(functional.resize(image, _RESIZE), SIZE))


def part(image: Image.Image, key: int, number: int) -> Tensor:
    """Return a random part, by the stream `key` and the image's number in its set."""
    index = number * _DRAWS + torch.arange(_DRAWS)
    draws = ((bits_at(torch.tensor(key), index) >> 11 & (1 << 53) - 1).double() * 2.0**-53).tolist()
    top, left, height, width = random_window(image.height, image.width, draws)
    cut: Image.Image = functional.resized_crop(image, top, left, height, width, [SIZE, SIZE])
    return _pixels(cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[-1] < 0.5 else cut)


def _pixels(image: Image.Image) -> Tensor:
    pixels: Tensor = functional.pil_to_tensor(image)
    return pixels


def random_window(height: int, width: int, draws: Sequence[float]) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random part; the centre where ten tries are too large."""
    logs = [math.log(ratio) for ratio in _RATIO]
    for area, shape in zip(draws[0 : 2 * _TRIES : 2], draws[1 : 2 * _TRIES : 2], strict=True):
        pixels = height * width * (_SCALE[0] + area * (_SCALE[1] - _SCALE[0]))
        ratio = math.exp(logs[0] + shape * (logs[1] - logs[0]))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[-3] * (height - h + 1)), int(draws[-2] * (width - w + 1)), h, w
    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w
