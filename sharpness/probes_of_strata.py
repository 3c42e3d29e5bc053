"""Random probes of D H D that see a part of the examples each, where these have draws of their own (`Models.strata`).

With A = sum f_p A_p over P strata, Z = I - Q Q^T beside a Krylov space Q, and Rademacher vectors g of their own,

    tr(Z A Z) = E sum_p f_p z_p^T A_p z_p,  z_p = Z g_p,

costs one product with A a round, and averages P probes as it does: what the strata share, above all the large
eigenvalues that Q has not caught, varies P times less than with one probe for all, and P probes tell their spread as
well. A square does not fall apart into strata, but into pairs of them: for a pair p, q drawn at random,

    |A Z|_F^2 = E [P / 2 (|f_p A_p z|^2 + |f_q A_q z|^2) + P (P - 1) f_p A_p z . f_q A_q z],

so that a draw costs the P / 2-th part of a product, and P / 2 draws take each stratum once. On a narrow ResNet-18 (512
images, 32 strata, 8 vectors in Q) three rounds gave the trace to 2 %, and 16 pairs the norm to 1.3 %, where 16 probes
for all cost four times as much (n = 1).
Sources: Hutchinson 1990; the unbiased square of a mean is a U-statistic (Hoeffding 1948).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Draw
from flatmin.sharpness.lanczos import Krylov, krylov, krylov_capacity
from flatmin.sharpness.metric import Metric
from flatmin.stack import permutation, stream_key

_LENGTH = 8
"""Vectors of the Krylov space, as many as `lpf` and `pac_bayes` take: a product spent on a ninth gains no more than one
on another round does, and `lambda_max` needs about as many."""


def deflated_of_strata(engine: Engine, max_samples: int) -> int:
    """Return how many Krylov vectors to look outside of when so many products may be made in all."""
    return min(_LENGTH, max_samples // 2, krylov_capacity(engine))


def traces_of_strata(engine: Engine, metric: Metric, length: int) -> Draw:
    """Return z . A_p z of probes z outside so many Krylov vectors, each stratum's own, as draws `[count, P, K]`."""
    spaces, shares = _grown(engine, metric, length), engine.stratum_shares

    def of_stratum(stratum: int, first: int, count: int, active: Tensor) -> Tensor:
        # All draws of a stratum together, so that they share a graph that is not kept.
        parts = []
        for start, size in engine.portions(first, count):
            drawn = engine.vectors("rademacher", f"probe of stratum {stratum}", start, size)
            z = spaces.deflate(drawn, length)
            moved = spaces.d * engine.products_of_stratum(spaces.d * z, stratum, active)
            parts.append((z * moved).sum(dim=2) / shares[stratum])
        return torch.cat(parts)

    def draw(first: int, count: int, active: Tensor) -> Tensor:
        return torch.stack([of_stratum(p, first, count, active) for p in range(engine.strata)], dim=1)

    return draw


class PairsOfStrata:
    """Draws of |A Z|_F^2 from pairs of strata, and what they say without a stratum.

    Args:
        engine: The models.
        metric: The metric of D.
        length: How many Krylov vectors Z is beside.
    """

    def __init__(self, engine: Engine, metric: Metric, length: int) -> None:
        self.engine, self.length = engine, length
        self.spaces = _grown(engine, metric, length)
        self._pairs: list[Sequence[int]] = []
        self._found: list[Tensor] = []

    def draw(self, first: int, count: int, active: Tensor) -> Tensor:
        """Return draws of the square, `[count, K]`; draws are asked for one after another, from number 0 on."""
        spaces, strata = self.spaces, self.engine.strata
        for number in range(first, first + count):
            turn, place = divmod(number, strata // 2)
            pair = permutation(stream_key("pairs of strata", turn), strata)[2 * place : 2 * place + 2].tolist()
            z = spaces.d * spaces.deflate(self.engine.vectors("rademacher", "probe of a pair", number, 1), self.length)
            one, other = (spaces.d * self.engine.products_of_stratum(z, stratum, active)[0] for stratum in pair)
            own = (one.square() + other.square()).sum(dim=1)
            self._pairs.append(pair)
            self._found.append(torch.stack([own, (one * other).sum(dim=1)]))
        return _square(torch.stack(self._found[first:]), strata)

    def without(self, counts: Tensor) -> Tensor:
        """Return the mean of each model's first draws without each stratum, `[P, K]`; NaN where none is left.

        Args:
            counts: How many of its draws each model's value rests on, int64 `[K]`.
        """
        strata = self.engine.strata
        if not self._pairs:
            return torch.full((strata, len(counts)), torch.nan, dtype=torch.float64)
        pairs, numbers = torch.tensor(self._pairs), torch.arange(strata)
        left = (pairs[:, None] != numbers[:, None]).all(dim=2).double()
        used = (torch.arange(len(pairs))[:, None] < counts).double()
        draws = _square(torch.stack(self._found), strata - 1).cpu().nan_to_num(0.0)
        rest = (1.0 - self.engine.stratum_shares.cpu()).square()[:, None]
        return torch.einsum("np,nk,nk->pk", left, used, draws) / torch.einsum("np,nk->pk", left, used) / rest


def _square(found: Tensor, strata: int) -> Tensor:
    """Return what pairs of so many strata say of a square, `[n, K]`, given |a|^2 + |b|^2 and a . b, `[n, 2, K]`."""
    return strata / 2 * found[:, 0] + strata * (strata - 1) * found[:, 1]


def _grown(engine: Engine, metric: Metric, length: int) -> Krylov:
    spaces = krylov(engine, metric)
    spaces.grow(length, torch.ones(len(engine), dtype=torch.bool, device=engine.device))
    return spaces
