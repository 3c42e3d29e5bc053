"""Shake-Shake for images of 32 x 32: 26 2x96d is depth 26, width 96.

Every block adds to its shortcut a random mixture of two paths a and b,

    alpha a + (1 - alpha) b forward,    beta g and (1 - beta) g backward to a and b,

with alpha and beta ~ U(0, 1) drawn for every image, block and step in training mode, and 1/2 in eval mode (the
published "Shake-Shake-Image"). A path is ReLU, 3 x 3 convolution, BatchNorm, ReLU, 3 x 3 convolution, BatchNorm.
Three stages of (depth - 2) / 6 blocks with 1, 2, 4 x width channels after a 3 x 3 stem of 16 channels; where channels
change, the shortcut is ReLU, then two 1 x 1 convolutions of half the channels, the second of the image shifted by one
pixel, then BatchNorm. Convolutions have no biases and start from N(0, 2 / fan-out), the biases of the classes from
zero. Source: Gastaldi 2017; the structure of hysts' code, which Bisla et al. 2022 (LPF-SGD) train.

A second derivative through a block in training mode is that of the network whose blocks add the constant (alpha -
beta)(a - b) to the mixture with beta: symmetric, but not the Hessian of a loss that anybody evaluates, for a gradient
that shakes is the gradient of no function. Measures are taken in eval mode, where nothing shakes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import conv1x1, conv3x3

from flatmin.errors import RequestError
from flatmin.trainables.networks.arguments import Depth, Width
from flatmin.trainables.networks.parts import blocks_per_stage, image_channels, kaiming_fan_out


def shake_shake(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    depth: Depth = 26,
    width: Width = 96,
) -> nn.Module:
    """Build a Shake-Shake network; each path of the first stage has `width` channels.

    Args:
        input_shape: `(channels, height, width)` of one example.
        classes: Number of outputs.
        depth: Layers: 2 + 6 x blocks per stage.
        width: Channels of the first stage, an even number.
    """
    blocks = blocks_per_stage("shake_shake", depth, outside=2, per_block=6)
    if width % 2:
        raise RequestError(f"'shake_shake': width = {width} must be even: shortcuts are of two halves")
    layers: list[nn.Module] = [conv3x3(image_channels("shake_shake", input_shape), 16), nn.BatchNorm2d(16)]
    inputs = 16
    for stage in range(3):
        outputs = width * 2**stage
        for block in range(blocks):
            layers.append(_Block(inputs, outputs, 2 if stage > 0 and block == 0 else 1))
            inputs = outputs
    classifier = nn.Linear(inputs, classes)
    nn.init.zeros_(classifier.bias)
    return kaiming_fan_out(nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier))


def shake(a: Tensor, b: Tensor) -> Tensor:
    """Return the mixture of two paths' outputs `[b, ...]`: with alpha forward, and the gradient of that with beta.

    Both are drawn for every example by `torch.rand_like`: from the model's stream in a stack, else from torch's
    generator.
    """
    each = a.detach().flatten(1)[:, :1].reshape(-1, *[1] * (a.dim() - 1))
    alpha, beta = torch.rand_like(each), torch.rand_like(each)
    difference = a - b
    return b + beta * difference + (alpha - beta) * difference.detach()


class _Block(nn.Module):
    """Two paths that shake, and the shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = (_path(inputs, outputs, stride) for _ in range(2))
        self.shortcut = nn.Identity() if inputs == outputs else _Shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        around: Tensor = self.shortcut(x)
        return around + (shake(a, b) if self.training else 0.5 * (a + b))


def _path(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(),
        conv3x3(inputs, outputs, stride),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        conv3x3(outputs, outputs),
        nn.BatchNorm2d(outputs),
    )


class _Shortcut(nn.Module):
    """Half of the channels from the image, half from the image shifted by one pixel up and to the left."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.straight, self.shifted = (conv1x1(inputs, outputs // 2) for _ in range(2))
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(x)
        shifted = functional.pad(x[:, :, 1:, 1:], (0, 1, 0, 1))
        every = slice(None, None, self.stride)
        halves = self.straight(x[:, :, every, every]), self.shifted(shifted[:, :, every, every])
        joined: Tensor = self.norm(torch.cat(halves, dim=1))
        return joined
