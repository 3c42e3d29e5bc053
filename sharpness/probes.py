"""Random probes of D H D: short Lanczos runs from vectors outside a Krylov space, shared by every measure.

Probe s starts at z = (I - Q Q^T) g with Rademacher g and the first vectors Q of the Krylov space. Its first step
gives z^T A z = |z|^2 alpha_1 and |A z|^2 = |z|^2 (alpha_1^2 + beta_1^2) for A = D H D, so one product serves the trace
and the Frobenius norm; n steps give Gauss' quadrature of z^T f(A) z with n nodes. A run holds three vectors, not
its basis: without reorthogonalisation Ritz values repeat, and the quadrature is as good (Chen, Trogdon and Ubaru 2021,
Analysis of stochastic Lanczos quadrature for spectrum approximation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import pad

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.jackknife import mean_of_first
from flatmin.sharpness.lanczos import krylov, krylov_capacity
from flatmin.sharpness.metric import Metric
from flatmin.sharpness.products import product

_EXHAUSTED = 1e-12
_DEFLATED_SHARE = 8
"""An eighth of the products goes to the Krylov space: on ReLU networks trained on noisy labels 16 vectors cut
the spread of a sample by 4 or more (n = 3 networks of 610 and 4810 weights); 32 halve it once more at twice
the price."""


@dataclass(frozen=True)
class Runs:
    """Lanczos runs of S probes of K models.

    Attributes:
        square: |z|^2, float64 `[S, K]`.
        alpha: Float64 `[S, K, n]`; 0 after a run's space became invariant.
        beta: The same, of which the last is the norm of what is left.
        along: q . A q of the first step's unit vector q, `[S, 1 + P, K]`: see `flatmin.sharpness.products`.
        further: |A q|^2 of the same.
    """

    square: Tensor
    alpha: Tensor
    beta: Tensor
    along: Tensor
    further: Tensor


class Probes:
    """The probes of K models outside the first vectors of their Krylov spaces, each run as far as it was asked for.

    Args:
        engine: The models.
        metric: The metric whose D H D is probed.
        length: How many vectors of the Krylov space, no more than its capacity.
    """

    def __init__(self, engine: Engine, metric: Metric, length: int) -> None:
        self.engine, self.length = engine, length
        self.spaces = krylov(engine, metric)
        self.spaces.grow(length, torch.ones(len(engine), dtype=torch.bool, device=engine.device))
        self._made: dict[int, tuple[Tensor, Runs]] = {}

    def runs(self, first: int, count: int, steps: int, active: Tensor) -> Runs:
        """Return probes `first .. first + count - 1` after a number of steps; those of other models may be anything.

        Args:
            first: The first probe's number.
            count: S.
            steps: Lanczos steps n of each, one product each.
            active: bool `[K]`, the models that need them.
        """
        parts = []
        for start, size in self.engine.portions(first, count):
            numbers = range(start, start + size)
            lacking = [active.to(self.engine.device) & (self._steps_of(number) < steps) for number in numbers]
            short = [number for number, own in zip(numbers, lacking, strict=True) if bool(own.any())]
            if short:
                self._run(range(short[0], short[-1] + 1), steps, torch.stack(lacking).any(dim=0))
            parts += [self._made[number][1] for number in numbers]
        alpha, beta = (torch.stack([_first(getattr(part, name)[0], steps) for part in parts]) for name in _LISTED)
        square, along, further = (torch.cat([getattr(part, name) for part in parts]) for name in _SINGLE)
        return Runs(square, alpha, beta, along, further)

    def mean_of_first(self, counts: Tensor, of: Callable[[Runs], Tensor]) -> Tensor:
        """Return the mean of |z|^2 times what first steps tell, over each model's first probes, `[1 + P, K]`.

        Args:
            counts: How many probes of each model, int64 `[K]`; of none the mean is NaN.
            of: What of them, `[S, 1 + P, K]`.
        """
        counts = counts.to(self.engine.device)
        if not bool(counts.any()):
            shape = 1 + self.engine.parts, len(counts)
            return torch.full(shape, torch.nan, dtype=torch.float64, device=counts.device)
        run = self.runs(0, int(counts.max()), 1, counts > 0)
        return mean_of_first(run.square[:, None] * of(run), counts)

    def _steps_of(self, number: int) -> Tensor:
        """Return how many steps of a probe are known, `[K]`."""
        if number not in self._made:
            return torch.zeros(len(self.engine), dtype=torch.int64, device=self.engine.device)
        return self._made[number][0]

    def _run(self, numbers: range, steps: int, lacking: Tensor) -> None:
        """Run some probes of some models from the start and keep what was found, one at a time."""
        new = self._lanczos(numbers, steps, lacking)
        for s, number in enumerate(numbers):
            one = Runs(*(getattr(new, field.name)[s : s + 1] for field in fields(Runs)))
            if number in self._made:
                old = self._made[number][1]
                width = max(steps, old.alpha.shape[-1])
                chosen = lacking[None, :, None]
                alpha, beta = (
                    torch.where(chosen, _first(getattr(one, name), width), _first(getattr(old, name), width))
                    for name in _LISTED
                )
                square, along, further = (
                    torch.where(lacking, getattr(one, name), getattr(old, name)) for name in _SINGLE
                )
                one = Runs(square, alpha, beta, along, further)
            self._made[number] = torch.where(lacking, steps, self._steps_of(number)), one

    def _lanczos(self, numbers: range, steps: int, lacking: Tensor) -> Runs:
        d = self.spaces.d
        drawn = self.engine.vectors("rademacher", "probe", numbers.start, len(numbers))
        z = self.spaces.deflate(drawn, self.length)
        square = z.square().sum(dim=2)
        used = lacking & (square != 0)
        q = torch.where(used[..., None], z / square.sqrt()[..., None], 0.0)
        before, beta, scale = torch.zeros_like(q), torch.zeros_like(square), torch.zeros_like(square)
        alphas, betas = [], []
        first = product(self.engine, d, q, lacking)
        for step in range(steps):
            z = first.of_all.clone() if step == 0 else d * self.engine.hvps(d * q, lacking) - beta[..., None] * before
            alpha = (q * z).sum(dim=2)
            z -= alpha[..., None] * q
            beta = z.norm(dim=2)
            scale = torch.maximum(scale, torch.maximum(alpha.abs(), beta))
            beta = torch.where(beta <= _EXHAUSTED * scale, 0.0, beta)
            alphas.append(alpha)
            betas.append(beta)
            before, q = q, torch.where((beta == 0)[..., None], 0.0, z / beta[..., None])
        return Runs(square, torch.stack(alphas, dim=2), torch.stack(betas, dim=2), first.along, first.square)


_LISTED, _SINGLE = ("alpha", "beta"), ("square", "along", "further")


def _first(coefficients: Tensor, steps: int) -> Tensor:
    """Return coefficients `[..., m]` of the first steps, filled up with zeros."""
    return pad(coefficients, (0, max(0, steps - coefficients.shape[-1])))[..., :steps]


def deflated(engine: Engine, max_samples: int) -> int:
    """Return how many Krylov vectors to look outside of when probes of one step may cost so many products in all."""
    return min(max_samples // _DEFLATED_SHARE, krylov_capacity(engine))


def probes_outside(engine: Engine, metric: Metric, length: int) -> Probes:
    """Return the engine's probes outside so many vectors of its Krylov spaces, the same ones for every measure."""
    made: Probes = engine.shared(("probes", metric, length), lambda: Probes(engine, metric, length))
    return made
