"""Residual networks for images of 32 x 32, of torchvision's blocks.

A 3 x 3 stem without a pool; stages of blocks with width x {1, 2, 4, ...} channels, each but the first at half the
size of the one before; convolutions without biases, 1 x 1 convolutions as shortcuts where shapes change. PyTorch's
default initialisation. Source: He et al. 2016; the published studies of these sizes use Liu Kuang's variant, which
this is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3

from flatmin.trainables.networks.parts import image_channels


def residual_network(
    network: str,
    input_shape: tuple[int, ...],
    classes: int,
    block: type[BasicBlock] | type[Bottleneck],
    blocks: Sequence[int],
    width: int,
) -> nn.Module:
    """Build a residual network.

    Args:
        network: Its name, for errors.
        input_shape: `(channels, height, width)` of one example.
        classes: Number of outputs.
        block: What it is built of.
        blocks: How many there are in each stage.
        width: Channels of the stem and of the first stage's 3 x 3 convolutions.
    """
    stem = [conv3x3(image_channels(network, input_shape), width), nn.BatchNorm2d(width), nn.ReLU()]
    stages = residual_stages(block, blocks, width)
    outputs = width * 2 ** (len(blocks) - 1) * block.expansion
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(outputs, classes)]
    return nn.Sequential(*stem, *(layer for stage in stages for layer in stage), *tail)


def residual_stages(
    block: type[BasicBlock] | type[Bottleneck], blocks: Sequence[int], width: int
) -> list[list[nn.Module]]:
    """Return the blocks of every stage.

    Args:
        block: What they are built of.
        blocks: How many there are in each stage.
        width: Channels of what enters, and of the first stage's 3 x 3 convolutions.
    """
    stages: list[list[nn.Module]] = []
    inputs = width
    for stage, count in enumerate(blocks):
        channels = width * 2**stage
        outputs = channels * block.expansion
        stages.append([])
        for number in range(count):
            stride = 2 if stage > 0 and number == 0 else 1
            shortcut = None
            if stride != 1 or inputs != outputs:
                shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
            stages[-1].append(block(inputs, channels, stride, shortcut))
            inputs = outputs
    return stages
