"""The spectral density of the Hessian D H D, and its share of negative curvature.

value = sum_{lambda < 0} |lambda| / sum |lambda|, between 0 (a minimum to second order) and 1 (a maximum),
dimensionless. The curve, of kind `hessian_density` in `spectra/`, is

    phi(x) = 1/d sum_i N(x; lambda_i, s^2),

with x in nats per squared unit of the metric and phi in its inverse, s a fraction of the spectrum's width. Its
integral (trapezoids over the points) is 1. A second curve, `part=stderr`, is its error at the same points: the standard
error over the probes, what half the Lanczos steps would have moved it by, and what spreading every node as wide as its
residual would. The share rests on 32 steps or more; where the budget allows fewer its error counts all that nodes may
hide on the other side of 0, which is many times too much as a rule, but known.

With few weights the eigenvalues are those of the dense matrix; otherwise they are the nodes of stochastic Lanczos
quadrature, the large ones known from a Krylov space without noise (`flatmin.sharpness.quadrature`). No basis larger
than the engine's memory is held, and a probe needs three vectors. Eigenvalues closer than the width of the spectrum
over the steps are not told apart; repeated nodes share the weight of one, so they draw no eigenvalue twice. Sources:
Ghorbani, Krishnan and Xiao 2019; Papyan 2018; Ubaru, Chen and Saad 2017. Bisla et al. 2022 carry the same procedure,
unused, on 10 000 points with s^2 = 1e-5 of the width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from flatmin.settings import Setting
from flatmin.sharpness.arguments import MaxSamples, MetricChoice
from flatmin.sharpness.dense import fits, spectrum
from flatmin.sharpness.engine import PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import FEWEST, Curve, Estimate, controlled_mean, exact
from flatmin.sharpness.metric import Metric
from flatmin.sharpness.quadrature import BIAS_SHARE, Nodes, Quadrature, shorter

_ROUND = 8
_ENOUGH_STEPS = 32
"""On ReLU networks (n = 2 of 400 and 1264 weights) 8 steps see no negative curvature, so that shorter runs agree."""

_BEYOND = 6.0
_POINTS_PER_WIDTH = 2
"""Points reach six standard deviations beyond the nodes, two in each: a sum over them is then the integral to 1e-8."""

REFUSES = {"subset": "few examples curve the loss downwards where all together do not, so the share is biased upwards"}
"""At a trained tanh network of 43 weights the interval of a subset of a quarter held the whole set's value in 34 of 100
draws: the share was 0.03 where that of all is 0.0003."""


def hessian_density(
    engine: Engine,
    *,
    metric: MetricChoice = "filter",
    broadening: Annotated[
        float,
        Setting(
            about="Standard deviation of the curve's Gaussians.", unit="fraction of the spectrum's width", gt=0, le=1
        ),
    ] = 0.01,
    share_tolerance: Annotated[
        float,
        Setting(
            about="Error of the share of negative curvature at which to stop.", unit="share of all curvature", gt=0
        ),
    ] = 0.02,
    max_samples: MaxSamples = 1024,
) -> Estimate:
    """Share of negative curvature in the Hessian's spectrum; the spectral density as a curve.

    `stderr` is the delta-method standard error of the ratio over the probes, with a bound on the quadrature's bias. A
    Hessian of zeros has no such share: the value is undefined.

    Args:
        engine: The models.
        metric: What scales the Hessian.
        broadening: Width of a Gaussian.
        share_tolerance: Error at which a model's sampling stops; absolute, because the share of a good minimum is
            near 0.
        max_samples: The most Hessian-vector products per model. With no more weights than this all eigenvalues are
            taken.
    """
    if engine.n_params <= max_samples and fits(engine):
        return _exact(engine, metric, broadening)
    rule = Quadrature(engine, metric, max_samples)
    steps = rule.steps(_negative, torch.abs, BIAS_SHARE * share_tolerance, least=_ENOUGH_STEPS)
    estimate, curves = _undefined(engine), [_Curve.undefined(broadening)] * len(engine)
    for number in sorted(set(steps.tolist())):
        chosen = steps == number
        own = _sampled(rule, number, chosen, share_tolerance)
        estimate = _merged(chosen.cpu(), own, estimate)
        rows = torch.nonzero(chosen).flatten().tolist()
        halves = _parts(rule, number // 2, own.samples, chosen) if number > 1 else [None] * len(rows)
        for k, whole, half in zip(rows, _parts(rule, number, own.samples, chosen), halves, strict=True):
            curves[k] = _curve(whole, half, broadening)
    samples = torch.tensor(
        [int(rule.products(n, count)) for n, count in zip(steps.tolist(), estimate.samples, strict=True)]
    )
    return replace(estimate, samples=samples, passes=PRODUCT_PASSES * samples.double(), curves=_Curve.of_all(curves))


def _negative(x: Tensor) -> Tensor:
    return (-x).clamp(min=0)


def _exact(engine: Engine, metric: Metric, broadening: float) -> Estimate:
    eigenvalues = spectrum(engine, metric)
    value = (_negative(eigenvalues).sum(dim=1) / eigenvalues.abs().sum(dim=1)).cpu()
    curves = [
        _curve(_Part(Nodes(row, torch.ones_like(row), torch.zeros_like(row)), None), None, broadening)
        for row in eigenvalues
    ]
    estimate = exact(value, passes=PRODUCT_PASSES * engine.n_params, samples=engine.n_params)
    return replace(estimate, curves=_Curve.of_all(curves))


def _sampled(rule: Quadrature, steps: int, chosen: Tensor, tolerance: float) -> Estimate:
    """Return the share of some models, bool `[K]`, by probes of so many steps; `samples` are probes."""
    found, active, done, most = _undefined(rule.engine), chosen.clone(), 0, rule.most_probes(steps)
    while done < most and bool(active.any()):
        done = min(most, done + (_ROUND if done >= FEWEST else FEWEST))
        share, error, hidden = _share(rule, steps, done, active)
        moved = [(share - _share(rule, number, done, active)[0]).abs() for number in shorter(steps) if number]
        if steps < _ENOUGH_STEPS:
            moved.append(hidden)
        error = (error.square() + torch.stack(moved).amax(dim=0).square()).sqrt()
        enough = (error <= tolerance) & (done >= FEWEST) & (steps > 1)
        count = torch.full_like(active, done, dtype=torch.int64)
        new = Estimate(share.cpu(), error.cpu(), count.cpu(), share.cpu(), enough.cpu())
        found = _merged(active.cpu(), new, found)
        active = active & ~enough & share.isfinite()
    return found


def _share(rule: Quadrature, steps: int, count: int, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the share of negative curvature, its standard error over probes, and what nodes may hide of it, `[K]`."""
    known, drawn = rule.known(steps), rule.probe(0, count, steps, active)
    negative, size = (known.sum(function) + drawn.sum(function) for function in (_negative, torch.abs))
    whole = size.mean(dim=0)
    share = negative.mean(dim=0) / whole
    hidden = (known.hidden() + drawn.hidden().mean(dim=0)) / whole
    return share, controlled_mean(negative - share * size, torch.zeros_like(size))[1] / whole, hidden


