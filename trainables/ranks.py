"""The processes that train one network together: each takes its share of every batch, and their gradients are added.

Every process holds the weights and the optimizer's state, and takes the same step. BatchNorm's statistics are those of
the whole batch, as of torch's SyncBatchNorm, but twice differentiable and on any device: a step is that of one process,
up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that train one network.

    Attributes:
        rank: Its number, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> tuple[int, int]:
        """Return where this process's share of some examples starts and stops; shares differ by one at most."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes; each gets the same bits."""
        return _summed(tensor) if self.size > 1 else tensor

    def batch_norm(self) -> AbstractContextManager[Any]:
        """Return a context in which BatchNorm normalises by the statistics of all processes' examples."""
        return _JointBatchNorm() if self.size > 1 else nullcontext()


class _Sum(torch.autograd.Function):
    """The sum over all processes, of which each has the whole gradient; torch's own gives a warning."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Tensor:
        return _sum(grad)


def _sum(tensor: Tensor) -> Tensor:
    result: Tensor = _Sum.apply(tensor)
    return result


def _summed(tensor: Tensor) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _JointBatchNorm(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _batch_norm if func is functional.batch_norm else func
        return call(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise as `torch.nn.functional.batch_norm` does, by the statistics of the examples of all processes."""
    if not training:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    axes = [axis for axis in range(input.dim()) if axis != 1]
    shape = [1, -1, *[1] * (input.dim() - 2)]
    x = input if input.dtype == torch.float64 else input.float()
    count = _sum(x.new_tensor(float(x.numel() // x.shape[1])))
    mean = _sum(x.sum(dim=axes)) / count
    centred = x - mean.reshape(shape)
    var = _sum(centred.square().sum(dim=axes)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
            running_var.lerp_((var.detach() * count / (count - 1).clamp(min=1)).to(running_var.dtype), momentum)
    normal = centred * (var + eps).rsqrt().reshape(shape)
    if weight is not None:
        normal = normal * weight.reshape(shape)
    if bias is not None:
        normal = normal + bias.reshape(shape)
    return normal.to(input.dtype)
