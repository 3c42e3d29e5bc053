"""The largest (algebraic) eigenvalue of the Hessian, of D H D, in nats per squared unit of the metric.

Lanczos with full reorthogonalisation in float64: the largest Ritz value theta of a growing Krylov space,
until its residual bound is a small part of it. Published by Bisla et al. 2022 (section 3) as lambda_max, from
100 steps.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from flatmin.settings import Setting
from flatmin.sharpness.arguments import MetricChoice, Tolerance
from flatmin.sharpness.engine import PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import Estimate
from flatmin.sharpness.lanczos import krylov
from flatmin.sharpness.metric import Metric

_LEAST_STEPS = 16
"""Steps before a value may count as converged: a start vector that hardly meets the top eigenvector can rest on the
second one for a while, with a small residual. The trace deflates with as many vectors, and they are shared."""

_EARLY_TOLERANCE, _EARLY = 0.01, ((6, 0.02), (8, 0.1))
"""Where the tolerance is 0.01 or more, a residual of a fiftieth of it will do from 6 steps on and of a tenth from 8. Of
2000 starts under the eigenvalues 3 and 2.98, 2.95, 2.9, 2.88, 2.7, 2.5, 2 or 1.5 beside 198 up to 1, at most 0.6 %
rested on the second at a gap of more than the tolerance of 0.02 (0.2 % if none stops before 8). So the whole tolerance
is the stderr then, which holds a closer neighbour."""


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
    beside others down to -100, one of 100 starts rested on 0.4 at a tolerance of 0.05, and none at 0.005. A tolerance
    of 0.01 or more may be met after 6 steps, by a residual of a fiftieth of it, or after 8, by one of a tenth; `stderr`
    is then the tolerance.

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
        allowed = tolerance * theta.abs()
        shares = [share for steps, share in _EARLY if length >= steps]
        early = (residual <= max(shares, default=0.0) * allowed) & (tolerance >= _EARLY_TOLERANCE) & bool(shares)
        early &= (length < least) & ((spaces.lengths > length) | ((spaces.lengths == length) & ~spaces.ended))
        residual = torch.where(early, allowed, residual)
        value, stderr = torch.where(active, theta, value), torch.where(active, residual, stderr)
        samples = torch.where(active, spaces.lengths.clamp(max=length), samples)
        enough = early | (spaces.lengths.clamp(max=length) >= least) | (spaces.lengths < length)
        converged |= active & enough & (residual <= allowed)
        active = active & ~converged & theta.isfinite()
        if not bool(active.any()):
            break
    passes = PRODUCT_PASSES * (samples.double() + bool(engine.parts))
    without = _without(engine, metric, samples).cpu() if engine.parts else None
    return Estimate(value.cpu(), stderr.cpu(), samples.cpu(), passes.cpu(), converged.cpu(), without=without)


def _without(engine: Engine, metric: Metric, steps: Tensor) -> Tensor:
    """Return the largest eigenvalue without each part of a subset, `[P, K]`, to second order, by one more product.

    Of A without part p the column A_(p) u is known, u the top Ritz vector. In the basis of all Ritz vectors and of what
    A_(p) u has beside them, A_(p) is taken to be the Ritz values on the diagonal, 0 last, with that column and row.
    """
    spaces, d = krylov(engine, metric), engine.scale(metric)
    result = torch.full((engine.parts, len(engine)), torch.nan, dtype=torch.float64, device=engine.device)
    for size in sorted(set(steps.tolist()) - {0}):
        rows = steps == size
        theta, _, vectors = spaces.leading(size, size, rows)
        parts = engine.products_by_part(d * vectors[:1], rows)[:, 0]
        whole = d * parts.double().sum(dim=0)
        for p, (part, share) in enumerate(zip(parts, engine.shares, strict=True)):
            column = (whole - d * part) / (1.0 - share)
            inside = torch.einsum("jkd,kd->kj", vectors, column)
            beside = (column.square().sum(dim=1) - inside.square().sum(dim=1)).clamp(min=0.0).sqrt()
            arrow = torch.diag_embed(torch.nn.functional.pad(theta.T, (0, 1)))
            arrow[:, 0, :-1] = arrow[:, :-1, 0] = inside
            arrow[:, 0, -1] = arrow[:, -1, 0] = beside
            sound = rows & arrow.isfinite().flatten(1).all(dim=1)
            largest = torch.linalg.eigvalsh(torch.where(sound[:, None, None], arrow, 0.0))[:, -1]
            result[p] = torch.where(sound, largest, result[p])
    return result
