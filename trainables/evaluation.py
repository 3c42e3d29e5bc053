"""Whole-set loss and accuracy of every model of a stack, in eval mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatmin.stack import StackedNetwork
from flatmin.stack.network import Buffers, cross_entropy
from flatmin.trainables.data import Split


@dataclass(frozen=True)
class Scores:
    """Scores of K models over one split.

    Attributes:
        loss: Mean cross-entropy against the labels as used, nats, float64 `[K]`.
        acc: Fraction right against the labels as used, `[K]`.
        acc_clean: Fraction right against the true labels, `[K]`.
    """

    loss: Tensor
    acc: Tensor
    acc_clean: Tensor


@torch.no_grad()
def evaluate(network: StackedNetwork, params: Tensor, buffers: Buffers, split: Split) -> Scores:
    """Score the models on a split, without smoothing or augmentation, sums in float64 in fixed order."""
    loss, right, right_clean = (torch.zeros(len(params), dtype=torch.float64, device=params.device) for _ in range(3))
    start = 0
    for batch in split.chunks():
        logits = network.logits(params, buffers, batch)
        true_y = split.true_y[start : start + batch.y.shape[1]]
        predicted = logits.argmax(dim=2)
        loss += cross_entropy(logits, batch.y).double().sum(dim=1)
        right += (predicted == batch.y).sum(dim=1)
        right_clean += (predicted == true_y).sum(dim=1)
        start += batch.y.shape[1]
    n = len(split)
    return Scores((loss / n).cpu(), (right / n).cpu(), (right_clean / n).cpu())
