"""ResNet-18 for images of 32 x 32: stages of 2, 2, 2, 2 basic blocks with 64, 128, 256, 512 channels.

Source: He et al. 2016, in the variant of Liu Kuang that Bisla et al. 2022 (LPF-SGD) and others train on CIFAR; see
`flatmin.trainables.networks.residual`.
"""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock

from flatmin.trainables.networks.arguments import LaterWidth
from flatmin.trainables.networks.residual import residual_network


def resnet18(input_shape: tuple[int, ...], classes: int, *, width: LaterWidth = 64) -> nn.Module:
    """Build ResNet-18 for small images.

    Args:
        input_shape: `(channels, height, width)` of one example.
        classes: Number of outputs.
        width: Channels of the first stage; 64 as published.
    """
    return residual_network("resnet18", input_shape, classes, BasicBlock, (2, 2, 2, 2), width)
