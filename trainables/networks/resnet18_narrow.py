"""The ResNet-18 with few channels of the 2,916-model study, BatchNorm and skips switchable.

Source: Bisla et al. 2022 (LPF-SGD), section 3.2: a 3 x 3 stem and four stages of two basic blocks with
8 x width x {1, 2, 4, 8} channels; every convolution has a bias; without `skip` the addition is gone.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from flatmin.settings import Setting
from flatmin.trainables.networks.arguments import Width
from flatmin.trainables.networks.parts import image_channels


class _Block(nn.Module):
    """Two 3 x 3 convolutions, and the shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, batch_norm: bool, skip: bool) -> None:
        super().__init__()
        self.first = _convolution(inputs, outputs, 3, stride, batch_norm)
        self.second = _convolution(outputs, outputs, 3, 1, batch_norm)
        self.shortcut: nn.Module | None = None
        if skip:
            same = stride == 1 and inputs == outputs
            self.shortcut = nn.Identity() if same else _convolution(inputs, outputs, 1, stride, batch_norm)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(self.relu(self.first(x)))
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        rectified: Tensor = self.relu(out)
        return rectified


def _convolution(inputs: int, outputs: int, size: int, stride: int, batch_norm: bool) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs)) if batch_norm else convolution


def resnet18_narrow(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: Width = 4,
    batch_norm: Annotated[bool, Setting(about="Whether convolutions are followed by BatchNorm.")] = True,
    skip: Annotated[bool, Setting(about="Whether blocks have skip connections.")] = True,
) -> nn.Module:
    """Build the narrow ResNet-18; the first stage has 8 x `width` channels.

    Args:
        input_shape: `(channels, height, width)` of one example.
        classes: Number of outputs.
        width: An eighth of the first stage's channels.
        batch_norm: Whether convolutions are followed by BatchNorm.
        skip: Whether blocks have skip connections.
    """
    channels = 8 * width
    images = image_channels("resnet18_narrow", input_shape)
    layers: list[nn.Module] = [_convolution(images, channels, 3, 1, batch_norm), nn.ReLU()]
    inputs = channels
    for stage in range(4):
        outputs = channels * 2**stage
        for block in range(2):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(_Block(inputs, outputs, stride, batch_norm=batch_norm, skip=skip))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))