def _undefined(engine: Engine) -> Estimate:
    nan, zero = torch.full((len(engine),), torch.nan, dtype=torch.float64), torch.zeros(len(engine), dtype=torch.int64)
    return Estimate(nan, nan, zero, nan, zero.bool())


def _merged(chosen: Tensor, new: Estimate, old: Estimate) -> Estimate:
    return Estimate(
        torch.where(chosen, new.value, old.value),
        torch.where(chosen, new.stderr, old.stderr),
        torch.where(chosen, new.samples, old.samples),
        torch.where(chosen, new.passes, old.passes),
        torch.where(chosen, new.converged, old.converged),
    )


@dataclass(frozen=True)
class _Part:
    """One model's nodes: what is known `[q]`, and of probes `[S, n]`."""

    known: Nodes
    drawn: Nodes | None

    def density(self, x: Tensor, width: float, *, spread: bool = False) -> tuple[Tensor, Tensor]:
        """Return the density at points `[P]`, with nodes as wide as they are known if asked, and its standard error."""
        density, error = self._broadened(self.known, x, width, spread), torch.zeros_like(x)
        if self.drawn is not None:
            drawn = zip(self.drawn.at, self.drawn.weight, self.drawn.spread, strict=True)
            each = torch.stack([self._broadened(Nodes(*one), x, width, spread) for one in drawn])
            density = density + each.mean(dim=0)
            error = controlled_mean(each, torch.zeros_like(each))[1]
        whole = torch.trapezoid(density, x)
        return density / whole, error / whole

    @staticmethod
    def _broadened(nodes: Nodes, x: Tensor, width: float, spread: bool) -> Tensor:
        own = torch.full_like(nodes.at, width)
        if spread:
            own = (own.square() + nodes.spread.square()).sqrt()
        return torch.exp(-0.5 * ((x[:, None] - nodes.at) / own).square()) @ (nodes.weight / own)


