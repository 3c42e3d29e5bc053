"""torchvision's ResNet-18, for images of 64 x 64 and 224 x 224: a 7 x 7 stem and a pool quarter the image first.

Convolutions are initialised from N(0, 2 / fan-out). With 64 channels in the first stage it has the layers, their names
and the initial weights of torchvision's. Source: He et al. 2016; Bisla et al. 2022 (LPF-SGD) train it on TinyImageNet
and ImageNet.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn
from torchvision.models.resnet import BasicBlock

from flatmin.trainables.networks.arguments import LaterWidth
from flatmin.trainables.networks.parts import image_channels, kaiming_fan_out
from flatmin.trainables.networks.residual import residual_stages


def resnet18_imagenet(input_shape: tuple[int, ...], classes: int, *, width: LaterWidth = 64) -> nn.Module:
    """Build torchvision's ResNet-18.

    Args:
        input_shape: `(channels, height, width)` of one example.
        classes: Number of outputs.
        width: Channels of the first stage; 64 as published.
    """
    channels = image_channels("resnet18_imagenet", input_shape)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
    layers["bn1"], layers["relu"] = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    layers["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
    for number, blocks in enumerate(residual_stages(BasicBlock, (2, 2, 2, 2), width), start=1):
        layers[f"layer{number}"] = nn.Sequential(*blocks)
    layers["avgpool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["fc"] = nn.Linear(8 * width, classes)
    return kaiming_fan_out(nn.Sequential(layers))
