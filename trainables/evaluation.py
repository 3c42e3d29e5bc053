"""Whole-set loss and scores of every model of a stack, in eval mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatmin.pulse import beat
from flatmin.stack import StackedNetwork
from flatmin.stack.network import Buffers
from flatmin.trainables.data import Split
from flatmin.trainables.ranks import Ranks
from flatmin.trainables.tasks import Objective


@dataclass(frozen=True)
class Scores:
    """Scores of K models over one split, means over its examples.

    Attributes:
        loss: Loss of the task against the targets as used, float64 `[K]`.
        acc: Fraction right (of pixels, in a segmentation) against the labels as used, `[K]`; None in a regression.
        acc_clean: The same against the true labels.
        dice: Dice coefficient, `[K]`; None but in a segmentation.
    """

    loss: Tensor
    acc: Tensor | None = None
    acc_clean: Tensor | None = None
    dice: Tensor | None = None


@torch.no_grad()
def evaluate(
    network: StackedNetwork,
    params: Tensor,
    buffers: Buffers,
    split: Split,
    objective: Objective,
    ranks: Ranks | None = None,
) -> Scores:
    """Score the models on a split, without smoothing or augmentation, sums in float64 in fixed order.

    Args:
        network: The network.
        params: Weights `[K, d]`.
        buffers: Stacked buffers.
        split: The examples.
        objective: What they are learned for.
        ranks: The processes that share the work, each some of the chunks; this one alone by default.
    """
    ranks = ranks or Ranks()
    total = torch.zeros(len(objective.columns), len(params), dtype=torch.float64, device=params.device)
    chunks = split.chunks()[ranks.rank :: ranks.size]
    for (start, stop), batch in zip(chunks.bounds, chunks, strict=True):
        beat()
        found = objective.scores(network.logits(params, buffers, batch), batch.y, split.true_y[start:stop])
        total += torch.stack([found[name].double().sum(dim=1) for name in objective.columns])
    means = ranks.sum(total).cpu() / len(split)
    return Scores(**dict(zip(objective.columns, means, strict=True)))
