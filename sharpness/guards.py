"""What is looked at before anything is measured: that the network and the loss can be measured at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatmin.errors import FlatminError, RequestError
from flatmin.sharpness.sampling import cut
from flatmin.stack import Batch, normal, stream_key

_BATCH_STATISTICS = nn.modules.batchnorm._BatchNorm

_AGREE = {torch.float64: 1e-7, torch.float32: 1e-3}
_ROUGHLY = 0.03
"""How much the outputs of an example may differ between batches, as a share of the largest: rounding, and that of TF32
and of shorter formats."""

_SIZES = (0.01, 0.1, 1.0)
"""Standard deviations of random weights: at one of them a network is neither dead nor certain of every example."""

Losses = Callable[[Tensor, Batch], tuple[Tensor, Tensor]]
"""From weights `[1, d]` and a batch to (outputs, losses)."""


def check_network(template: nn.Module) -> None:
    """Refuse a network whose output for one example depends on the others in eval mode.

    Raises:
        RequestError: It has a layer that always normalises by the batch.
    """
    for path, module in template.named_modules():
        if isinstance(module, _BATCH_STATISTICS) and module.running_mean is None:
            raise RequestError(
                f"the layer '{path}' normalises by the batch in eval mode too (track_running_stats=False), so the loss "
                "is not a mean over examples"
            )


def check_losses(losses: Losses, params: Tensor, batch: Batch) -> None:
    """Try a network and its loss on two examples: together, again, and one by one.

    Args:
        losses: The network and its loss.
        params: The weights to try, `[1, d]`.
        batch: Examples of one model, of which those of the first are taken; two or more where there are so many.

    Raises:
        RequestError: The network fails on the examples, is random, mixes them, or its loss has nothing to do with the
            weights.
    """
    (pair, *_) = cut(batch, 2)
    with generators_kept(params.device), torch.enable_grad():
        at = params.clone().requires_grad_()
        with _explained("the network cannot be evaluated on the examples"):
            (outputs, found), (again, _) = losses(at, pair), losses(at, pair)
        if not bool(((outputs == again) | (outputs.isnan() & again.isnan())).all()):
            raise RequestError(
                "the network gives the same examples two different outputs in eval mode: it is random (is dropout left "
                "on?)"
            )
        with _explained("the network cannot be evaluated on one example alone, as if it mixed those of a batch"):
            alone = torch.cat([losses(at, single)[0] for single in cut(pair, 1)], dim=1)
        _check_alike(outputs.detach(), alone.detach())
        if not found.requires_grad:
            what = "loss" if outputs.requires_grad else "network's output"
            raise RequestError(f"the {what} does not depend on the weights, so there is no minimum to measure")
        with _explained("the loss has no derivative (a loop over the models, vectorize='loop', may have one)"):
            (slope,) = torch.autograd.grad(found.sum(), at)
        if not bool((slope != 0).any()):
            _check_weights_matter(losses, params, found, batch)


def _check_alike(together: Tensor, alone: Tensor) -> None:
    """Refuse outputs of examples that depend on which others are beside them.

    Raises:
        RequestError: They do.
    """
    exact = torch.get_float32_matmul_precision() == "highest" and not together.is_cuda
    tolerance = _AGREE.get(together.dtype, _ROUGHLY) if exact or together.dtype == torch.float64 else _ROUGHLY
    alike = together.shape == alone.shape
    if alike:
        finite = together.isfinite() & alone.isfinite()
        wide, other = (torch.where(finite, part, 0.0).double() for part in (together, alone))
        alike = bool(((wide - other).abs() <= tolerance * wide.abs().amax()).all())
    if not alike:
        raise RequestError(
            "the network's output for an example depends on the others of its batch in eval mode (does a layer "
            "normalise or average over the batch?), so the loss is not a mean over examples"
        )


def _check_weights_matter(losses: Losses, params: Tensor, known: Tensor, batch: Batch) -> None:
    """Refuse a loss that is flat at the weights, if it is the same and flat at random ones too.

    A dead network is flat at its weights, and so is one that is certain of the examples; at other weights they are not.

    Args:
        losses: The network and its loss.
        params: The weights `[1, d]`.
        known: The losses of the first examples there.
        batch: The examples.

    Raises:
        RequestError: It is.
    """
    for size in _SIZES:
        at = (size * normal(stream_key("slope"), tuple(params.shape)).to(params)).requires_grad_()
        found = losses(at, batch)[1]
        (slope,) = torch.autograd.grad(found.sum(), at)
        if bool((slope != 0).any()) or not torch.equal(found[:, : known.shape[1]], known):
            return
    raise RequestError(
        "the loss is the same at the weights and at random ones, and its gradient is exactly zero, so it does not "
        "depend on the weights, and there is no minimum to measure"
    )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what user code raises into a message."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, FlatminError):
        raise
    except Exception as error:
        raise RequestError(f"{what}: {error}") from error


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Say what to do where a layer has no second derivative.

    Raises:
        RequestError: It has none.
    """
    try:
        yield
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        hint = ""
        if "attention" in str(error):
            hint = (
                "; the plain implementation of attention has one: measure within "
                "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
            )
        raise RequestError(f"the network has no second derivative: {error}{hint}") from error


def work(template: nn.Module, x: Tensor) -> tuple[int, int]:
    """Return how many numbers the modules of a network put out for one example, and how often they use a weight.

    A weight of a convolution is used at every place of its output. What is no module's `weight` is not counted.

    Args:
        template: The network; a copy of it is evaluated.
        x: Examples `[n, *shape]`, of which the first is taken.
    """
    module, count, uses = copy.deepcopy(template).eval(), 0, 0

    def add(part: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal count, uses
        if isinstance(output, Tensor):
            count += output.numel()
            weight = getattr(part, "weight", None)
            uses += output.numel() * weight[0].numel() if isinstance(weight, Tensor) and weight.dim() else 0

    for part in module.modules():
        if not list(part.children()):
            part.register_forward_hook(add)
    weight = next(module.parameters())
    one = x[:1].to(weight.device, weight.dtype) if x.is_floating_point() else x[:1].to(weight.device)
    with torch.no_grad(), generators_kept(weight.device):
        module(one)
    return max(1, count), uses


def generators_kept(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context after which torch's generators are as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
