"""Sums over the eigenvalues of D H D, sum f(lambda), by stochastic Lanczos quadrature beside a Krylov space.

With Q the first q vectors of a Krylov space that has n more, T its tridiagonal matrix, and z_s probes outside Q,

    tr f(A) = sum_{j <= q} f(T)_jj + E[z^T f(A) z],  z^T f(A) z = |z|^2 sum_i tau_i^2 f(theta_i),

where (theta_i, tau_i) are the Ritz values of n Lanczos steps from z and the first entries of their eigenvectors. So a
sum over eigenvalues is a sum over nodes with weights, and what is large is known without noise. Sources: Ubaru, Chen
and Saad 2017 (stochastic Lanczos quadrature); Chen and Hallman 2023, Krylov-aware stochastic trace estimation.

Both parts are biased by having n steps only. The bias falls at least like 1 / n for a function with kinks
(geometrically for a smooth one), so what n / 2 steps give differs from what n give by no less than what n lack; but it
falls in waves, so the largest of the differences from n / 2, 5 n / 8, 3 n / 4 and 7 n / 8 steps is taken for a bound.
All of them are parts of the same runs. Of few steps they say nothing of eigenvalues just beyond a kink at 0 that no
run has told from those before it. The Ritz pairs do, if too much: an eigenvalue drawn from a Ritz vector's spectrum has
the mean theta_i and, as its standard deviation, the residual r_i. Of all distributions with these, that with the most
beyond 0 has

    (sqrt(theta_i^2 + r_i^2) - |theta_i|) / 2

there on average (Scarf 1958), and so much of every node may be hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flatmin.sharpness.engine import PRODUCT_PASSES, Engine
from flatmin.sharpness.estimate import FEWEST, Estimate, sample_mean
from flatmin.sharpness.lanczos import krylov_capacity, ritz
from flatmin.sharpness.metric import Metric
from flatmin.sharpness.probes import probes_outside

_FIRST_STEPS = 8
_DEFLATED_SHARE = 16
"""A sixteenth of the products goes to the Krylov space: of 512 products 32, which on ReLU networks trained on noisy
labels (n = 2 of 1482 weights) halve the spread of a probe; 16 more of them gained less than they cost."""

BIAS_SHARE = 0.5
"""How much of the tolerance the quadrature may take, so that an interval rests on the sampling."""


def shorter(steps: int) -> list[int]:
    """Return the numbers of steps that one is compared with; 0 alone where there are none.

    >>> shorter(16), shorter(1)
    ([8, 10, 12, 14], [0])
    """
    return sorted({steps * eighths // 8 for eighths in (4, 5, 6, 7)})


@dataclass(frozen=True)
class Nodes:
    """What a sum over eigenvalues is taken at.

    Attributes:
        at: Float64 `[..., n]`.
        weight: How many eigenvalues each stands for, `[..., n]`.
        spread: Standard deviation of what each stands for, `[..., n]`: the residual of its Ritz vector.
    """

    at: Tensor
    weight: Tensor
    spread: Tensor

    def sum(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the sum of a function over the nodes, `[...]`."""
        return (self.weight * function(self.at)).sum(dim=-1)

    def hidden(self) -> Tensor:
        """Return how much of the nodes may lie on the other side of 0 at most, `[...]`."""
        beyond = (self.at.square() + self.spread.square()).sqrt() - self.at.abs()
        return (self.weight * beyond).sum(dim=-1) / 2