@dataclass(frozen=True)
class _Curve:
    """One model's curve: points, density and its error, each `[P]`."""

    x: Tensor
    density: Tensor
    stderr: Tensor

    @staticmethod
    def undefined(broadening: float) -> _Curve:
        x = torch.linspace(0, 1, _points(broadening), dtype=torch.float64)
        return _Curve(x, torch.full_like(x, torch.nan), torch.full_like(x, torch.nan))

    @staticmethod
    def of_all(curves: Sequence[_Curve]) -> list[Curve]:
        x, density, stderr = (torch.stack([getattr(c, name) for c in curves]) for name in ("x", "density", "stderr"))
        return [
            Curve("hessian_density", x.cpu(), value.cpu(), settings={"part": part})
            for part, value in (("density", density), ("stderr", stderr))
        ]


def _parts(rule: Quadrature, steps: int, counts: Tensor, chosen: Tensor) -> list[_Part]:
    """Return the nodes of each chosen model, bool `[K]`, of its own number of probes, `[K]`."""
    known, drawn = rule.known(steps), rule.probe(0, int(counts.max()), steps, chosen)
    # every probe stands for as many eigenvalues as there are outside the known part, whatever its length
    left = (rule.engine.n_params - known.weight.sum(dim=1)).clamp(min=0)
    whole = drawn.weight.sum(dim=2)
    weight = torch.where(whole > 0, left / whole, 0.0)[..., None] * drawn.weight
    return [
        _Part(
            Nodes(known.at[k], known.weight[k], known.spread[k]),
            Nodes(*(part[: int(counts[k]), k] for part in (drawn.at, weight, drawn.spread))),
        )
        for k in torch.nonzero(chosen).flatten().tolist()
    ]


def _curve(whole: _Part, half: _Part | None, broadening: float) -> _Curve:
    """Return a model's curve; `half` is what half the Lanczos steps gave."""
    nodes = [whole.known.at] + ([] if whole.drawn is None else [whole.drawn.at.flatten()])
    low, high = torch.cat(nodes).min().item(), torch.cat(nodes).max().item()
    if not (math.isfinite(low) and math.isfinite(high)):
        return _Curve.undefined(broadening)
    width = broadening * ((high - low) or abs(high) or 1.0)
    x = torch.linspace(low - _BEYOND * width, high + _BEYOND * width, _points(broadening), dtype=torch.float64)
    x = x.to(whole.known.at.device)
    density, error = whole.density(x, width)
    others = [whole.density(x, width, spread=True)[0]] + ([] if half is None else [half.density(x, width)[0]])
    bias = torch.stack([(density - other).abs() for other in others]).amax(dim=0)
    return _Curve(x, density, (error.square() + bias.square()).sqrt())


def _points(broadening: float) -> int:
    return math.ceil(_POINTS_PER_WIDTH * (1 / broadening + 2 * _BEYOND)) + 1
