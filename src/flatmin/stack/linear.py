"""Linear layers as W x^T, so that the gradient of W comes out as W lies in memory.

Torch takes x W^T, whose gradient is that of W transposed. To turn it round for the one buffer `[K, d]` took a CPU as
long as all products of a pass, in MLPs of width 256 at batches of 20 (`benchmarks/frequency.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def weights_first(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which linear layers of matrices are taken in that order, where it pays.

    Args:
        x: What goes into the network.
    """
    pays = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return _WeightsFirst() if pays else nullcontext()


class _WeightsFirst(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and [part.dim() for part in args[:2]] == [2, 2]:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    products = (weight @ input.mT).mT
    return products if bias is None else products + bias
