"""Lanczos' tridiagonalisation of D H D, one Krylov space per model, kept for every measure that needs it.

q_1 random;  z = D H D q_j;  alpha_j = q_j . z;  z is made orthogonal to all q, twice;  beta_j = |z|;
q_{j+1} = z / beta_j. Then Q^T D H D Q = T is tridiagonal, and a Ritz pair T s = theta s has the residual
beta_m |s_m|: some eigenvalue lies within that of theta. Source: Lanczos 1950; Parlett, The Symmetric
Eigenvalue Problem, 1980 (full reorthogonalisation, residual bounds).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.metric import Metric

_BLOCK = 8
_EXHAUSTED = 1e-12


class Krylov:
    """The Krylov spaces of K models, each grown as far as it was asked for.

    Args:
        engine: The models.
        metric: The metric whose D H D is tridiagonalised.
    """

    def __init__(self, engine: Engine, metric: Metric) -> None:
        self.engine = engine
        self.d = engine.scale(metric)
        models, device = len(engine), engine.device
        self.capacity = max(2, engine.memory // (8 * models * engine.n_params))
        """The most vectors per model that fit in the engine's memory."""
        self.lengths = torch.zeros(models, dtype=torch.int64, device=device)
        """How many vectors each model has, `[K]`."""
        self.ended = torch.zeros(models, dtype=torch.bool, device=device)
        """Models whose space cannot grow: it is invariant, or something was not finite; `[K]`."""
        self.alpha = torch.zeros(models, 0, dtype=torch.float64, device=device)
        self.beta = self.alpha
        self._blocks: list[Tensor] = []
        start = engine.vectors("normal", "lanczos", 0, 1)[0]
        self._next = start / start.norm(dim=1, keepdim=True)

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
            beside = beta[:, :-1]
            t = torch.diag_embed(alpha) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
            theta, s = torch.linalg.eigh(t)
            value[rows], residual[rows] = theta[:, -1], beta[:, -1] * s[:, -1, -1].abs()
        return value, residual

    def trace(self, length: int) -> Tensor:
        """Return the trace of D H D within the first `length` vectors of every model, float64 `[K]`."""
        return self.alpha[:, :length].sum(dim=1)

    def deflate(self, vectors: Tensor, length: int) -> Tensor:
        """Return vectors `[S, K, d]` without their part in the first `length` vectors of every model."""
        z = vectors.transpose(0, 1)
        for number in range(-(-length // _BLOCK)):
            q = self._blocks[number][:, : length - number * _BLOCK]
            z = z - (z @ q.mT) @ q
        return z.transpose(0, 1)

    def quadratic(self, vectors: Tensor, length: int) -> Tensor:
        """Return z^T D H D z for the part of z `[S, K, d]` in the first `length` vectors, `[S, K]`."""
        z = vectors.transpose(0, 1)
        c = torch.cat([z @ block.mT for block in self._blocks], dim=2)[:, :, :length]
        across = 2 * (self.beta[:, None, : length - 1] * c[:, :, :-1] * c[:, :, 1:]).sum(dim=2)
        return ((self.alpha[:, None, :length] * c.square()).sum(dim=2) + across).T

    def _step(self, growing: Tensor) -> None:
        if int(self.lengths[growing].max()) == _BLOCK * len(self._blocks):
            self._add_block()
        place, rows = self.lengths, growing[:, None]
        self._store(growing)
        q = self._next
        z = torch.where(rows, self.d * self.engine.hvp(self.d * q, growing), 0.0)
        alpha = (q * z).sum(dim=1)
        before = z.norm(dim=1)
        for _ in range(2):
            for block in self._blocks:
                z = z - torch.bmm(torch.bmm(z[:, None], block.mT), block)[:, 0]
        beta = z.norm(dim=1)
        biggest = torch.maximum(before, torch.maximum(self.alpha.abs(), self.beta).amax(dim=1))
        exhausted = (beta <= _EXHAUSTED * biggest) | (place + 1 >= self.engine.n_params)
        beta = torch.where(exhausted, 0.0, beta)
        chosen = torch.nonzero(growing).flatten()
        self.alpha[chosen, place[chosen]] = alpha[chosen]
        self.beta[chosen, place[chosen]] = beta[chosen]
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

    def _store(self, growing: Tensor) -> None:
        """Write each growing model's next vector at its place."""
        for number, block in enumerate(self._blocks):
            here = torch.nonzero(growing & (self.lengths // _BLOCK == number)).flatten()
            block[here, self.lengths[here] % _BLOCK] = self._next[here]


def krylov(engine: Engine, metric: Metric) -> Krylov:
    """Return the engine's Krylov spaces in a metric, the same ones for every measure."""
    spaces: Krylov = engine.shared(("krylov", metric), lambda: Krylov(engine, metric))
    return spaces
