"""A multilayer perceptron with ReLU units, PyTorch's default initialisation."""

from __future__ import annotations

import math

from torch import nn

from flatmin.trainables.networks.arguments import Depth, Dropout, Width


def mlp(
    input_shape: tuple[int, ...],
    classes: int,
    *,
    width: Width = 64,
    depth: Depth = 1,
    dropout: Dropout = 0.0,
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
