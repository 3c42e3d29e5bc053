"""The images of stand-ins: scikit-learn's handwritten digits, enlarged and coloured, and drawn ultrasounds of heads.

Everything is a function of its arguments, the same on every machine.
"""

from __future__ import annotations

from colorsys import hsv_to_rgb

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from flatmin.trainables.datasets.digits import bundled_digits

Bytes = npt.NDArray[np.uint8]

_GROUND = 100


def digit_images(classes: int, each: int, size: int, *, first: int = 0) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Return grey images uint8 `[n, size, size]` of digits and their classes int64 `[n]`, class after class in turn.

    Class c shows the digit c % 10, each class different images of it.

    Args:
        classes: How many there are.
        each: Images of a class.
        size: Pixels along each side.
        first: Which image of each digit is the first to be used; a set apart begins where another has ended.
    """
    images, digits = bundled_digits()
    of_digit = [np.flatnonzero(digits == digit) for digit in range(10)]
    y = np.arange(classes * each) % classes
    places = [first + c // 10 * each + number // classes for number, c in enumerate(y)]
    grey = (images * (255 / 16)).astype(np.uint8)
    chosen = [grey[of_digit[c % 10][place]] for c, place in zip(y, places, strict=True)]
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size))) for image in chosen]), y


def coloured_digits(classes: int, each: int, size: int, *, first: int = 0) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Return `digit_images` in colours, uint8 `[n, size, size, 3]`: every ten classes have one, on a grey ground.

    The ground is near the mean of photographs, with whose constants some of these are normalised.
    """
    grey, y = digit_images(classes, each, size, first=first)
    hues = [10 * ten / max(classes, 10) for ten in range(-(-classes // 10))]
    colours = np.array([hsv_to_rgb(hue, 0.8, 1.0) for hue in hues])[y // 10]
    ink = grey[..., None] / 255
    return (255 * ink * colours[:, None, None] + _GROUND * (1 - ink)).astype(np.uint8), y


def head_ultrasound(seed: int) -> tuple[Image.Image, Image.Image]:
    """Return a grey image of 400 x 270 pixels, coarse noise with a brighter ellipse, and the ellipse's contour."""
    random = np.random.RandomState(seed)
    x, y, width, height = (int(random.randint(*bounds)) for bounds in ((130, 210), (100, 140), (70, 110), (50, 80)))
    box = (x - width, y - height, x + width, y + height)
    noise = Image.fromarray(random.randint(0, 90, (68, 100)).astype(np.uint8)).resize((400, 270))
    head = Image.new("L", noise.size)
    ImageDraw.Draw(head).ellipse(box, fill=70, outline=150, width=6)
    contour = Image.new("L", noise.size)
    ImageDraw.Draw(contour).ellipse(box, outline=255)
    return Image.fromarray(np.asarray(noise) + np.asarray(head)), contour
