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
then taken at sigma e^-h and sigma e^h, and ln sigma is read off the line through both mean rises R,

    x = a + t (b - a),  t = ln(epsilon / R_a) / ln(R_b / R_a),

which is exact for a power of sigma, h = 0.05. The delta method, with p = ln(R_b / R_a) / (b - a), makes the error of
x that of the mean of ((1 - t) r_a / R_a + t r_b / R_b) / p over pairs; draws stop when what that makes of the value
is within the tolerance, so the root is never sought more closely than the draws know it. Where that would take long,
the rises are compared with u^T D H D u / 2 within a Krylov space, whose mean is known: a control variate, which on
ReLU networks trained on noisy labels (n = 2 of 1482 weights) takes away 97 % of their variance.
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
from flatmin.sharpness.estimate import FEWEST, Estimate, controlled_mean
from flatmin.sharpness.lanczos import krylov, krylov_capacity
from flatmin.sharpness.metric import Metric

_FIRST_SIGMA = 0.01
_ROUGH_PAIRS = 4
_MOST_TRIALS = 60
_CLOSE = 0.02
_HALF_WIDTH = 0.05
_REACH = 3.0
"""A root up to so many half widths from the middle is read off the line; one farther away moves the middle there."""

_MOST_MOVES = 6
_LONGEST_STEP = math.log(64)
_SIGMAS = (1e-12, 1e6)
_ROUND = 8
_LENGTH = 16
_WORTHWHILE = 16
"""Further pairs from which on a model takes the control variate: four losses each, as a product costs."""


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
        int, Setting(about="Most draws of the noise, each taken at every sigma that is tried.", ge=2)
    ] = 256,
) -> Estimate:
    """Complexity term of a PAC-Bayes bound whose posterior raises the training loss by epsilon.

    `samples` are draws, two to a pair. A mean loss that is not finite counts as too far. Where the rise never reaches
    epsilon for a sigma between 1e-12 and 1e6 the value is undefined. `data=test` changes the loss and with it n.

    Args:
        engine: The models.
        prior: The prior's mean.
        epsilon: The rise.
        delta: The bound's confidence.
        metric: What scales the noise and the distance.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_draws: The most draws per model, of which pairs are made.

    Raises:
        FlatminError: The initial weights are the prior and are not known.
    """
    square = _distance_squared(engine, metric, prior)
    constant = math.log(2 * engine.population / delta)
    search, most, models = _Search(_Rises(engine, metric), epsilon), max(1, max_draws // 2), len(engine)
    middle = search.crossing(_ROUGH_PAIRS, square.isfinite())
    value, stderr = (torch.full((models,), torch.nan, dtype=torch.float64) for _ in range(2))
    pairs, converged = torch.zeros(models, dtype=torch.int64), torch.zeros(models, dtype=torch.bool)
    active, count = middle.isfinite(), 0
    while count < most and bool(active.any()):
        count = min(most, count + (_ROUND if count >= FEWEST else FEWEST))
        root = search.root(middle, count, active)
        middle = root.middle
        norm = square / (4 * torch.exp(2 * root.log_sigma))
        value = torch.where(active, norm + constant, value)
        stderr = torch.where(active, 2 * norm * root.stderr, stderr)
        pairs = torch.where(active, count, pairs)
        converged |= active & (count >= FEWEST) & (stderr <= tolerance * value.abs())
        active = active & ~converged & value.isfinite()
        if count == FEWEST:
            needed = count * (stderr / (tolerance * value)).square()
            search.controlled = active & (needed.clamp(max=most) - count > _WORTHWHILE)
    undefined = ~value.isfinite()
    return Estimate(
        value.masked_fill(undefined, torch.nan),
        stderr.masked_fill(undefined, torch.nan),
        2 * pairs,
        search.passes(),
        converged,
    )


def _distance_squared(engine: Engine, metric: Metric, prior: str) -> Tensor:
    """Return |w - prior|_D^2 on the CPU, `[K]`; infinite where a weight with D = 0 is not at the prior."""
    d, w = engine.scale(metric), engine.params.double()
    moved = w if prior == "zero" else w - engine.initial_weights().double()
    return torch.where(moved == 0, 0.0, moved / d).square().sum(dim=1).cpu()


class _Rises:
    """How much the loss of every model rises under antithetic pairs of displacements."""

    def __init__(self, engine: Engine, metric: Metric) -> None:
        self.engine, self.metric, self.d = engine, metric, engine.scale(metric)
        self.length = min(_LENGTH, krylov_capacity(engine))
        self.base = engine.losses().cpu()
        self.evaluations = torch.zeros(len(engine), dtype=torch.int64)
        """Losses taken of each model, `[K]`."""

    def at(self, log_sigma: Tensor, first: int, count: int, active: Tensor) -> Tensor:
        """Return the rises of pairs, float64 `[count, K]`, NaN for models that are not active, bool `[K]`.

        Args:
            log_sigma: `[K]`.
            first: The first pair's number.
            count: How many.
            active: The models.
        """
        device = self.engine.device
        sigma = torch.where(active, torch.exp(log_sigma), 0.0).to(device)[:, None]
        parts = []
        for start, size in self.engine.portions(first, count):
            u = sigma * self.d * self.engine.vectors("normal", "perturbation", start, size)
            both = [self.engine.losses_at(way * u, active.to(device)) for way in (1, -1)]
            parts.append((both[0] + both[1]).cpu() / 2 - self.base)
        self.evaluations += 2 * count * active
        return torch.cat(parts)

    def curved(self, first: int, count: int, active: Tensor) -> Tensor:
        """Return u^T A u of pairs within the Krylov space of A = D H D, less its mean, `[count, K]`, as `at` does."""
        spaces = krylov(self.engine, self.metric)
        spaces.grow(self.length, active.to(self.engine.device))
        mean = spaces.trace(self.length)
        parts = [
            spaces.quadratic(self.engine.vectors("normal", "perturbation", start, size), self.length) - mean
            for start, size in self.engine.portions(first, count)
        ]
        return torch.cat(parts).cpu()


@dataclass(frozen=True)
class _Root:
    """Where the mean rise is epsilon.

    Attributes:
        log_sigma: `[K]`; NaN where it was not found.
        stderr: Its standard error, `[K]`.
        middle: The log sigma about which the pairs were taken, `[K]`.
    """

    log_sigma: Tensor
    stderr: Tensor
    middle: Tensor


class _Search:
    """The search for the log sigma at which the mean rise of K models is epsilon."""

    def __init__(self, rises: _Rises, epsilon: float) -> None:
        self.rises, self.epsilon = rises, epsilon
        models = len(rises.base)
        self._pairs = torch.zeros(2, 0, models, dtype=torch.float64)
        self._around = torch.full((models,), torch.nan, dtype=torch.float64)
        self._controls = torch.zeros(0, models, dtype=torch.float64)
        self.controlled = torch.zeros(models, dtype=torch.bool)
        """Models whose rises are compared with their control variates."""

    def passes(self) -> Tensor:
        """Return the passes over the examples so far, `[K]`."""
        products = torch.where(self.controlled, PRODUCT_PASSES * self.rises.length, 0.0)
        return LOSS_PASSES * (1 + self.rises.evaluations.double()) + products

    def crossing(self, pairs: int, active: Tensor) -> Tensor:
        """Return a log sigma near the root by the first so many pairs, `[K]`; NaN where there is none."""
        active = active & self.rises.base.isfinite()
        x = torch.full_like(self.rises.base, math.log(_FIRST_SIGMA))
        result = torch.full_like(x, torch.nan)
        low, high = torch.full_like(x, -math.inf), torch.full_like(x, math.inf)
        low_rise, high_rise = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
        for _ in range(_MOST_TRIALS):
            if not bool(active.any()):
                break
            rise = self.rises.at(x, 0, pairs, active).mean(dim=0)
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
        log_sigma, stderr = (torch.full_like(middle, torch.nan) for _ in range(2))
        for _ in range(_MOST_MOVES):
            if not bool(active.any()):
                break
            self._take(middle, count, active)
            x, error = _on_line(self._pairs[:, :count], self._controls_of(count), middle, self.epsilon)
            offset = x - middle
            inside = active & (offset.abs() <= _REACH * _HALF_WIDTH)
            log_sigma, stderr = torch.where(inside, x, log_sigma), torch.where(inside, error, stderr)
            active = active & ~inside
            lost = active & ~(offset.abs() <= 1)
            middle = torch.where(active & ~lost, x, middle)
            if bool(lost.any()):
                middle = torch.where(lost, self.crossing(count, lost), middle)
                active = active & middle.isfinite()
        return _Root(log_sigma, stderr, middle)

    def _take(self, middle: Tensor, count: int, active: Tensor) -> None:
        """See that the first `count` pairs of active models are taken on both sides of `middle`."""
        missing = count - self._pairs.shape[1]
        if missing > 0:
            more = self._pairs.new_full((2, missing, len(middle)), torch.nan)
            self._pairs = torch.cat([self._pairs, more], dim=1)
        moved = active & (self._around != middle)
        if bool(moved.any()):
            self._fill(middle, 0, count, moved)
        staying = active & ~moved
        if missing > 0 and bool(staying.any()):
            self._fill(middle, count - missing, missing, staying)
        self._around = torch.where(active, middle, self._around)

    def _controls_of(self, count: int) -> Tensor:
        """Return the control of each pair, `[count, K]`, 0 for models that are not controlled."""
        if bool(self.controlled.any()) and len(self._controls) < count:
            first = len(self._controls)
            more = self.rises.curved(first, count - first, self.controlled)
            self._controls = torch.cat([self._controls, torch.where(self.controlled, more, 0.0)])
        return self._controls if bool(self.controlled.any()) else torch.zeros_like(self._pairs[0, :count])

    def _fill(self, middle: Tensor, first: int, count: int, rows: Tensor) -> None:
        for side, way in enumerate((-1, 1)):
            new = self.rises.at(middle + way * _HALF_WIDTH, first, count, rows)
            place = self._pairs[side, first : first + count]
            self._pairs[side, first : first + count] = torch.where(rows, new, place)


def _proposal(x: Tensor, ratio: Tensor, low: Tensor, high: Tensor, low_rise: Tensor, high_rise: Tensor) -> Tensor:
    """Return the next log sigma to try, `[K]`; `ratio` is ln(rise / epsilon) at x, the rest the bracket so far."""
    by_power = (-ratio / 2).nan_to_num(nan=0.0, posinf=_LONGEST_STEP / 2, neginf=-_LONGEST_STEP / 2)
    outward = x + by_power.clamp(-_LONGEST_STEP, _LONGEST_STEP)
    share = low_rise / (low_rise - high_rise)
    inward = low + (high - low) * torch.where(share.isfinite(), share.clamp(0.02, 0.98), 0.5)
    return torch.where(low.isfinite() & high.isfinite(), inward, outward)


def _on_line(pairs: Tensor, controls: Tensor, middle: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return the root on the line through the mean rises, `[K]`, and its standard error.

    Args:
        pairs: The rises on both sides of the middle, `[2, n, K]`.
        controls: What they are compared with, of mean zero, `[n, K]`.
        middle: `[K]`.
        epsilon: The rise at the root.
    """
    below, above = (controlled_mean(side, controls)[0] for side in pairs)
    width = 2 * _HALF_WIDTH
    power = torch.log(above / below) / width
    t = torch.log(epsilon / below) / (power * width)
    error = controlled_mean((1 - t) * pairs[0] / below + t * pairs[1] / above, controls)[1] / power
    sound = (below > 0) & (above > 0) & (power > 0)
    return torch.where(sound, middle - _HALF_WIDTH + t * width, torch.nan), torch.where(sound, error, torch.nan)
