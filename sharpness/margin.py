"""The output margin on the training set: a percentile of f(x)_y - max_{c != y} f(x)_c over the examples, in logits.

A control, not a sharpness; the 10th percentile by default, which hardly any training error can move. It falls where
training fits less. With `inverse_squared` it is 1 / margin^2, which Jiang et al. 2020 correlate (large where the margin
is small); where the percentile is not positive there is no margin, and it is undefined. Source: Bartlett et al. 2017;
Jiang et al. 2020, Dziugaite et al. 2020 (10th percentile; the latter's code takes 1 / margin^2 of negative ones too).
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.settings import Setting
from flatmin.sharpness.engine import LOSS_PASSES, Engine
from flatmin.sharpness.estimate import Estimate, exact

REFUSES = {
    "subset": "it takes one pass, and the error of a few examples' percentile is not known well",
    "loss": "it is a property of the outputs, whatever the loss",
    "label_smoothing": "it is a property of the outputs, whatever the loss",
}
"""`subset`: of 20 draws of a quarter, one 10th percentile lay 5.6 of its standard errors from the whole set's."""


def margin(
    engine: Engine,
    *,
    percentile: Annotated[
        float, Setting(about="Which of the examples' margins, sorted: 0 is the least.", unit="percent", ge=0, le=100)
    ] = 10.0,
    inverse_squared: Annotated[bool, Setting(about="Take 1 / margin^2, and nothing where it is not positive.")] = False,
) -> Estimate:
    """Percentile of the output margin over the training set, in logits.

    Args:
        engine: The models.
        percentile: Which margin, between two examples by linear interpolation.
        inverse_squared: Whether to return 1 / margin^2.

    Raises:
        RequestError: The network has no outputs by class, or the targets are no classes.
    """
    margins = engine.per_example(_margins)
    rank = percentile / 100 * (engine.n_examples - 1)
    below, ordered = int(rank), margins.sort(dim=1).values
    above = min(below + 1, engine.n_examples - 1)
    value = torch.lerp(ordered[:, below], ordered[:, above], rank - below)
    value = torch.where(margins.isfinite().all(dim=1), value, torch.nan)
    if inverse_squared:
        value = torch.where(value > 0, value.pow(-2), torch.nan)
    return exact(value.cpu(), passes=LOSS_PASSES)


def _margins(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the margin of each example, `[n]`, from logits `[n, classes]` and classes `[n]`."""
    if outputs.dim() != 2 or outputs.shape[1] < 2 or targets.dim() != 1 or targets.is_floating_point():
        raise RequestError(
            f"a margin needs outputs [n, classes] and a class for each example, not {list(outputs.shape)} and "
            f"{targets.dtype} {list(targets.shape)}"
        )
    wide, own = outputs.double(), targets[:, None]
    others = wide.scatter(1, own, -torch.inf).amax(dim=1)
    return wide.gather(1, own)[:, 0] - others
