"""The trace of the Hessian, tr(D H D), in nats per squared unit of the metric.

With few weights the diagonal is read off exactly. Otherwise the trace within a Krylov space of Q is known
exactly, tr(Q^T A Q) = sum of Lanczos' alpha for A = D H D, and the rest is Hutchinson's mean over Rademacher
vectors g:

    tr(A) = tr(Q^T A Q) + E[z^T A z],  z = (I - Q Q^T) g.

Unbiased, because Q does not depend on g. This is Hutch++ (Meyer, Musco, Musco and Woodruff 2021, algorithm 1)
with the Krylov space in place of their one-step sketch (Chen and Hallman 2023): it catches the large
eigenvalues with half the products, and `lambda_max` has often paid for them already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatmin.sharpness.arguments import MaxSamples, MetricChoice, Tolerance
from flatmin.sharpness.engine import PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import Estimate, sample_mean
from flatmin.sharpness.lanczos import krylov
from flatmin.sharpness.metric import Metric

_DEFLATED_SHARE = 8
"""An eighth of the products goes to the Krylov space: on ReLU networks trained on noisy labels 16 vectors cut
the spread of a sample by 4 or more (n = 3 networks of 610 and 4810 weights); 32 halve it once more at twice
the price."""


def hessian_trace(
    engine: Engine,
    *,
    metric: MetricChoice = "filter",
    tolerance: Tolerance = 0.02,
    max_samples: MaxSamples = 128,
) -> Estimate:
    """Trace of the Hessian of the training loss.

    Args:
        engine: The models.
        metric: What scales the Hessian.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_samples: The most Hessian-vector products per model, deflation included. With no more weights than
            this the trace is exact.
    """
    if engine.n_params <= max_samples:
        return _exact(engine, metric)
    d, every = engine.scale(metric), torch.ones(len(engine), dtype=torch.bool, device=engine.device)
    spaces = krylov(engine, metric)
    length = min(max_samples // _DEFLATED_SHARE, spaces.capacity)
    spaces.grow(length, every)

    def draw(first: int, count: int, active: Tensor) -> Tensor:
        parts = []
        for start, size in engine.portions(first, count):
            z = spaces.deflate(engine.vectors("rademacher", "probe", start, size), length)
            parts.append((z * d * engine.hvps(d * z, active.to(engine.device))).sum(dim=2))
        return torch.cat(parts)

    mean = sample_mean(
        draw, len(engine), tolerance=tolerance, max_samples=max_samples - length, offset=spaces.trace(length)
    )
    samples = mean.samples + spaces.lengths.clamp(max=length).cpu()
    return Estimate(mean.value, mean.stderr, samples, PRODUCT_PASSES * samples.double(), mean.converged)


def _exact(engine: Engine, metric: Metric) -> Estimate:
    d, n = engine.scale(metric), engine.n_params
    basis = torch.eye(n, dtype=torch.float64, device=engine.device)
    value = torch.zeros(len(engine), dtype=torch.float64, device=engine.device)
    for start, size in engine.portions(0, n):
        vectors = basis[start : start + size, None].expand(size, len(engine), n)
        value += (d * vectors * engine.hvps(d * vectors)).sum(dim=(0, 2))
    value = value.cpu()
    value = torch.where(value.isfinite(), value, torch.nan)
    samples = torch.full((len(engine),), n)
    return Estimate(value, 0.0 * value, samples, PRODUCT_PASSES * samples.double(), value.isfinite())
