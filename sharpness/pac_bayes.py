"""The PAC-Bayes term of a Gaussian posterior that costs the training loss epsilon.

    value = |w - prior|_D^2 / (4 sigma^2) + ln(2 n / delta),  |v|_D^2 = sum (v_i / D_i)^2,

in nats, with n examples in the training set and sigma, in units of the metric, such that

    E_u[L(w + sigma D u)] - L(w) = epsilon,  u ~ N(0, I).

Source: Neyshabur, Bhojanapalli, McAllester and Srebro 2017 (with prior = 0 or the initial weights); Bisla et al.
2022, section 3: prior 0 on the balanced network, epsilon = 0.1, delta = 1e-6, 10 draws, fresh at each of about 27
bisections to a tolerance of 1e-6, which is below what 10 draws know. `pac_bayes(max_draws=10, tolerance=1e-6)` is
that, with the draws the same at every sigma, and says that it has not converged.

A weight with D = 0 is not displaced. With the prior at zero it lies at the prior and adds nothing; one that left the
initial weights for such a place is infinitely far from them, and the value is undefined. The posterior is scaled by
D, so balancing the network by hand changes nothing.

The expectation is a mean over antithetic pairs +-u, the same for every sigma, so that it is a smooth function of
sigma. A few pairs find sigma roughly: a geometric bracket and regula falsi in log sigma and log rise. All pairs are
then taken at that sigma_a, whose mean rise is R_a, and the first few also at sigma_b = sigma_a e^(+-0.1), on the root's
side, for the power p of sigma with which the rise grows there, R'_a and R'_b the means of those few:

    ln sigma = ln sigma_a + ln(epsilon / R_a) / p,    p = ln(R'_b / R'_a) / ln(sigma_b / sigma_a).

Its error is by the delta method (that of R_a / p, and that of p times the way gone, in quadrature). Draws stop when
what it makes of the value is within the tolerance, so the root is never sought more closely than the draws know it.
Where that would take long, the rises are compared with u^T D H D u / 2 within a Krylov space, whose mean is known: a
control variate, which on ReLU networks trained on noisy labels (n = 2 of 1482 weights) takes away 97 % of their
variance.

With strata (`flatmin.sharpness.smoothed`) each has pairs of its own, and the R are sums over strata; fewer pairs will
then do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from flatmin.settings import Setting
from flatmin.sharpness.arguments import Epsilon, MetricChoice, Tolerance
from flatmin.sharpness.engine import LOSS_PASSES, PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import FEWEST, Estimate, controlled_mean, fewest, stratified_mean
from flatmin.sharpness.lanczos import krylov, krylov_capacity
from flatmin.sharpness.metric import Metric
from flatmin.sharpness.smoothed import (
    curved_of_strata,
    displaced_by_stratum,
    losses_at_centre,
    losses_of_strata_at_centre,
    of_replicates,
)

_FIRST_SIGMA = 0.01
_ROUGH_PAIRS = 4
_MOST_TRIALS = 60
_CLOSE = 0.02
_STEP = 0.1
_FEWEST_STEPPED, _STEPPED_SHARE = 8, 4
"""A quarter of the pairs is taken a step away too, and 8 at least."""

_REACH = 0.15
"""A root up to so far from the middle in log sigma is read off the line; one farther away moves the middle there."""

_MOST_MOVES = 6
_LONGEST_STEP = math.log(64)
_SIGMAS = (1e-12, 1e6)
_ROUND = 8
_LENGTH, _LENGTH_OF_STRATA = 16, 8
_WORTHWHILE, _WORTHWHILE_OF_STRATA = 16, 8
"""Further pairs from which on a model takes the control variate, whose products `lambda_max` and `hessian_trace` need
too: their losses are half of what it costs."""


def pac_bayes(
    engine: Engine,
    *,
    prior: Annotated[
        Literal["zero", "initial"], Setting(about="Where the prior is centred: at zero, or at the initial weights.")
    ] = "zero",
    epsilon: Epsilon = 0.1,
    delta: Annotated[
        float, Setting(about="Probability with which a bound may fail.", unit="probability", gt=0, lt=1)
    ] = 1e-6,
    metric: MetricChoice = "filter",
    tolerance: Tolerance = 0.02,
    max_draws: Annotated[
        int, Setting(about="Most losses under noise of all examples, taken at every sigma that is tried.", ge=2)
    ] = 256,
) -> Estimate:
    """Complexity term of a PAC-Bayes bound whose posterior raises the training loss by epsilon.

    `samples` are draws, two to a pair, of every stratum its own. A mean loss that is not finite counts as too far.
    Where the rise never reaches epsilon for a sigma between 1e-12 and 1e6 the value is undefined. `data=test` changes
    the loss and with it n.

    Args:
        engine: The models.
        prior: The prior's mean.
        epsilon: The rise.
        delta: The bound's confidence.
        metric: What scales the noise and the distance.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_draws: The most losses of all examples per model and sigma, two to a pair.

    Raises:
        FlatminError: The initial weights are the prior and are not known.
    """
    square = _distance_squared(engine, metric, prior)
    constant = math.log(2 * engine.population / delta)
    search, most, models = _Search(_Rises(engine, metric), epsilon), max(1, max_draws // 2), len(engine)
    strata = max(1, engine.strata)
    least, more = fewest(FEWEST, strata), -(-_ROUND // strata)
    worthwhile = _WORTHWHILE_OF_STRATA if engine.strata else _WORTHWHILE
    middle = search.crossing(-(-_ROUGH_PAIRS // strata), square.isfinite())
    value, stderr = (torch.full((models,), torch.nan, dtype=torch.float64) for _ in range(2))
    pairs, converged = torch.zeros(models, dtype=torch.int64), torch.zeros(models, dtype=torch.bool)
    without = torch.full((engine.parts, models), torch.nan, dtype=torch.float64)
    active, count = middle.isfinite(), 0
    while count < most and bool(active.any()):
        count = min(most, count + (more if count >= least else least))
        root = search.root(middle, count, active)
        middle = root.middle
        norm = square / (4 * torch.exp(2 * root.log_sigma[0]))
        without = torch.where(active, square / (4 * torch.exp(2 * root.log_sigma[1:])) + constant, without)
        value = torch.where(active, norm + constant, value)
        stderr = torch.where(active, 2 * norm * root.stderr[0], stderr)
        pairs = torch.where(active, count, pairs)
        converged |= active & (count >= least) & (stderr <= tolerance * value.abs())
        active = active & ~converged & value.isfinite()
        needed = count * (stderr / (tolerance * value)).square()
        search.controlled |= active & (needed.clamp(max=most) - count > worthwhile)
    undefined = ~value.isfinite()
    return Estimate(
        value.masked_fill(undefined, torch.nan),
        stderr.masked_fill(undefined, torch.nan),
        2 * strata * pairs,
        search.passes(),
        converged,
        without=without if engine.parts else None,
        draws_in_parts=int(engine.strata > 0),
    )


def _distance_squared(engine: Engine, metric: Metric, prior: str) -> Tensor:
    """Return |w - prior|_D^2 on the CPU, `[K]`; infinite where a weight with D = 0 is not at the prior."""
    d, w = engine.scale(metric), engine.params.double()
    moved = w if prior == "zero" else w - engine.initial_weights().double()
    return torch.where(moved == 0, 0.0, moved / d).square().sum(dim=1).cpu()


class _Rises:
    """How much the loss of every model rises under antithetic pairs of displacements.

    They are `[n, R, K]`: of each of R strata that have pairs of their own, or where there are none of all examples and,
    of a subset, of all but each part.
    """

    def __init__(self, engine: Engine, metric: Metric) -> None:
        self.engine, self.metric, self.d = engine, metric, engine.scale(metric)
        self.length = min(_LENGTH_OF_STRATA if engine.strata else _LENGTH, krylov_capacity(engine))
        self.base = losses_at_centre(engine).cpu()
        """The losses at w, `[1 + P, K]`."""
        self._start = losses_of_strata_at_centre(engine).cpu() if engine.strata else self.base
        self.evaluations = torch.zeros(len(engine), dtype=torch.int64)
        """Losses taken of each model, `[K]`."""

    def at(self, log_sigma: Tensor, first: int, count: int, active: Tensor) -> Tensor:
        """Return the rises of pairs, float64 `[count, R, K]`, NaN for models that are not active, bool `[K]`.

        Args:
            log_sigma: `[K]`.
            first: The first pair's number.
            count: How many.
            active: The models.
        """
        sigma = torch.where(active, torch.exp(log_sigma), 0.0).to(self.engine.device)[:, None]
        both = self._both(sigma * self.d, first, count, active.to(self.engine.device))
        self.evaluations += 2 * count * active
        return (both[0] + both[1]).cpu() / 2 - self._start

    def _both(self, spread: Tensor, first: int, count: int, active: Tensor) -> Tensor:
        """Return the losses to both sides, `[2, count, R, K]`."""
        if self.engine.strata:
            return displaced_by_stratum(self.engine, spread, first, count, active, (1.0, -1.0))
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for start, size in self.engine.portions(first, count):
            u = spread * self.engine.vectors("normal", "perturbation", start, size)
            for side, way in zip(sides, (1, -1), strict=True):
                side.append(self.engine.replicates_at(way * u, active))
        return torch.stack([torch.cat(side) for side in sides])

    def curved(self, first: int, count: int, active: Tensor) -> Tensor:
        """Return u^T A u of pairs within the Krylov space of A = D H D, less its mean, `[count, R or 1, K]`."""
        if self.engine.strata:
            return curved_of_strata(self.engine, self.metric, self.length)(first, count, active).cpu()
        spaces = krylov(self.engine, self.metric)
        spaces.grow(self.length, active.to(self.engine.device))
        mean = spaces.trace(self.length)
        parts = [
            spaces.quadratic(self.engine.vectors("normal", "perturbation", start, size), self.length) - mean
            for start, size in self.engine.portions(first, count)
        ]
        return torch.cat(parts).cpu()[:, None]

    def mean(self, samples: Tensor, controls: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of samples `[n, R, K]` of all examples and, of a subset, of all but each part, and its error.

        Args:
            samples: Of pairs.
            controls: Their controls, `[n, R or 1, K]`.
        """
        if not self.engine.strata:
            return controlled_mean(samples, controls)
        of_strata, error = stratified_mean(samples, controls, self.engine.stratum_shares.cpu())
        mean = of_replicates(self.engine, of_strata)
        return mean, error.expand(mean.shape)


