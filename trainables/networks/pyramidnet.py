"""PyramidNet for images of 32 x 32, whose channels grow from 16 by the same share in every block.

A 3 x 3 stem of 16 channels with BatchNorm; three stages of blocks, the i-th of N blocks with round(16 + alpha i / N)
channels, or four times as many outputs from a bottleneck; the second and third stage at half the size of the one
before. A block is BatchNorm, 3 x 3 convolution, BatchNorm, ReLU, 3 x 3 convolution, BatchNorm, or, as a bottleneck,
BatchNorm and 1 x 1, 3 x 3, 1 x 1 convolutions with BatchNorm and ReLU between, and BatchNorm. Shortcuts are the
identity, averaged over 2 x 2 where the size halves, with zeros for channels that are new. No convolution has a bias;
each is initialised from N(0, 2 / fan-out). Depth is 2 + 6 x blocks per stage, or 2 + 9 x. Source: Han, Kim and Kim
2017.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import conv1x1, conv3x3

from flatmin.settings import Setting
from flatmin.trainables.networks.arguments import Depth
from flatmin.trainables.networks.parts import blocks_per_stage, image_channels, kaiming_fan_out

_STEM = 16
_EXPANSION = 4


def pyramidnet(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    depth: Depth = 110,
    pyramid_alpha: Annotated[
        int, Setting(about="What all blocks of a PyramidNet add to the 16 of the stem.", unit="channels", ge=0)
    ] = 270,
    pyramid_bottleneck: Annotated[
        bool, Setting(about="Whether a PyramidNet's blocks are bottlenecks of three convolutions.")
    ] = False,
) -> nn.Module:
    """Build a PyramidNet.

    Args:
        input_shape: `(channels, height, width)` of one example.
        classes: Number of outputs.
        depth: Layers.
        pyramid_alpha: What the blocks add to the stem's channels.
        pyramid_bottleneck: Whether blocks are bottlenecks.
    """
    per_block, factor, path = (9, _EXPANSION, _bottleneck) if pyramid_bottleneck else (6, 1, _basic)
    blocks = blocks_per_stage("pyramidnet", depth, outside=2, per_block=per_block)
    channels = image_channels("pyramidnet", input_shape)
    layers: list[nn.Module] = [conv3x3(channels, _STEM), nn.BatchNorm2d(_STEM)]
    inputs = _STEM
    for number in range(3 * blocks):
        width = round(_STEM + pyramid_alpha * (number + 1) / (3 * blocks))
        stride = 2 if number in (blocks, 2 * blocks) else 1
        layers.append(_Block(path(inputs, width, stride), stride))
        inputs = factor * width
    tail = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return kaiming_fan_out(nn.Sequential(*layers, *tail))


class _Block(nn.Module):
    """A path, and the identity around it."""

    def __init__(self, path: nn.Module, stride: int) -> None:
        super().__init__()
        self.path = path
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.path(x)
        around: Tensor = self.pool(x)
        return out + functional.pad(around, (0, 0, 0, 0, 0, out.shape[1] - around.shape[1]))


def _basic(inputs: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(inputs),
        conv3x3(inputs, width, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        conv3x3(width, width),
        nn.BatchNorm2d(width),
    )


def _bottleneck(inputs: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(inputs),
        conv1x1(inputs, width),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        conv3x3(width, width, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        conv1x1(width, _EXPANSION * width),
        nn.BatchNorm2d(_EXPANSION * width),
    )
