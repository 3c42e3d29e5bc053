"""The Frobenius norm of the Hessian, |D H D|_F, in nats per squared unit of the metric.

|A|_F^2 = tr(A^2) for A = D H D is summed over the columns where there are few weights. Otherwise the share of the
first m Krylov vectors Q is known from Lanczos' coefficients, A Q = Q T + beta_m q_{m+1} e_m^T, and the rest is a mean
over Rademacher vectors g:

    |A|_F^2 = sum alpha_j^2 + 2 sum_{j < m} beta_j^2 + beta_m^2 + E|A z|^2,  z = (I - Q Q^T) g.

Unbiased for the square. Its stderr becomes that of the norm by the delta method, stderr / (2 norm); the root is biased
by -norm / 8 of the square's squared relative error, 2e-4 of it at the default tolerance. Squaring the eigenvalues makes
the few large ones count all the more, so the Krylov space pays more than for the trace, with which all products are
shared. Where parts of the examples have draws of their own, the rest comes from products with two parts each
(`flatmin.sharpness.probes_of_strata`). Sources: Hutchinson 1990; Meyer, Musco, Musco and Woodruff 2021 (deflation).

Published by Bisla et al. 2022 (section 3) as the mean of |A v|^2 over 10 normal vectors v: the same quantity at a
relative error of about 1 / sqrt(20) of one large eigenvalue, so there is nothing to reproduce but that noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flatmin.sharpness.arguments import MaxSamples, MetricChoice, Tolerance
from flatmin.sharpness.dense import column_products
from flatmin.sharpness.engine import PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import Estimate, exact_by_part, sample_mean
from flatmin.sharpness.lanczos import Krylov, krylov
from flatmin.sharpness.metric import Metric
from flatmin.sharpness.probes import deflated, probes_outside
from flatmin.sharpness.probes_of_strata import PairsOfStrata, deflated_of_strata


def hessian_frobenius(
    engine: Engine,
    *,
    metric: MetricChoice = "filter",
    tolerance: Tolerance = 0.02,
    max_samples: MaxSamples = 128,
) -> Estimate:
    """Frobenius norm of the Hessian of the training loss.

    Args:
        engine: The models.
        metric: What scales the Hessian.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_samples: The most Hessian-vector products per model, deflation included. With no more weights than
            this the norm is exact.
    """
    if engine.n_params <= max_samples:
        return _exact(engine, metric)
    if engine.strata:
        return _over_strata(engine, metric, tolerance, max_samples)
    length = deflated(engine, max_samples)
    outside, spaces = probes_outside(engine, metric, length), krylov(engine, metric)

    def draw(first: int, count: int, active: Tensor) -> Tensor:
        run = outside.runs(first, count, 1, active)
        return run.square * (run.alpha[..., 0].square() + run.beta[..., 0].square())

    mean = sample_mean(
        draw,
        len(engine),
        tolerance=tolerance,
        max_samples=max_samples - length,
        offset=_known(spaces, length),
        function=_root,
    )
    samples = mean.samples + spaces.lengths.clamp(max=length).cpu()
    without = None
    if engine.parts:
        drawn = outside.mean_of_first(mean.samples, lambda run: run.further)
        without = (spaces.replicates(length)[1] + drawn)[1:].sqrt().cpu()
    return Estimate(
        mean.value, mean.stderr, samples, PRODUCT_PASSES * samples.double(), mean.converged, without=without
    )


def _over_strata(engine: Engine, metric: Metric, tolerance: float, max_samples: int) -> Estimate:
    """Return the norm by products of each probe with two strata."""
    length, draws_a_product = deflated_of_strata(engine, max_samples), engine.strata // 2
    pairs = PairsOfStrata(engine, metric, length)
    spaces = pairs.spaces
    mean = sample_mean(
        pairs.draw,
        len(engine),
        tolerance=tolerance,
        max_samples=(max_samples - length) * draws_a_product,
        offset=_known(spaces, length),
        function=_root,
    )
    known = spaces.lengths.clamp(max=length).cpu()
    passes = PRODUCT_PASSES * (known + mean.samples.double() * 2 / engine.strata)
    without = None
    if engine.parts:
        without = (spaces.replicates(length)[1][1:].cpu() + pairs.without(mean.samples)).clamp(min=0.0).sqrt()
    return Estimate(
        mean.value, mean.stderr, known + mean.samples, passes, mean.converged, without=without, draws_in_parts=2
    )


def _known(spaces: Krylov, length: int) -> Tensor:
    """Return |A Q|_F^2 of the first `length` Krylov vectors Q, `[K]`."""
    alpha, beta = (part.square() for part in spaces.coefficients(length))
    return alpha.sum(dim=1) + 2 * beta[:, :-1].sum(dim=1) + beta[:, -1:].sum(dim=1)


def _root(square: Tensor, stderr: Tensor) -> tuple[Tensor, Tensor]:
    norm = square.clamp(min=0.0).sqrt()  # the part that is drawn may come out below 0
    return norm, torch.where(norm > 0, stderr / (2 * norm), stderr)


def _exact(engine: Engine, metric: Metric) -> Estimate:
    square = sum((part.square.sum(dim=0) for part in column_products(engine, metric)), torch.zeros(()))
    return exact_by_part(square.sqrt(), passes=PRODUCT_PASSES * engine.n_params, samples=engine.n_params)
