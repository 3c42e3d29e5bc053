"""One linear layer without biases whose weights start at zero: the minimum of the data set `quadratic`.

Under the squared error its loss is a quadratic function of its weights, with the same Hessian everywhere.
"""

from __future__ import annotations

import math

from torch import nn


def linear_at_zero(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build the layer over the flattened input.

    Args:
        input_shape: The shape of one example.
        classes: The outputs: classes, or the values of a regression.
    """
    layer = nn.Linear(math.prod(input_shape), classes, bias=False)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(nn.Flatten(), layer)
