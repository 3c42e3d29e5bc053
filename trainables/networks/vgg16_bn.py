"""VGG-16 with BatchNorm for images of 32 x 32: 13 convolutions of 3 x 3, a pool after each stage, and a small head.

Stages of 2, 2, 3, 3, 3 convolutions (with biases) with 64, 128, 256, 512, 512 channels; then a hidden layer of 512
units, with BatchNorm as well, in place of the 4096 + 4096 of the network for ImageNet. PyTorch's default
initialisation. A pool of an odd size keeps the last row and column; an image larger than 32 x 32 is averaged over
before the hidden layer. Source: Simonyan and Zisserman 2015; the form of the OptML project that trains it with SAM.
"""

from __future__ import annotations

from torch import nn

from flatmin.trainables.networks.arguments import Width
from flatmin.trainables.networks.parts import image_channels


def vgg16_bn(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: Width = 64,
) -> nn.Module:
    """Build VGG-16 with BatchNorm for small images.

    Args:
        input_shape: `(channels, height, width)` of one example.
        classes: Number of outputs.
        width: Channels of the first stage; 64 as published.
    """
    inputs = image_channels("vgg16_bn", input_shape)
    layers: list[nn.Module] = []
    for stage, count in enumerate((2, 2, 3, 3, 3)):
        channels = width * min(2**stage, 8)
        for _ in range(count):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
            inputs = channels
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    head = [nn.Linear(inputs, inputs), nn.BatchNorm1d(inputs), nn.ReLU(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)
