"""Local entropy: minus the log of how much of a neighbourhood of the weights has a small loss, in nats.

local_entropy = -log E[exp(-L(w + D u))],  u ~ N(0, I / gamma),

which is -log of the integral of exp(-L(w') - gamma |w - w'|^2 / 2) over w' (Chaudhari et al. 2017)
divided by the Gaussian's own, (2 pi / gamma)^(d/2). `normaliser=volume` leaves that factor in, as the equation has
it: then (d / 2) log(2 pi / gamma) is subtracted, and the value says little but how many weights d a network has.
Within one architecture the two differ by a constant.

    value = -logsumexp(-L_k) + log K - r^2 / 2,    stderr = r,

r the relative standard error of the mean of exp(-L_k) (delta method, which also gives the bias taken off). Where the
losses L_k spread over several nats, a few small ones carry the mean and r is too small, so that such a value never
counts as converged; `lpf`, which it comes near to where they do not, is then the sounder number. The draws of a given
deviation are those of `lpf`.

The code of Bisla et al. 2022 differs from its formula in three ways: exp(+L) in place of exp(-L), a deviation of 1 /
gamma in place of 1 / sqrt(gamma), and log(gamma) / 2 in place of d log(gamma) / 2 in the normaliser.
`local_entropy(exponent=loss, deviation=reciprocal, normaliser=published)` is what it computes, with 100 draws and
gamma = 100 (grid) or 10 (noise and width studies).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from flatmin.settings import Setting
from flatmin.sharpness.arguments import Gamma, MaxSamples, MetricChoice, Tolerance
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import FEWEST, Estimate
from flatmin.sharpness.smoothed import noisy_losses, smoothed_mean

_MOST_SPREAD = math.log(4)
"""Variance of the losses up to which the draws are worth a quarter of their number or more: normal losses of variance
s^2 make the weights exp(-L) of K draws worth K exp(-s^2) equal ones."""


def local_entropy(
    engine: Engine,
    *,
    gamma: Gamma = 100.0,
    metric: MetricChoice = "filter",
    exponent: Annotated[
        Literal["minus_loss", "loss"], Setting(about="What is exponentiated; the published code has the loss.")
    ] = "minus_loss",
    deviation: Annotated[
        Literal["root", "reciprocal"],
        Setting(about="Deviation of the noise: 1 / sqrt(gamma), or 1 / gamma as in the published code."),
    ] = "root",
    normaliser: Annotated[
        Literal["gaussian", "volume", "published"],
        Setting(about="By what the integral is divided: the Gaussian's own, nothing, or what the published code has."),
    ] = "gaussian",
    tolerance: Tolerance = 0.02,
    max_samples: MaxSamples = 256,
) -> Estimate:
    """Minus the log of the local mean of exp(-loss) (local entropy), in nats.

    Args:
        engine: The models.
        gamma: Strength of the pull to w: the inverse of the noise's variance.
        metric: What scales the noise.
        exponent: The sign of the loss in the exponent.
        deviation: What gamma says of the noise.
        normaliser: What becomes of the integral's factor (2 pi / gamma)^(d/2).
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value without that factor.
        max_samples: The most draws per model.
    """
    sigma = 1 / gamma if deviation == "reciprocal" else gamma**-0.5
    sign = 1.0 if exponent == "loss" else -1.0
    every = torch.ones(len(engine), dtype=torch.bool)
    first = noisy_losses(engine, sigma, metric)(0, min(FEWEST, max_samples), every)[:, 0]
    largest = (sign * first).amax(dim=0)

    def minus_log(mean: Tensor, stderr: Tensor) -> tuple[Tensor, Tensor]:
        relative = stderr / mean
        bias = torch.where(relative.isfinite(), relative.square() / 2, 0.0)
        return -mean.log() - largest.cpu() - bias, relative

    estimate = smoothed_mean(
        engine,
        sigma,
        metric,
        tolerance=tolerance,
        max_samples=max_samples,
        of_loss=lambda losses, _: (sign * losses - largest).exp(),
        function=minus_log,
    )
    return replace(
        estimate,
        value=estimate.value - _log_of_factor(engine.n_params, gamma, normaliser),
        converged=estimate.converged & (first.var(dim=0) <= _MOST_SPREAD).cpu(),
    )


def _log_of_factor(d: int, gamma: float, normaliser: str) -> float:
    if normaliser == "gaussian":
        return 0.0
    return (d * math.log(2 * math.pi) - (1 if normaliser == "published" else d) * math.log(gamma)) / 2
