"""The small convolutional network of PyTorch's MNIST example, with dropout; for images of 28 x 28.

Two 3 x 3 convolutions of 32 and 64 channels, a pool of 2, dropout, a hidden layer of 128 units, dropout, the classes.
PyTorch's default initialisation. Source: Bisla et al. 2022 (LPF-SGD), who call it LeNet; that of 1998 is `lenet5`.
"""

from __future__ import annotations

from torch import nn

from flatmin.trainables.networks.arguments import Dropout
from flatmin.trainables.networks.parts import image_channels


def lenet(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    dropout: Dropout = 0.5,
) -> nn.Module:
    """Build the convolutional network of PyTorch's MNIST example.

    Args:
        input_shape: `(channels, height, width)` of one example, from 6 x 6 on.
        classes: Number of outputs.
        dropout: Dropout probability after the hidden layer; half of it after the pool.
    """
    channels = image_channels("lenet", input_shape, least=6)
    height, width = ((size - 4) // 2 for size in input_shape[1:])
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(dropout / 2),
        nn.Flatten(),
        nn.Linear(64 * height * width, 128),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(128, classes),
    )
