"""The sizes that weight noise comes in: the same per element, or in proportion to a tensor's or a filter's norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def scaled_like(
    noise: Tensor, params: Tensor, shapes: Sequence[tuple[int, ...]], scale: Literal["filter", "tensor", "absolute"]
) -> Tensor:
    """Return noise `[K, d]`, each element times a norm of the weights it falls on.

    Args:
        noise: Noise of unit size; used as working space.
        params: Weights `[K, d]`.
        shapes: The shapes of the parameters that the columns hold, in order.
        scale: `filter`: the L2 norm of the weight's own output filter (row), and of the whole tensor for one with a
            single axis (biases, BatchNorm); not divided by the square root of the filter's size. `tensor`: the L2
            norm of the whole tensor. `absolute`: 1.
    """
    if scale == "absolute":
        return noise
    models, start = len(params), 0
    for shape in shapes:
        size = torch.Size(shape).numel()
        filters = shape[0] if scale == "filter" and len(shape) > 1 else 1
        if size == 0:
            continue
        own = params[:, start : start + size].reshape(models, filters, -1)
        noise[:, start : start + size].view(models, filters, -1).mul_(own.norm(dim=2, keepdim=True))
        start += size
    return noise
