"""ResNet-50 for images of 32 x 32: stages of 3, 4, 6, 3 bottleneck blocks with 256, 512, 1024, 2048 outputs.

Source: He et al. 2016, in the variant of Liu Kuang (the 3 x 3 convolution strides, not the 1 x 1) that Bisla et al.
2022 (LPF-SGD) train on CIFAR; see `flatmin.trainables.networks.residual`.
"""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import Bottleneck

from flatmin.trainables.networks.arguments import Width
from flatmin.trainables.networks.residual import residual_network


def resnet50(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: Width = 64,
) -> nn.Module:
    """Build ResNet-50 for small images.

    Args:
        input_shape: `(channels, height, width)` of one example.
        classes: Number of outputs.
        width: Channels of the first stage's 3 x 3 convolutions; 64 as published.
    """
    return residual_network("resnet50", input_shape, classes, Bottleneck, (3, 4, 6, 3), width)
