"""The trace of the Hessian, tr(D H D), in nats per squared unit of the metric.

Exact for a chain of linear layers and ReLUs, whose diagonal follows from the losses' second derivatives by the outputs
(`flatmin.stack.chain`). Of other networks with few weights the diagonal is read off exactly. Otherwise the trace within
a Krylov space of Q is known exactly, tr(Q^T A Q) = sum of Lanczos' alpha for A = D H D, and the rest is Hutchinson's
mean over Rademacher vectors g:

    tr(A) = tr(Q^T A Q) + E[z^T A z],  z = (I - Q Q^T) g.

Unbiased, because Q does not depend on g. This is Hutch++ (Meyer, Musco, Musco and Woodruff 2021, algorithm 1)
with the Krylov space in place of their one-step sketch (Chen and Hallman 2023): it catches the large
eigenvalues with half the products, and `lambda_max` has often paid for them already. Where parts of the examples have
draws of their own (`flatmin.sharpness.probes_of_strata`), a round of probes costs one product and two rounds may be
enough; elsewhere `hessian_frobenius` shares all products.

`published=true` is what Bisla et al. 2022 tabulate as the trace: the sum of the 100 Ritz values of Lanczos runs,
averaged over 2 random starts. That estimates no trace, for the weights of the quadrature are left out (their sum
over Ritz values should be d sum tau_i^2 theta_i); it is the trace within a Krylov space.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatmin.sharpness.arguments import MaxSamples, MetricChoice, Published, Tolerance
from flatmin.sharpness.dense import column_products
from flatmin.sharpness.engine import PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import Estimate, exact_by_part, sample_mean
from flatmin.sharpness.lanczos import krylov
from flatmin.sharpness.metric import Metric
from flatmin.sharpness.probes import deflated, probes_outside
from flatmin.sharpness.probes_of_strata import deflated_of_strata, traces_of_strata
from flatmin.sharpness.published_ritz import sum_over_ritz_values
from flatmin.sharpness.smoothed import of_replicates


def hessian_trace(
    engine: Engine,
    *,
    metric: MetricChoice = "filter",
    published: Published = False,
    tolerance: Tolerance = 0.02,
    max_samples: MaxSamples = 128,
) -> Estimate:
    """Trace of the Hessian of the training loss.

    Args:
        engine: The models.
        metric: What scales the Hessian.
        published: The sum of 100 Ritz values instead, from 2 runs, whatever `max_samples` is. It converges where the
            runs agree to the tolerance and their vectors fit in the engine's memory.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_samples: The most Hessian-vector products per model, deflation included. With no more weights than
            this the trace is exact, and so it is for MLPs where that costs no more.
    """
    if published:
        return sum_over_ritz_values(engine, metric, lambda theta: theta, tolerance=tolerance)
    if engine.trace_passes <= PRODUCT_PASSES * max_samples:
        return exact_by_part(engine.trace(engine.scale(metric)), passes=engine.trace_passes)
    if engine.n_params <= max_samples:
        return _exact(engine, metric)
    if engine.strata:
        return _over_strata(engine, metric, tolerance, max_samples)
    length = deflated(engine, max_samples)
    outside, spaces = probes_outside(engine, metric, length), krylov(engine, metric)

    def draw(first: int, count: int, active: Tensor) -> Tensor:
        run = outside.runs(first, count, 1, active)
        return run.square * run.alpha[..., 0]

    mean = sample_mean(
        draw, len(engine), tolerance=tolerance, max_samples=max_samples - length, offset=spaces.trace(length)
    )
    samples = mean.samples + spaces.lengths.clamp(max=length).cpu()
    without = None
    if engine.parts:
        drawn = outside.mean_of_first(mean.samples, lambda run: run.along)
        without = (spaces.replicates(length)[0] + drawn)[1:].cpu()
    return Estimate(
        mean.value, mean.stderr, samples, PRODUCT_PASSES * samples.double(), mean.converged, without=without
    )


def _over_strata(engine: Engine, metric: Metric, tolerance: float, max_samples: int) -> Estimate:
    """Return the trace by probes of each stratum's own."""
    length, spaces = deflated_of_strata(engine, max_samples), krylov(engine, metric)
    draw = traces_of_strata(engine, metric, length)
    mean = sample_mean(
        draw,
        len(engine),
        tolerance=tolerance,
        max_samples=max_samples - length,
        offset=spaces.trace(length),
        shares=engine.stratum_shares,
    )
    known = spaces.lengths.clamp(max=length).cpu()
    samples, passes = known + engine.strata * mean.samples, PRODUCT_PASSES * (known + mean.samples).double()
    without = None
    if engine.parts:
        without = (spaces.replicates(length)[0].cpu() + of_replicates(engine, mean.of_strata))[1:]
    return Estimate(mean.value, mean.stderr, samples, passes, mean.converged, without=without, draws_in_parts=1)


def _exact(engine: Engine, metric: Metric) -> Estimate:
    value = sum((part.along.sum(dim=0) for part in column_products(engine, metric)), torch.zeros(()))
    return exact_by_part(value, passes=PRODUCT_PASSES * engine.n_params, samples=engine.n_params)
