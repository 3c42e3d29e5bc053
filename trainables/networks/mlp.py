"""A multilayer perceptron with ReLU units, PyTorch's default initialisation."""

from __future__ import annotations

import math
from typing import Annotated

from torch import nn

from flatmin.settings import Setting


def mlp(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: Annotated[int, Setting(about="Size of the network: units, or channels, of a layer.", ge=1)] = 64,
    depth: Annotated[int, Setting(about="Hidden layers.", unit="layers", ge=1)] = 1,
    dropout: Annotated[
        float, Setting(about="Probability of dropping a hidden unit.", unit="probability", ge=0, lt=1)
    ] = 0.0,
) -> nn.Module:
    """Build an MLP of `depth` hidden layers of `width` units each.

    Args:
        input_shape: Shape of one example; flattened.
        classes: Number of outputs.
        width: Units of each hidden layer.
        depth: Number of hidden layers.
        dropout: Dropout probability after each hidden layer.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = math.prod(input_shape)
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))
