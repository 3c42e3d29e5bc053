"""The Ritz values of the published Lanczos runs, from which two published measures are sums.

Bisla et al. 2022 run Lanczos for 100 steps from 2 random starts, sort each run's Ritz values and average them
rank by rank. Here the runs are of whole D H D with full reorthogonalisation, from normal starts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flatmin.sharpness.engine import PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import Estimate
from flatmin.sharpness.lanczos import Krylov, krylov, ritz
from flatmin.sharpness.metric import Metric

_STEPS = 100
_RUNS = 2


def sum_over_ritz_values(
    engine: Engine, metric: Metric, function: Callable[[Tensor], Tensor], *, tolerance: float
) -> Estimate:
    """Return the sum of a function over the 100 averaged Ritz values, as the published code takes it.

    `stderr` is half the difference of the two runs' sums. A model has converged when that is within the tolerance and
    all 100 steps were made: fewer are where their vectors would not fit in the engine's memory, and where there are
    fewer weights, which is no loss.

    Args:
        engine: The models.
        metric: The metric of D.
        function: Of Ritz values, of any shape.
        tolerance: The error that is allowed, as a fraction of the value.
    """
    ranked, lengths = engine.shared(("published ritz", metric), lambda: _ritz_values(engine, metric))
    present = torch.arange(ranked.shape[2], device=engine.device) < lengths[..., None]
    sums = torch.where(present, function(ranked), 0.0).sum(dim=2)
    joint = present.all(dim=0)
    value = torch.where(joint, function(ranked.mean(dim=0)), 0.0).sum(dim=1)
    stderr = (sums[0] - sums[1]).abs() / 2
    undefined = ~value.isfinite() | ~stderr.isfinite()
    value, stderr = value.masked_fill(undefined, torch.nan), stderr.masked_fill(undefined, torch.nan)
    whole = ranked.shape[2] == min(_STEPS, engine.n_params)
    samples = lengths.sum(dim=0)
    return Estimate(
        value.cpu(),
        stderr.cpu(),
        samples.cpu(),
        PRODUCT_PASSES * samples.double().cpu(),
        ((stderr <= tolerance * value.abs()) & whole).cpu(),
    )


def _ritz_values(engine: Engine, metric: Metric) -> tuple[Tensor, Tensor]:
    """Return Ritz values, descending, `[2, K, m]`, and how many each run has; the second basis is not kept."""
    every = torch.ones(len(engine), dtype=torch.bool, device=engine.device)
    values, lengths = [], []
    for run in range(_RUNS):
        spaces = krylov(engine, metric) if run == 0 else Krylov(engine, metric, run)
        size = min(_STEPS, engine.n_params, spaces.capacity)
        spaces.grow(size, every)
        own = spaces.lengths.clamp(max=size)
        of_models = []
        for k, length in enumerate(own.tolist()):
            alpha, beta = (part[k, :length] for part in spaces.coefficients(size))
            theta = ritz(alpha, beta)[0].flip(0)
            of_models.append(torch.cat([theta, theta.new_zeros(size - length)]))
        values.append(torch.stack(of_models))
        lengths.append(own)
    return torch.stack(values), torch.stack(lengths)