class Quadrature:
    """The nodes of K models' Hessians for a budget of Hessian-vector products.

    Args:
        engine: The models.
        metric: The metric of D.
        max_samples: The most products per model. The Krylov space's share of them is bounded by the engine's memory
            too; probes need no memory to speak of.
    """

    def __init__(self, engine: Engine, metric: Metric, max_samples: int) -> None:
        self.engine, self.max_samples = engine, max_samples
        capacity = krylov_capacity(engine)
        self.length = min(max_samples // _DEFLATED_SHARE, capacity // 2)
        self._probes = probes_outside(engine, metric, self.length)
        self._capacity = capacity

    def known(self, steps: int) -> Nodes:
        """Return the nodes `[K, q + steps]` of the part within the Krylov space."""
        spaces, size = self._probes.spaces, self._known_steps(steps)
        spaces.grow(size, torch.ones_like(spaces.ended))
        alpha, beta = spaces.coefficients(size)
        theta, s = ritz(alpha, beta)
        own = torch.arange(size, device=theta.device) < spaces.lengths.clamp(max=self.length)[:, None]
        return Nodes(theta, (s.square() * own[..., None]).sum(dim=1), beta[:, -1:] * s[:, -1].abs())

    def probe(self, first: int, count: int, steps: int, active: Tensor) -> Nodes:
        """Return the nodes `[count, K, steps]` of probes; those of models that are not active may be anything."""
        runs = self._probes.runs(first, count, steps, active)
        theta, s = ritz(runs.alpha, runs.beta)
        weight = runs.square[..., None] * s[..., 0, :].square()
        return Nodes(theta, weight, runs.beta[..., -1:] * s[..., -1, :].abs())

    def steps(
        self,
        function: Callable[[Tensor], Tensor],
        size: Callable[[Tensor], Tensor],
        share: float,
        *,
        least: int = 0,
    ) -> Tensor:
        """Return how many steps each model needs, int64 `[K]`, as many as the budget allows where none are enough.

        Args:
            function: What is summed.
            size: What its size is compared with the sum of.
            share: The greatest bias that is allowed, as a share of that sum; tried on one probe.
            least: Steps that are taken at least where the budget allows as many.
        """
        ladder = self._ladder()
        ladder = [steps for steps in ladder if steps >= least] or ladder[-1:]
        chosen = torch.full((len(self.engine),), ladder[0], device=self.engine.device)
        active = torch.ones_like(chosen, dtype=torch.bool)
        for steps in ladder:
            chosen = torch.where(active, steps, chosen)
            known, one = self.known(steps), self.probe(0, 1, steps, active)
            bound = self.bias(function, steps, 0, 1, active)
            reference = known.sum(size) + one.sum(size)[0]
            active = active & ~(bound <= share * reference.abs()) & reference.isfinite()
            if not bool(active.any()):
                break
        return chosen

    def bias(self, function: Callable[[Tensor], Tensor], steps: int, first: int, count: int, active: Tensor) -> Tensor:
        """Return the bound on the bias of the mean over probes, `[K]`; one step has none but the sum itself."""

        def mean(number: int) -> Tensor:
            return self.known(number).sum(function) + self.probe(first, count, number, active).sum(function).mean(dim=0)

        whole = mean(steps)
        return torch.stack([whole - mean(number) if number else whole for number in shorter(steps)]).abs().amax(dim=0)

    def most_probes(self, steps: int) -> int:
        """Return how many probes of so many steps the budget allows, at least one."""
        return max(1, (self.max_samples - self._beside(steps)) // steps)

    def products(self, steps: int, count: Tensor) -> Tensor:
        """Return how many products a number of probes has cost, int64 as `count`."""
        return self._beside(steps) + count * steps

    def _known_steps(self, steps: int) -> int:
        return min(self.length + steps, self._capacity)

    def _beside(self, steps: int) -> int:
        """Return the products that are not probes of so many steps: the Krylov space's, and shorter first runs."""
        return self._known_steps(steps) + max(0, steps - _FIRST_STEPS)

    def _ladder(self) -> list[int]:
        """Return how many steps the budget allows, each number twice the one before."""
        rungs, steps = [], _FIRST_STEPS
        while self._beside(steps) + FEWEST * steps <= self.max_samples:
            rungs.append(steps)
            steps *= 2
        return rungs or [max(1, (self.max_samples - self.length) // (FEWEST + 2))]


def spectral_sum(
    engine: Engine, metric: Metric, function: Callable[[Tensor], Tensor], *, tolerance: float, max_samples: int
) -> Estimate:
    """Return the sum of a function over the eigenvalues of D H D by quadrature.

    `stderr` holds the standard error over probes and the bound on the quadrature's bias; a model converges when it is
    within the tolerance and the bound is within it.

    Args:
        engine: The models.
        metric: The metric of D.
        function: Of eigenvalues, of any shape.
        tolerance: The error at which to stop, as a fraction of the value.
        max_samples: The most Hessian-vector products per model.
    """
    rule = Quadrature(engine, metric, max_samples)
    share = BIAS_SHARE * tolerance
    steps = rule.steps(function, function, share)
    models = len(engine)
    value, stderr = (torch.full((models,), torch.nan, dtype=torch.float64) for _ in range(2))
    samples, converged = torch.zeros(models, dtype=torch.int64), torch.zeros(models, dtype=torch.bool)
    for number in sorted(set(steps.tolist())):
        chosen = steps == number
        known = rule.known(number).sum(function)

        def draw(first: int, count: int, active: Tensor, number: int = number) -> Tensor:
            return rule.probe(first, count, number, active).sum(function)

        mean = sample_mean(
            draw,
            models,
            tolerance=tolerance,
            max_samples=rule.most_probes(number),
            offset=torch.where(chosen, known, torch.nan),
        )
        own = chosen.cpu()
        bias = rule.bias(function, number, 0, min(FEWEST, rule.most_probes(number)), chosen).cpu()
        error = (mean.stderr.square() + bias.square()).sqrt()
        value, stderr = torch.where(own, mean.value, value), torch.where(own, error, stderr)
        samples = torch.where(own, rule.products(number, mean.samples), samples)
        enough = mean.converged & (bias <= tolerance * mean.value.abs())
        converged |= own & enough
    return Estimate(value, stderr, samples, PRODUCT_PASSES * samples.double(), converged)
