"""The largest (algebraic) eigenvalue of the Hessian, of D H D, in nats per squared unit of the metric.

Lanczos with full reorthogonalisation in float64: the largest Ritz value theta of a growing Krylov space,
until its residual bound is a small part of it. Published by Bisla et al. 2022 (section 3) as lambda_max, from
100 steps.
"""

from __future__ import annotations

from typing import Annotated

import torch

from flatmin.settings import Setting
from flatmin.sharpness.arguments import MetricChoice, Tolerance
from flatmin.sharpness.engine import PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import Estimate
from flatmin.sharpness.lanczos import krylov

_LEAST_STEPS = 16
"""Steps before a value may count as converged: a start vector that hardly meets the top eigenvector can rest on the
second one for a while, with a small residual. The trace deflates with as many vectors, and they are shared."""


def lambda_max(
    engine: Engine,
    *,
    metric: MetricChoice = "filter",
    tolerance: Tolerance = 0.005,
    max_steps: Annotated[int, Setting(about="Most Lanczos steps of a model.", unit="steps", ge=1)] = 100,
) -> Estimate:
    """Largest eigenvalue of the Hessian of the training loss.

    `stderr` is the residual bound, not a statistical error: an eigenvalue lies within it of the value, for
    certain. The value is a Ritz value, so it is never above the largest eigenvalue, and once converged its
    error is of the order of stderr^2 / (gap to the next eigenvalue). The bound speaks of some eigenvalue; that it
    is the largest is likely after 16 steps from a random start, and not certain: for eigenvalues 0.5, 0.4, 0.2 and less
    beside others down to -100, one of 100 starts rested on 0.4 at a tolerance of 0.05, and none at 0.005.

    Args:
        engine: The models.
        metric: What scales the Hessian.
        tolerance: Residual bound at which a model's iteration stops, as a fraction of its value.
        max_steps: The most steps per model; fewer if their vectors would not fit in the engine's memory.
    """
    spaces = krylov(engine, metric)
    active = torch.ones(len(engine), dtype=torch.bool, device=engine.device)
    least = min(_LEAST_STEPS, engine.n_params, max_steps)
    value, stderr = (torch.full_like(engine.scale(metric)[:, 0], torch.nan) for _ in range(2))
    samples, converged = torch.zeros_like(spaces.lengths), torch.zeros_like(active)
    for length in range(1, min(max_steps, spaces.capacity) + 1):
        spaces.grow(length, active)
        theta, residual = spaces.top(length, active)
        value, stderr = torch.where(active, theta, value), torch.where(active, residual, stderr)
        samples = torch.where(active, spaces.lengths.clamp(max=length), samples)
        enough = (spaces.lengths.clamp(max=length) >= least) | (spaces.lengths < length)
        converged |= active & enough & (residual <= tolerance * theta.abs())
        active = active & ~converged & theta.isfinite()
        if not bool(active.any()):
            break
    passes = PRODUCT_PASSES * samples.double()
    return Estimate(value.cpu(), stderr.cpu(), samples.cpu(), passes.cpu(), converged.cpu())
