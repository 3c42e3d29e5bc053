"""Losses of single examples: what the engine sums up, and how a loss as torch has it becomes one."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

from flatmin.errors import RequestError

PerExample = Callable[[Tensor, Tensor], Tensor]
"""`loss(outputs, targets)` takes outputs `[n, ...]` and targets `[n, ...]` and returns the loss of each example,
`[n]`, which no other example has a part in."""

_AGREE = {torch.float64: 1e-9, torch.float32: 1e-4}

_FEW_CLASSES = 32
"""Of 10 classes a softmax along examples is 5 to 10 times faster on a CPU with AVX-512, of 100 it is slower."""


def cross_entropy(outputs: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each example in nats, `[n]`, in at least fp32.

    Args:
        outputs: Logits `[n, classes, ...]`.
        targets: Classes `[n, ...]`, or probabilities in the shape of the logits.
        label_smoothing: The share of the target that is spread evenly over all classes.
    """
    wide = outputs if outputs.dtype == torch.float64 else outputs.float()
    plain = wide.dim() == 2 and targets.shape == wide.shape[:1] and targets.dtype == torch.int64
    if plain and classes_first(wide):
        # as one image whose pixels are the examples: torch takes a softmax of images along their pixels
        wide, targets = wide.t()[None], targets[None]
        return functional.cross_entropy(wide, targets, reduction="none", label_smoothing=label_smoothing)[0]
    losses = functional.cross_entropy(wide, targets, reduction="none", label_smoothing=label_smoothing)
    return losses if losses.dim() == 1 else losses.flatten(1).mean(dim=1)


def classes_first(outputs: Tensor) -> bool:
    """Return whether a softmax of outputs `[..., classes]` is sooner done with the classes in front.

    On a CPU torch goes through rows of a few classes one number at a time, and along examples in vectors.
    """
    return outputs.is_cpu and outputs.shape[-1] <= _FEW_CLASSES


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared difference of each example's outputs from its targets, `[n]`.

    Args:
        outputs: `[n, ...]`.
        targets: Numbers in the shape of the outputs, or classes `[n]`, which count as one-hot.
    """
    wide = outputs if outputs.dtype == torch.float64 else outputs.float()
    if not targets.is_floating_point():
        targets = functional.one_hot(targets, outputs.shape[1])
    if wide.shape != targets.shape:
        raise RequestError(f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape")
    return (wide - targets).square().flatten(1).mean(dim=1)


NAMED: dict[str, PerExample] = {"cross_entropy": cross_entropy, "squared_error": squared_error}


def per_example(loss: str | Callable[..., Tensor]) -> PerExample:
    """Return a loss as the engine takes it: one number per example.

    A torch loss with a `reduction` gives these itself; of any other function that returns one number it is
    taken that it averages over examples, which `check_mean` tries.

    Args:
        loss: `cross_entropy`, `squared_error`, a torch loss module or function with `reduction` 'mean' or 'none',
            or any differentiable function of (outputs, targets) that returns `[n]` or their mean.

    Raises:
        RequestError: There is no loss of that name, or its reduction is neither 'mean' nor 'none'.
    """
    if isinstance(loss, str):
        if loss not in NAMED:
            raise RequestError(f"there is no loss '{loss}'; valid: {', '.join(NAMED)}, or a function")
        return NAMED[loss]
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        if loss.reduction not in ("mean", "none"):
            raise RequestError(f"the loss has reduction '{loss.reduction}'; it must be 'mean' or 'none'")
        single = copy.deepcopy(loss).eval()
        setattr(single, "reduction", "none")  # noqa: B010 (not every module has one)
        return partial(_one_each, single)
    if _takes_reduction(loss):
        return partial(_one_each, partial(loss, reduction="none"))
    return partial(_one_each, loss)


def check_mean(loss: Callable[[Tensor, Tensor], Tensor], single: PerExample, outputs: Tensor, targets: Tensor) -> None:
    """Refuse a loss whose value on a batch is not the mean of its values on the examples.

    Args:
        loss: The loss as it was given.
        single: The same, per example.
        outputs: Some outputs `[n, ...]`.
        targets: Their targets `[n, ...]`.

    Raises:
        RequestError: The two differ: class weights or `ignore_index` with reduction 'mean', or a loss that
            compares examples with each other.
    """
    whole, mean = loss(outputs, targets).mean(), single(outputs, targets).mean()
    allowed = _AGREE.get(outputs.dtype, 1e-2) * (1 + float(whole.detach().abs()))
    if bool((whole - mean).detach().abs() > allowed):
        raise RequestError(
            f"the loss of {len(outputs)} examples is {float(whole):.6g}, and the mean of their own losses is "
            f"{float(mean):.6g}. A measure needs a loss that is a mean over examples; class weights and ignore_index "
            "are such only with reduction='none'"
        )


def _one_each(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor) -> Tensor:
    """Return what a loss says of each example, averaged over all but the examples."""
    losses = loss(outputs, targets)
    if losses.dim() == 0:
        losses = vmap(lambda output, target: loss(output[None], target[None]))(outputs, targets)
    return losses if losses.dim() == 1 else losses.flatten(1).mean(dim=1)


def _takes_reduction(loss: Callable[..., Any]) -> bool:
    try:
        return "reduction" in inspect.signature(loss).parameters
    except (TypeError, ValueError):
        return False
