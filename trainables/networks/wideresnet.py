"""Wide ResNet for images of 32 x 32: WRN-28-10 is depth 28, width 10.

A 3 x 3 stem of 16 channels; three stages of (depth - 4) / 6 blocks with 16, 32, 64 x width channels, the second and
third at half the size of the one before; BatchNorm and ReLU before each convolution, none of which has a bias. Where
the channels change, the 1 x 1 shortcut starts after the block's first ReLU, as the path does. Convolutions are
initialised from N(0, 2 / fan-out), the biases of the classes are zero. Source: Zagoruyko and Komodakis 2016.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import conv1x1, conv3x3

from flatmin.trainables.networks.arguments import Depth, Dropout, Width
from flatmin.trainables.networks.parts import blocks_per_stage, image_channels, kaiming_fan_out


def wideresnet(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    depth: Depth = 28,
    width: Width = 10,
    dropout: Dropout = 0.0,
) -> nn.Module:
    """Build a Wide ResNet; the first stage has 16 x `width` channels.

    Args:
        input_shape: `(channels, height, width)` of one example.
        classes: Number of outputs.
        depth: Layers: 4 + 6 x blocks per stage.
        width: The factor of the channels.
        dropout: Dropout probability between the convolutions of a block.
    """
    blocks = blocks_per_stage("wideresnet", depth, outside=4, per_block=6)
    layers: list[nn.Module] = [conv3x3(image_channels("wideresnet", input_shape), 16)]
    inputs = 16
    for stage in range(3):
        outputs = 16 * width * 2**stage
        for block in range(blocks):
            layers.append(_Block(inputs, outputs, 2 if stage > 0 and block == 0 else 1, dropout))
            inputs = outputs
    classifier = nn.Linear(inputs, classes)
    nn.init.zeros_(classifier.bias)
    tail = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier]
    return kaiming_fan_out(nn.Sequential(*layers, *tail))


class _Block(nn.Module):
    """BatchNorm, ReLU and a 3 x 3 convolution, twice, and the shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.path = nn.Sequential(
            conv3x3(inputs, outputs, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Dropout(dropout),
            conv3x3(outputs, outputs),
        )
        self.shortcut = None if inputs == outputs else conv1x1(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(x)
        around: Tensor = x if self.shortcut is None else self.shortcut(active)
        path: Tensor = self.path(active)
        return around + path
