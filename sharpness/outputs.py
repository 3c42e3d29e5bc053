"""Functions of a network's outputs that measures share, and what outputs must be for them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.losses import PerExample

_LEAST_NORM = 1e-10


def check_logits(outputs: Tensor) -> None:
    """Refuse outputs that are no logits of two classes or more.

    Args:
        outputs: `[n, classes, ...]`.

    Raises:
        RequestError: They have no axis of classes, or a single class.
    """
    if outputs.dim() < 2 or outputs.shape[1] < 2:
        raise RequestError(f"logits of two classes or more are needed, [n, classes, ...]; got {list(outputs.shape)}")


def entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the entropy of each example's predicted classes in nats, `[n]`.

    Args:
        outputs: Logits `[n, classes, ...]`; further axes are averaged.
        targets: Not looked at.
    """
    check_logits(outputs)
    wide = outputs if outputs.dtype == torch.float64 else outputs.float()
    logs = wide.log_softmax(dim=1)
    entropies = torch.special.entr(logs.exp()).sum(dim=1)
    each: Tensor = entropies.flatten(1).mean(dim=1) if entropies.dim() > 1 else entropies
    return each


def with_normalised_logits(engine: Engine) -> Engine:
    """Return the engine with logits less their mean and divided by their norm (at least 1e-10) before the loss.

    Source: the code of Andriushchenko et al. 2023. Every measure of the engine gets the same one.
    """
    made: Engine = engine.shared("normalised logits", lambda: engine.with_loss(partial(_of_normalised, engine.loss)))
    return made


def _of_normalised(loss: PerExample, outputs: Tensor, targets: Tensor) -> Tensor:
    check_logits(outputs)
    centred = outputs - outputs.mean(dim=1, keepdim=True)
    return loss(torch.nn.functional.normalize(centred, dim=1, eps=_LEAST_NORM), targets)
