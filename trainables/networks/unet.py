"""U-Net for segmentation: an output for every class and pixel.

Five blocks of two 3 x 3 convolutions with BatchNorm and ReLU halve the image by a maximum pool, with 1, 2, 4, 8, 16 x
width channels; five blocks of two such convolutions double it again by a 2 x 2 transposed convolution, with 8, 4, 2,
1 x width channels and the classes. Each of the last four also takes the output of the halving block of its size.
PyTorch's default initialisation. Source: Ronneberger, Fischer and Brox 2015, in the form of the CS-439 project that
trains it on HC18.

Two things of that form are not in the paper. The skips carry the maps after the pool, so none has the full
resolution. The last block's convolutions have no more channels than there are classes, and the outputs come from a
transposed convolution after their ReLU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatmin.trainables.networks.arguments import Width
from flatmin.trainables.networks.parts import image_channels

_HALVINGS = 5


def unet(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: Width = 64,
) -> nn.Module:
    """Build a U-Net, from `[b, channels, height, width]` to `[b, classes, height, width]`.

    Args:
        input_shape: `(channels, height, width)` of one example, both multiples of 32.
        classes: Number of classes of a pixel.
        width: Channels of the first block; 64 as published.
    """
    channels = image_channels("unet", input_shape, least=2**_HALVINGS, multiple=2**_HALVINGS)
    widths = [width * 2**number for number in range(_HALVINGS)]
    down = [_halving(*pair) for pair in zip([channels, *widths[:-1]], widths, strict=True)]
    outputs = [*widths[-2::-1], classes]
    inputs = [widths[-1], *(2 * size for size in outputs[:-1])]
    return _UNet(down, [_doubling(*pair) for pair in zip(inputs, outputs, strict=True)])


class _UNet(nn.Module):
    def __init__(self, down: list[nn.Module], up: list[nn.Module]) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)

    def forward(self, x: Tensor) -> Tensor:
        halved = []
        for block in self.down:
            x = block(x)
            halved.append(x)
        x = self.up[0](halved.pop())
        for block in self.up[1:]:
            x = block(torch.cat([x, halved.pop()], dim=1))
        return x


def _convolutions(inputs: int, outputs: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return layers


def _halving(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(*_convolutions(inputs, outputs), nn.MaxPool2d(2))


def _doubling(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(*_convolutions(inputs, outputs), nn.ConvTranspose2d(outputs, outputs, 2, stride=2))
