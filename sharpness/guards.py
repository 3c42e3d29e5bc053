"""What is looked at before anything is measured: that the network and the loss can be measured at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.errors import FlatminError

_BATCH_STATISTICS = nn.modules.batchnorm._BatchNorm


def check_network(template: nn.Module) -> None:
    """Refuse a network whose output for one example depends on the others in eval mode.

    Raises:
        FlatminError: It has a layer that always normalises by the batch.
    """
    for path, module in template.named_modules():
        if isinstance(module, _BATCH_STATISTICS) and module.running_mean is None:
            raise FlatminError(
                f"the layer '{path}' normalises by the batch in eval mode too (track_running_stats=False), so the loss "
                "is not a mean over examples"
            )


def check_losses(losses: Callable[[Tensor], tuple[Tensor, Tensor]], params: Tensor) -> None:
    """Try a network and its loss on a few examples, twice.

    Args:
        losses: From weights to (outputs, losses).
        params: The weights to try, `[1, d]`.

    Raises:
        FlatminError: The network fails on the examples, is random, or its loss has nothing to do with the weights.
    """
    with generators_kept(params.device), torch.enable_grad():
        at = params.clone().requires_grad_()
        try:
            (outputs, found), (again, _) = losses(at), losses(at)
        except (MemoryError, torch.OutOfMemoryError, FlatminError):
            raise
        except Exception as error:
            raise FlatminError(f"the network cannot be evaluated on the examples: {error}") from error
    if not bool(((outputs == again) | (outputs.isnan() & again.isnan())).all()):
        raise FlatminError("the network gives the same examples two different outputs in eval mode: it is random")
    if not found.requires_grad:
        what = "loss" if outputs.requires_grad else "network's output"
        raise FlatminError(f"the {what} does not depend on the weights, so there is no minimum to measure")


def activations(template: nn.Module, x: Tensor) -> int:
    """Return how many numbers the modules of a network put out for one example.

    Args:
        template: The network; a copy of it is evaluated.
        x: Examples `[n, *shape]`, of which the first is taken.
    """
    module, count = copy.deepcopy(template).eval(), 0

    def add(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal count
        count += output.numel() if isinstance(output, Tensor) else 0

    for part in module.modules():
        if not list(part.children()):
            part.register_forward_hook(add)
    weight = next(module.parameters())
    one = x[:1].to(weight.device, weight.dtype) if x.is_floating_point() else x[:1].to(weight.device)
    with torch.no_grad(), generators_kept(weight.device):
        module(one)
    return max(1, count)


def generators_kept(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context after which torch's generators are as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
