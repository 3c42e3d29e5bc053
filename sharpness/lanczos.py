"""Lanczos' tridiagonalisation of D H D, one Krylov space per model, kept for every measure that needs it.

q_1 random;  z = D H D q_j;  alpha_j = q_j . z;  z is made orthogonal to all q, twice;  beta_j = |z|;
q_{j+1} = z / beta_j. Then Q^T D H D Q = T is tridiagonal, and a Ritz pair T s = theta s has the residual
beta_m |s_m|: some eigenvalue lies within that of theta. Source: Lanczos 1950; Parlett, The Symmetric
Eigenvalue Problem, 1980 (full reorthogonalisation, residual bounds).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.metric import Metric
from flatmin.sharpness.products import product

_BLOCK = 8
_EXHAUSTED = 1e-12
_ROUND = 8
"""Steps between two looks at eigenvectors."""


class Krylov:
    """The Krylov spaces of K models, each grown as far as it was asked for.

    Args:
        engine: The models.
        metric: The metric whose D H D is tridiagonalised.
        start: The number of the random start vector.
    """

    def __init__(self, engine: Engine, metric: Metric, start: int = 0) -> None:
        self.engine = engine
        self.d = engine.scale(metric)
        models, device = len(engine), engine.device
        self.capacity = krylov_capacity(engine)
        """The most vectors per model that fit in the engine's memory."""
        self.lengths = torch.zeros(models, dtype=torch.int64, device=device)
        """How many vectors each model has, `[K]`."""
        self.ended = torch.zeros(models, dtype=torch.bool, device=device)
        """Models whose space cannot grow: it is invariant, or something was not finite; `[K]`."""
        self.alpha = torch.zeros(models, 0, dtype=torch.float64, device=device)
        self.beta = self.alpha
        self._along = self._square = torch.zeros(1 + engine.parts, models, 0, dtype=torch.float64, device=device)
        self._blocks: list[Tensor] = []
        first = engine.vectors("normal", "lanczos", start, 1)[0]
        self._next = first / first.norm(dim=1, keepdim=True)

    def grow(self, length: int, active: Tensor) -> None:
        """Grow the spaces of active models, bool `[K]`, to a length that `capacity` allows."""
        while True:
            growing = active & (self.lengths < length) & ~self.ended
            if not bool(growing.any()):
                return
            self._step(growing)

    def top(self, length: int, active: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest Ritz value and its residual bound, float64 `[K]`, in spaces of a length.

        A space that ended earlier is taken as it is. Models that are not active, bool `[K]`, or whose numbers
        are not finite get NaN.
        """
        value, residual = (torch.full_like(self.d[:, 0], torch.nan) for _ in range(2))
        own = self.lengths.clamp(max=length)
        sound = active & (own > 0) & self.alpha.isfinite().all(dim=1) & self.beta.isfinite().all(dim=1)
        for size in sorted(set(own[sound].tolist())):
            rows = torch.nonzero(sound & (own == size)).flatten()
            alpha, beta = self.alpha[rows, :size], self.beta[rows, :size]
            theta, s = ritz(alpha, beta)
            value[rows], residual[rows] = theta[:, -1], beta[:, -1] * s[:, -1, -1].abs()
        return value, residual

    def leading(self, length: int, count: int, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest Ritz values and their residual bounds `[count, K]`, and unit vectors `[count, K, d]`.

        As in `top`; the vectors are those of D H D, largest value first, each with a positive largest component. A
        space that is too short for a value has 0 and a vector of zeros there.
        """
        value, residual = (torch.full((count, len(self.d)), torch.nan).to(self.d) for _ in range(2))
        vectors = torch.zeros(count, *self.d.shape).to(self.d)
        own = self.lengths.clamp(max=length)
        sound = active & (own > 0) & self.alpha.isfinite().all(dim=1) & self.beta.isfinite().all(dim=1)
        for size in sorted(set(own[sound].tolist())):
            rows, number = torch.nonzero(sound & (own == size)).flatten(), min(count, size)
            alpha, beta = self.alpha[rows, :size], self.beta[rows, :size]
            theta, s = (part.flip(-1)[..., :number] for part in ritz(alpha, beta))
            value[:, rows], residual[:, rows] = 0.0, 0.0
            value[:number, rows], residual[:number, rows] = theta.T, (beta[:, -1:] * s[:, -1].abs()).T
            for first, block in zip(range(0, size, _BLOCK), self._blocks, strict=False):
                q = block[rows, : size - first]
                part = torch.einsum("kms,kmd->skd", s[:, first : first + q.shape[1]], q)
                vectors[:number, rows] += part
        biggest = vectors.gather(2, vectors.abs().argmax(dim=2, keepdim=True))
        return value, residual, torch.where(biggest < 0, -vectors, vectors)

    def coefficients(self, length: int) -> tuple[Tensor, Tensor]:
        """Return alpha and beta of the first `length` vectors, float64 `[K, length]`; 0 where a space ended earlier."""
        missing = max(0, length - self.alpha.shape[1])
        return pad(self.alpha, (0, missing))[:, :length], pad(self.beta, (0, missing))[:, :length]

    def trace(self, length: int) -> Tensor:
        """Return the trace of D H D within the first `length` vectors of every model, float64 `[K]`."""
        return self.alpha[:, :length].sum(dim=1)

    def replicates(self, length: int) -> tuple[Tensor, Tensor]:
        """Return the sums of q . A q and |A q|^2 over the first `length` vectors q, each float64 `[1 + P, K]`.

        A is D H D of all examples and, of a subset, of all but each part.
        """
        return self._along[..., :length].sum(dim=2), self._square[..., :length].sum(dim=2)

    def deflate(self, vectors: Tensor, length: int) -> Tensor:
        """Return vectors `[S, K, d]` without their part in the first `length` vectors of every model."""
        z = vectors.transpose(0, 1)
        for number, block in enumerate(self._blocks[: -(-length // _BLOCK)]):
            q = block[:, : length - number * _BLOCK]
            z = z - (z @ q.mT) @ q
        return z.transpose(0, 1)

    def quadratic(self, vectors: Tensor, length: int) -> Tensor:
        """Return z^T D H D z for the part of z `[S, K, d]` in the first `length` vectors, `[S, K]`."""
        z = vectors.transpose(0, 1)
        c = torch.cat([z @ block.mT for block in self._blocks], dim=2)[:, :, :length]
        length = c.shape[2]
        across = 2 * (self.beta[:, None, : length - 1] * c[:, :, :-1] * c[:, :, 1:]).sum(dim=2)
        return ((self.alpha[:, None, :length] * c.square()).sum(dim=2) + across).T

    def _step(self, growing: Tensor) -> None:
        longest = int(self.lengths[growing].max())
        if longest == _BLOCK * len(self._blocks):
            self._add_block()
        place, rows = self.lengths, growing[:, None]
        self._store(growing)
        q = self._next
        found = product(self.engine, self.d, q[None], growing)
        z = torch.where(rows, found.of_all[0], 0.0)
        alpha = (q * z).sum(dim=1)
        before = z.norm(dim=1)
        for _ in range(2):
            for number, block in enumerate(self._blocks):
                filled = block[:, : max(0, longest + 1 - number * _BLOCK)]
                z = z - torch.bmm(torch.bmm(z[:, None], filled.mT), filled)[:, 0]
        beta = z.norm(dim=1)
        biggest = torch.maximum(before, torch.maximum(self.alpha.abs(), self.beta).amax(dim=1))
        exhausted = (beta <= _EXHAUSTED * biggest) | (place + 1 >= self.engine.n_params)
        beta = torch.where(exhausted, 0.0, beta)
        chosen = torch.nonzero(growing).flatten()
        self.alpha[chosen, place[chosen]] = alpha[chosen]
        self.beta[chosen, place[chosen]] = beta[chosen]
        self._along[:, chosen, place[chosen]] = found.along[0][:, chosen]
        self._square[:, chosen, place[chosen]] = found.square[0][:, chosen]
        self.lengths = self.lengths + growing
        self.ended = self.ended | (growing & (exhausted | ~alpha.isfinite() | ~beta.isfinite()))
        self._next = torch.where(growing[:, None] & ~self.ended[:, None], z / beta[:, None], self._next)

    def _add_block(self) -> None:
        models, dimension = self.d.shape
        options: Any = {"dtype": torch.float64, "device": self.d.device}
        size = min(_BLOCK, max(1, self.capacity - _BLOCK * len(self._blocks)))
        self._blocks.append(torch.zeros(models, size, dimension, **options))
        more = torch.zeros(models, _BLOCK, **options)
        self.alpha, self.beta = torch.cat([self.alpha, more], dim=1), torch.cat([self.beta, more], dim=1)
        wide = more.expand(1 + self.engine.parts, -1, -1)
        self._along, self._square = torch.cat([self._along, wide], dim=2), torch.cat([self._square, wide], dim=2)

    def _store(self, growing: Tensor) -> None:
        """Write each growing model's next vector at its place."""
        for number, block in enumerate(self._blocks):
            here = torch.nonzero(growing & (self.lengths // _BLOCK == number)).flatten()
            block[here, self.lengths[here] % _BLOCK] = self._next[here]


def ritz(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues `[..., m]`, ascending, and eigenvectors `[..., m, m]` of tridiagonal matrices.

    Args:
        alpha: Their diagonals `[..., m]`.
        beta: What is beside them, `[..., m]`, of which the last is not used. Where a matrix is not finite, all is NaN.
    """
    beside = beta[..., :-1]
    t = torch.diag_embed(alpha) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    sound = t.isfinite().flatten(-2).all(dim=-1)
    theta, s = torch.linalg.eigh(torch.where(sound[..., None, None], t, 0.0))
    return torch.where(sound[..., None], theta, torch.nan), torch.where(sound[..., None, None], s, torch.nan)


def krylov_capacity(engine: Engine) -> int:
    """Return how many vectors per model of a Krylov space fit in the engine's memory, two at least."""
    return max(2, engine.memory // (8 * len(engine) * engine.n_params))


def krylov(engine: Engine, metric: Metric) -> Krylov:
    """Return the engine's Krylov spaces in a metric, the same ones for every measure."""
    spaces: Krylov = engine.shared(("krylov", metric), lambda: Krylov(engine, metric))
    return spaces


@dataclass(frozen=True)
class Directions:
    """Displacements of length 1 in their own units.

    Attributes:
        vectors: The displacements, float64 `[count, K, d]`.
        found: Whether they are what they should be, bool `[K]`.
        products: Hessian-vector products that it took, int64 `[K]`.
    """

    vectors: Tensor
    found: Tensor
    products: Tensor


def top_directions(engine: Engine, metric: Metric, count: int, *, tolerance: float, max_steps: int) -> Directions:
    """Return D v for the largest eigenvalues of D H D, from Krylov spaces as short as will do.

    Args:
        engine: The models.
        metric: The metric.
        count: How many eigenvalues.
        tolerance: The residual, as a fraction of its eigenvalue, at which a vector will do.
        max_steps: The longest space.
    """
    spaces, d = krylov(engine, metric), engine.scale(metric)
    vectors = torch.zeros(count, *d.shape, dtype=torch.float64, device=engine.device)
    active = torch.ones(len(engine), dtype=torch.bool, device=engine.device)
    found, products = torch.zeros_like(active), torch.zeros_like(active, dtype=torch.int64)
    most = min(max_steps, spaces.capacity)
    for length in sorted({*range(2 * _ROUND, most, _ROUND), most}):
        spaces.grow(length, active)
        theta, residual, v = spaces.leading(length, count, active)
        vectors = torch.where(active[:, None], d * v, vectors)
        products = torch.where(active, spaces.lengths.clamp(max=length), products)
        found = found | (active & (residual <= tolerance * theta.abs()).all(dim=0))
        active = active & ~found & theta.isfinite().all(dim=0)
        if not bool(active.any()):
            break
    return Directions(vectors, found, products)
