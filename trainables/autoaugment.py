"""AutoAugment's 25 policies for CIFAR-10, on images uint8 in batches.

See `flatmin.trainables.augmentation`, which loads this, and torchvision with it, where a study asks for it.
Source: Cubuk et al. 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.v2 import functional


def autoaugmented(images: Tensor, drawn: Tensor) -> Tensor:
    """Return images after both operations of a random policy each; those that are alike, at once.

    Args:
        images: uint8 `[n, C, H, W]`.
        drawn: Uniform numbers `[n, 5]`: which policy, the chances of both operations, their signs.
    """
    images = images.clone()
    policies = _policies(images.shape[-2], images.shape[-1])
    policy = (drawn[:, 0] * len(policies)).long().tolist()
    chances, negative = drawn[:, 1:3].tolist(), drawn[:, 3:5] < 0.5
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
