"""LeNet-5 with ReLU units and maximum pools, for images of 28 x 28.

Two 5 x 5 convolutions of 6 and 16 channels, a pool of 2 after each, hidden layers of 120 and 84 units. PyTorch's
default initialisation. Source: LeCun et al. 1998, whose units are tanh, whose pools have weights, and whose images
are padded to 32 x 32; this form is in the published code of Bisla et al. 2022 (LPF-SGD).
"""

from __future__ import annotations

from torch import nn

from flatmin.trainables.networks.parts import image_channels


def lenet5(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build LeNet-5.

    Args:
        input_shape: `(channels, height, width)` of one example, from 16 x 16 on.
        classes: Number of outputs.
    """
    channels = image_channels("lenet5", input_shape, least=16)
    height, width = (((size - 4) // 2 - 4) // 2 for size in input_shape[1:])
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * height * width, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )
