"""What drawing the examples adds to the error of a measure of a subset of m of n examples.

A measure that tells its value without each part of the subset gets the jackknife's error, at no further pass
(`flatmin.sharpness.jackknife`). Any other is taken again on G = 16 disjoint groups of m / G examples, with the first of
the same random vectors and no more than a rough tolerance asks for, so that all groups together cost about what the
subset does, and more where it has strata and they are too small for any. With V the variance of the groups' values,

    sampling error^2 = V / G (1 - m / n) + b^2,    b = (mean of the groups - value) / (G - 1) (1 - m / n).

The first term is exact for a mean over examples, and for any measure that is close to one in the neighbourhood of a
group's size; b is the bias of a value that changes like 1 / m. Source: the method of random groups with a
finite-population correction (Wolter, Introduction to Variance Estimation, 2007, chapter 2), and the jackknife's bias
(Quenouille 1956). The sampling error is added to the measure's own in quadrature. What draws of the
parts' own add, D, is in the jackknife's variance J as well, w times: J (1 - m / n) + D (1 - w (1 - m / n)) counts each
once, and D at least is told.

A spread of P parts or groups has P - 1 degrees of freedom, a row does not tell how many, and where few examples carry a
value the parts are skewed. So the sampling error is multiplied by `jackknife.widening`, 1.09 for 16 and 1.04 for 32
parts without skewness, so that value +- 1.96 stderr is a 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flatmin.labels import MeasureLabel
from flatmin.sharpness.engine import LOSS_PASSES, Engine
from flatmin.sharpness.estimate import Estimate
from flatmin.sharpness.jackknife import pseudo_values, sampling_variance, widening

GROUPS = 16

_ROUGH = 0.2
"""The tolerance of a group's value: groups are compared among themselves, and share the noise of their vectors."""

_DRAWN = 0.7
"""The share of the tolerance that draws and iterations of a subset get, half of the variance: the rest is for the
sampling error, which would lift a value that stops at the whole tolerance above it."""

Take = Callable[[Engine, MeasureLabel], Estimate]
"""`take(engine, label)` takes a measure."""


def measure_of_subset(sample: Engine, label: MeasureLabel, take: Take) -> Estimate:
    """Return a measure of a subset with what drawing it adds to its stderr, and its passes over the whole set.

    Args:
        sample: The subset.
        label: The measure.
        take: Takes it.
    """
    estimate = take(sample, _at_tolerance(label, lambda tolerance: _DRAWN * tolerance))
    share, passes = sample.n_examples / sample.population, torch.zeros_like(estimate.passes)
    own = estimate.stderr.square()
    if estimate.without is None:
        variance, passes = _of_groups(sample, label, estimate.value, take)
    else:
        parts = estimate.value, estimate.without.cpu(), sample.shares.to(estimate.value.device)
        variance = sampling_variance(*parts, 1 - share, widening(pseudo_values(*parts)))
        variance = (variance - estimate.draws_in_parts * own * (1 - share)).clamp(min=0.0)
    error = (own + variance).sqrt()
    # A measure without a tolerance only needs a finite error.
    tolerance = float(label.arguments.get("tolerance", math.inf))
    return replace(
        estimate,
        stderr=error,
        passes=estimate.passes * share + passes + (LOSS_PASSES if label.common["subset_stratified"] else 0.0),
        converged=estimate.converged & (error <= tolerance * estimate.value.abs()),
    )


def _of_groups(sample: Engine, label: MeasureLabel, value: Tensor, take: Take) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of values `[K]` of a sample, from those of its groups, and their passes."""
    size, roughly = sample.n_examples // GROUPS, _at_tolerance(label, lambda tolerance: max(_ROUGH, tolerance))
    parts = [take(engine, roughly) for engine in sample.groups(GROUPS)]
    values, passes = (
        torch.cat([getattr(part, column) for part in parts]).double().reshape(GROUPS, len(sample))
        for column in ("value", "passes")
    )
    left_out = 1 - sample.n_examples / sample.population
    bias = (values.mean(dim=0) - value) / (GROUPS - 1) * left_out
    variance = values.var(dim=0) * widening(values).square() * (size / sample.n_examples) * left_out
    return variance + bias.square(), passes.sum(dim=0) * (size / sample.population)


def _at_tolerance(label: MeasureLabel, change: Callable[[float], float]) -> MeasureLabel:
    """Return a measure with another tolerance, if it has one."""
    changed = {name: change(given) if name == "tolerance" else given for name, given in label.arguments.items()}
    return replace(label, arguments=changed)
