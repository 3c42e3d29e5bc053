"""Every statistic of how a measure goes with a target, over the configurations of some models.

Correlations are of seed means over configurations; what each statistic is, and its source, is in the file that computes
it and in `docs/statistics.md`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scipy import stats

from flatmin.analysis import bootstrap, conditional, kendall
from flatmin.analysis.configurations import Configurations, Floats
from flatmin.analysis.crossfit import crossfit
from flatmin.analysis.granulated import Psi, granulated
from flatmin.analysis.granulated import mean as psi_mean
from flatmin.analysis.partial import bootstrap_partial, partial_rank
from flatmin.analysis.sign_error import Environments, SignError, environments, sign_errors

_SEED_RESAMPLES = 200
"""Enough for a variance, which is all that the number of seeds needs."""


@dataclass(frozen=True)
class MeasureCorrelation:
    """How one measure goes with the target; None where a number is undefined.

    Attributes:
        tau: Kendall tau-b of the seed means over configurations.
        tau_low: Lower end of its 95 % percentile interval, bootstrapped over configurations.
        tau_high: Upper end of that interval.
        n: Rows with both measure and target.
        n_configs: Configurations among them.
        tau_rows: Kendall tau-b over rows, seeds not averaged.
        spearman: Spearman's rank correlation of the seed means.
        pearson: Pearson's linear correlation of the seed means.
        partial: Rank correlation of the seed means given the axes; None without axes.
        partial_low: Lower end of its 95 % interval, bootstrapped over configurations.
        partial_high: Upper end of that interval.
        sign_flip: Whether `tau` and `partial` have different signs: the settings, not the measure, order the target.
        psi: Granulated Kendall coefficient of each axis.
        psi_mean: Their mean.
        cmi: Smallest normalised conditional mutual information over sets of at most two axes.
        sign_error: Sign errors over the environments of each axis, and of all.
        q: Benjamini-Hochberg q-value of `tau` being zero, over the measures of the table.
        p: The p-value behind it, from the bootstrap.
        crossfit: Cross-fitted R^2 of the target for each axis, its levels left out in turn.
        seeds_to_halve: Seeds per configuration for an interval of `tau` half as wide; infinity where seeds alone
            cannot.
        tau_converged: `tau` of the models that pass the convergence filter.
        n_converged: How many they are.
        tau_all: `tau` without that filter.
        n_all: How many those are.
    """

    tau: float | None
    tau_low: float | None
    tau_high: float | None
    n: int
    n_configs: int
    tau_rows: float | None
    spearman: float | None
    pearson: float | None
    partial: float | None = None
    partial_low: float | None = None
    partial_high: float | None = None
    sign_flip: bool | None = None
    psi: Mapping[str, Psi] = field(default_factory=dict)
    psi_mean: float | None = None
    cmi: float | None = None
    sign_error: tuple[SignError, ...] = ()
    q: float | None = None
    p: float | None = None
    crossfit: Mapping[str, float | None] = field(default_factory=dict)
    seeds_to_halve: float | None = None
    tau_converged: float | None = None
    n_converged: int | None = None
    tau_all: float | None = None
    n_all: int | None = None

    def to_json(self) -> dict[str, object]:
        """Return the statistics up to `q` as plain values; of `psi` the value and the number of groups."""
        found: dict[str, object] = dict(dataclasses.asdict(self))
        found["psi"] = {axis: {"value": one.value, "groups": one.groups} for axis, one in self.psi.items()}
        found["sign_error"] = [dataclasses.asdict(one) for one in self.sign_error]
        names = list(found)
        return {name: found[name] for name in names[: names.index("q") + 1]}


@dataclass(frozen=True)
class Request:
    """How the statistics are made.

    Attributes:
        bootstrap: Resamples of the intervals; 0 for none.
        seed: Seed of the resampling.
        test_examples: Test examples behind the target, for the weights of the sign error; None for equal weights.
    """

    bootstrap: int = 1000
    seed: int = 0
    test_examples: int | None = None


def associate(
    configurations: Configurations, measures: Mapping[str, Floats], target: Floats, request: Request
) -> tuple[dict[str, MeasureCorrelation], list[str]]:
    """Return the statistics of measures that are all known for the same rows.

    Args:
        configurations: Which row belongs to which configuration, and what differs in which axis.
        measures: Finite values per row, shape `(rows,)` each.
        target: Finite values per row, shape `(rows,)`.
        request: How they are made.

    Returns:
        One entry per measure; and what a reader has to know about how they were made, mostly nothing.
    """
    y = configurations.means(target)
    means = {name: configurations.means(values) for name, values in measures.items()}
    part = bootstrap.part_of(len(configurations))
    levels = configurations.levels[part]
    pairs = environments(configurations, target, test_examples=request.test_examples)
    information = conditional.conditional(configurations.axes, levels, [mean[part] for mean in means.values()], y[part])
    found = {name: _plain(configurations, measures[name], target, mean, y, pairs) for name, mean in means.items()}
    for name, given in zip(means, information, strict=True):
        found[name] = dataclasses.replace(found[name], cmi=conditional.smallest(given))
    if request.bootstrap and len(configurations) >= bootstrap.FEWEST_CONFIGURATIONS:
        found = _resampled(configurations, found, measures, target, request)
    return found, _notes(len(configurations), len(part), pairs)


def _plain(
    configurations: Configurations, values: Floats, target: Floats, x: Floats, y: Floats, pairs: Sequence[Environments]
) -> MeasureCorrelation:
    tau = kendall.tau_b(x, y)
    partial = partial_rank(x, y, configurations.levels) if configurations.axes else math.nan
    psi = granulated(configurations, x, y)
    return MeasureCorrelation(
        tau=defined(tau),
        tau_low=None,
        tau_high=None,
        n=len(values),
        n_configs=len(x),
        tau_rows=defined(kendall.tau_b(values, target)),
        spearman=defined(_scipy("spearmanr", x, y)),
        pearson=defined(_scipy("pearsonr", x, y)),
        partial=defined(partial),
        sign_flip=bool(tau * partial < 0) if math.isfinite(tau * partial) else None,
        psi=psi,
        psi_mean=psi_mean(psi),
        sign_error=sign_errors(pairs, values),
        crossfit=crossfit(configurations, x, y),
    )


def _resampled(
    configurations: Configurations,
    found: Mapping[str, MeasureCorrelation],
    measures: Mapping[str, Floats],
    target: Floats,
    request: Request,
) -> dict[str, MeasureCorrelation]:
    """Add the intervals, the p-value, and the seeds that an interval would need."""
    drawn = bootstrap.draw(len(configurations), request.bootstrap, request.seed)
    levels, few = configurations.levels[drawn.part], drawn.counts[:_SEED_RESAMPLES]
    y = configurations.means(target)[drawn.part]
    means = {name: configurations.means(values)[drawn.part] for name, values in measures.items()}
    given = [name for name, one in found.items() if one.partial is not None]
    partials = dict(
        zip(given, bootstrap_partial([means[name] for name in given], y, levels, drawn.counts), strict=True)
    )

    def spread(one: Floats, other: Floats) -> Floats:
        return kendall.bootstrap_tau(one[drawn.part], other[drawn.part], few)

    out = {}
    for name, one in found.items():
        if one.tau is not None:
            taus, centre = kendall.bootstrap_tau(means[name], y, drawn.counts), kendall.tau_b(means[name], y)
            low, high = bootstrap.interval(one.tau, taus, centre, drawn.shrink)
            p = bootstrap.p_value(one.tau, taus, centre, drawn.shrink)
            seeds = bootstrap.seeds_to_halve(configurations, measures[name], target, spread)
            one = dataclasses.replace(one, tau_low=low, tau_high=high, p=p, seeds_to_halve=seeds)
        if one.partial is not None:
            centre = one.partial if drawn.shrink == 1 else partial_rank(means[name], y, levels)
            low, high = bootstrap.interval(one.partial, partials[name], centre, drawn.shrink)
            one = dataclasses.replace(one, partial_low=low, partial_high=high)
        out[name] = one
    return out


def _notes(configurations: int, part: int, pairs: Sequence[Environments]) -> list[str]:
    notes = []
    if part < configurations:
        notes.append(f"intervals and cmi are from a random {part} of {configurations} configurations")
    notes += [f"sign errors of {one.axis} are of a random part of its environments" for one in pairs if one.sampled]
    return notes


def _scipy(name: str, x: Floats, y: Floats) -> float:
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return math.nan
    with warnings.catch_warnings():
        # a nearly constant measure is reported through the value itself, which the caller checks
        warnings.simplefilter("ignore")
        return float(getattr(stats, name)(x, y).statistic)


def defined(value: float) -> float | None:
    """Return a number, or None for one that is undefined.

    Args:
        value: A number, or NaN.
    """
    return value if math.isfinite(value) else None
