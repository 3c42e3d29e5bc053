"""torchvision's ResNet-18, for images of 64 x 64 and 224 x 224: a 7 x 7 stem and a pool quarter the image first.

Convolutions are initialised from N(0, 2 / fan-out). Source: He et al. 2016; Bisla et al. 2022 (LPF-SGD) train it on
TinyImageNet and ImageNet.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import resnet18

from flatmin.trainables.networks.parts import image_channels, kaiming_fan_out


def resnet18_imagenet(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build torchvision's ResNet-18.

    Args:
        input_shape: `(channels, height, width)` of one example.
        classes: Number of outputs.
    """
    channels = image_channels("resnet18_imagenet", input_shape)
    network: nn.Module = resnet18(num_classes=classes)
    if channels != 3:
        network.conv1 = kaiming_fan_out(nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False))
    return network
