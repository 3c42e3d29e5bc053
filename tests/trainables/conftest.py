"""What tests of networks share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

Smallest = Callable[[str], tuple[tuple[int, ...], dict[str, Any]]]

_SMALLEST: Mapping[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "lenet5": ((1, 16, 16), {}),
    "pyramidnet": ((1, 8, 8), {"depth": 8, "pyramid_alpha": 6}),
    "resnet18": ((1, 8, 8), {"width": 2}),
    "resnet18_imagenet": ((1, 8, 8), {"width": 2}),
    "resnet18_narrow": ((1, 8, 8), {"width": 1}),
    "resnet18_wide": ((1, 8, 8), {"width": 2}),
    "resnet50": ((1, 16, 16), {"width": 2}),
    "resnet101": ((1, 16, 16), {"width": 2}),
    "shake_shake": ((1, 8, 8), {"depth": 8, "width": 4}),
    "unet": ((1, 32, 32), {"width": 2}),
    "vgg16_bn": ((1, 8, 8), {"width": 2}),
    "wideresnet": ((1, 8, 8), {"depth": 10, "width": 1, "dropout": 0.3}),
}


@pytest.fixture(scope="session")
def smallest() -> Smallest:
    """Return a function from a network's name to the shape of small images and settings that make it small.

    A network that is not named here takes 8 x 8 images and its defaults.
    """
    return lambda name: _SMALLEST.get(name, ((1, 8, 8), {}))