@dataclass(frozen=True)
class _Root:
    """Where the mean rise is epsilon.

    Attributes:
        log_sigma: Of all examples and, of a subset, of all but each part, `[1 + P, K]`; NaN where it was not found.
        stderr: Its standard error, `[1 + P, K]`; that of all examples in all rows where there are strata.
        middle: The log sigma about which the pairs were taken, `[K]`.
    """

    log_sigma: Tensor
    stderr: Tensor
    middle: Tensor


class _Search:
    """The search for the log sigma at which the mean rise of K models is epsilon."""

    def __init__(self, rises: _Rises, epsilon: float) -> None:
        self.rises, self.epsilon = rises, epsilon
        replicates, models = rises.base.shape
        rows = rises.engine.strata or replicates
        self._pairs = torch.zeros(0, rows, models, dtype=torch.float64)
        self._stepped, self._controls = self._pairs, self._pairs[:, : rises.engine.strata or 1]
        self._way = torch.ones(models, dtype=torch.float64)
        self._around = torch.full((models,), torch.nan, dtype=torch.float64)
        self.controlled = torch.zeros(models, dtype=torch.bool)
        """Models whose rises are compared with their control variates."""

    def passes(self) -> Tensor:
        """Return the passes over the examples so far, `[K]`."""
        products = torch.where(self.controlled, PRODUCT_PASSES * self.rises.length, 0.0)
        return LOSS_PASSES * (1 + self.rises.evaluations.double()) + products

    def crossing(self, pairs: int, active: Tensor) -> Tensor:
        """Return a log sigma near the root by the first so many pairs, `[K]`; NaN where there is none."""
        active = active & self.rises.base[0].isfinite()
        x = torch.full_like(self.rises.base[0], math.log(_FIRST_SIGMA))
        result = torch.full_like(x, torch.nan)
        low, high = torch.full_like(x, -math.inf), torch.full_like(x, math.inf)
        low_rise, high_rise = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
        for _ in range(_MOST_TRIALS):
            if not bool(active.any()):
                break
            rise = self._plain_mean(self.rises.at(x, 0, pairs, active))
            rise = torch.where(rise.isfinite(), rise, math.inf)
            ratio = torch.log(rise.clamp(min=0) / self.epsilon)
            above = active & (ratio >= 0)
            below = active & ~above
            high, high_rise = torch.where(above, x, high), torch.where(above, ratio, high_rise)
            low, low_rise = torch.where(below, x, low), torch.where(below, ratio, low_rise)
            proposal = _proposal(x, ratio, low, high, low_rise, high_rise)
            near = active & ((proposal - x).abs() <= _CLOSE) & ratio.isfinite()
            near |= active & (high - low <= _CLOSE) & high_rise.isfinite()
            result = torch.where(near, proposal, result)
            x = torch.where(active, proposal, x)
            beyond = (x < math.log(_SIGMAS[0])) | (x > math.log(_SIGMAS[1]))
            active = active & ~near & ~beyond
        return result

    def root(self, middle: Tensor, count: int, active: Tensor) -> _Root:
        """Return the root by the first `count` pairs, taken about `middle` or about where that leads to.

        Where the line leads nowhere, because a few pairs misjudged a curved rise, all pairs find the middle anew.
        """
        log_sigma, stderr = (torch.full_like(self.rises.base, torch.nan) for _ in range(2))
        for _ in range(_MOST_MOVES):
            if not bool(active.any()):
                break
            self._take(middle, count, active)
            x, error = self._on_line(middle, count)
            offset = x[0] - middle
            inside = active & (offset.abs() <= _REACH)
            log_sigma, stderr = torch.where(inside, x, log_sigma), torch.where(inside, error, stderr)
            active = active & ~inside
            lost = active & ~(offset.abs() <= 1)
            middle = torch.where(active & ~lost, x[0], middle)
            if bool(lost.any()):
                middle = torch.where(lost, self.crossing(count, lost), middle)
                active = active & middle.isfinite()
        return _Root(log_sigma, stderr, middle)

    def _take(self, middle: Tensor, count: int, active: Tensor) -> None:
        """See that the first `count` pairs of active models are taken at `middle`, and the first few a step away."""
        moved = active & (self._around != middle)
        staying = active & ~moved
        taken, stepped = len(self._pairs), len(self._stepped)
        self._pairs = self._with(self._pairs, middle, 0, count, moved)
        if bool(moved.any()):
            below = self._plain_mean(self._pairs) < self.epsilon
            self._way = torch.where(moved, torch.where(below, 1.0, -1.0), self._way)
        self._pairs = self._with(self._pairs, middle, taken, count, staying)
        away, few = middle + self._way * _STEP, self._stepped_of(count)
        self._stepped = self._with(self._stepped, away, 0, few, moved)
        self._stepped = self._with(self._stepped, away, stepped, few, staying)
        self._around = torch.where(active, middle, self._around)

    def _with(self, pairs: Tensor, log_sigma: Tensor, first: int, count: int, rows: Tensor) -> Tensor:
        """Return pairs `[n, 1 + P, K]` with those from `first` up to `count` taken at `log_sigma` for some models."""
        missing = count - len(pairs)
        if missing > 0:
            pairs = torch.cat([pairs, pairs.new_full((missing, *pairs.shape[1:]), torch.nan)])
        if first < count and bool(rows.any()):
            new = self.rises.at(log_sigma, first, count - first, rows)
            pairs[first:count] = torch.where(rows, new, pairs[first:count])
        return pairs

    def _plain_mean(self, pairs: Tensor) -> Tensor:
        """Return the mean rise of all examples, `[K]`, without controls."""
        return self.rises.mean(pairs, torch.zeros_like(pairs[:, :1]))[0][0]

    def _stepped_of(self, count: int) -> int:
        """Return how many of the first `count` pairs are taken a step away too."""
        least = fewest(_FEWEST_STEPPED, max(1, self.rises.engine.strata))
        return min(count, max(least, count // _STEPPED_SHARE))

    def _controls_of(self, count: int) -> Tensor:
        """Return the control of each pair, `[count, R or 1, K]`, 0 for models that are not controlled."""
        if bool(self.controlled.any()) and len(self._controls) < count:
            first = len(self._controls)
            more = self.rises.curved(first, count - first, self.controlled)
            self._controls = torch.cat([self._controls, torch.where(self.controlled, more, 0.0)])
        return self._controls if bool(self.controlled.any()) else torch.zeros_like(self._pairs[:count, :1])

    def _on_line(self, middle: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the root by the first `count` pairs, `[1 + P, K]`, and its standard error."""
        pairs, controls, few = self._pairs[:count], self._controls_of(count), self._stepped_of(count)
        rise, error = self.rises.mean(pairs, controls)
        near, far = (side[:few] for side in (pairs, self._stepped))
        near_rise, far_rise = (self.rises.mean(side, controls[:few])[0] for side in (near, far))
        step = self._way * _STEP
        power = torch.log(far_rise / near_rise) / step
        # Strata are weighed against the rise of all, replicates each against its own.
        one = slice(1 if self.rises.engine.strata else None)
        power_error = self.rises.mean(far / far_rise[one] - near / near_rise[one], controls[:few])[1] / _STEP
        offset = torch.log(self.epsilon / rise) / power
        stderr = ((error / rise).square() + (offset * power_error).square()).sqrt() / power
        sound = (rise > 0) & (near_rise > 0) & (far_rise > 0) & (power > 0)
        return torch.where(sound, middle + offset, torch.nan), torch.where(sound, stderr, torch.nan)


def _proposal(x: Tensor, ratio: Tensor, low: Tensor, high: Tensor, low_rise: Tensor, high_rise: Tensor) -> Tensor:
    """Return the next log sigma to try, `[K]`; `ratio` is ln(rise / epsilon) at x, the rest the bracket so far."""
    by_power = (-ratio / 2).nan_to_num(nan=0.0, posinf=_LONGEST_STEP / 2, neginf=-_LONGEST_STEP / 2)
    outward = x + by_power.clamp(-_LONGEST_STEP, _LONGEST_STEP)
    share = low_rise / (low_rise - high_rise)
    inward = low + (high - low) * torch.where(share.isfinite(), share.clamp(0.02, 0.98), 0.5)
    return torch.where(low.isfinite() & high.isfinite(), inward, outward)
