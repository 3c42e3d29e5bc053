"""ResNet-18 with k, 2k, 4k, 8k channels, the network of the double-descent studies; k = 64 is `resnet18`.

Source: Bisla et al. 2022 (LPF-SGD, section 3.2) after Nakkiran et al. 2020, whose own blocks have BatchNorm and ReLU
in front of the convolutions. See `flatmin.trainables.networks.residual`.
"""

from __future__ import annotations

from torch import nn
from torchvision.models.resnet import BasicBlock

from flatmin.trainables.networks.arguments import Width
from flatmin.trainables.networks.residual import residual_network


def resnet18_wide(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: Width = 64,
) -> nn.Module:
    """Build ResNet-18 for small images, with `width` channels in its first stage.

    Args:
        input_shape: `(channels, height, width)` of one example.
        classes: Number of outputs.
        width: Channels of the first stage.
    """
    return residual_network("resnet18_wide", input_shape, classes, BasicBlock, (2, 2, 2, 2), width)
