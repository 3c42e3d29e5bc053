"""Products with D H D and what measures make of them: v . A v and |A v|^2, and on a subset the same without each part.

With A = sum f_p A_p over parts of the examples, f_p their shares, A without part p is (A - f_p A_p) / (1 - f_p), and

    v . A_(p) v = (v . A v - v . f_p A_p v) / (1 - f_p)
    |A_(p) v|^2 = (|A v|^2 - 2 A v . f_p A_p v + |f_p A_p v|^2) / (1 - f_p)^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.jackknife import replicates
from flatmin.sharpness.sampling import pieces


@dataclass(frozen=True)
class Product:
    """Products of S vectors v per model with A = D H D; row 0 of the replicates is A itself, row p A without part p.

    Attributes:
        of_all: A v, float64 `[S, K, d]`.
        along: v . A v, `[S, 1 + P, K]`.
        square: |A v|^2, `[S, 1 + P, K]`.
    """

    of_all: Tensor
    along: Tensor
    square: Tensor


def product(engine: Engine, d: Tensor, vectors: Tensor, active: Tensor | None = None) -> Product:
    """Return products of D H D.

    Args:
        engine: The models.
        d: D, `[K, d]`.
        vectors: v, float64 `[S, K, d]`.
        active: bool `[K]`, the models whose products are needed; the rest get anything finite.
    """
    if not engine.parts:
        z = d * engine.hvps(d * vectors, active)
        return Product(z, (vectors * z).sum(dim=2)[:, None], z.square().sum(dim=2)[:, None])
    room = engine.memory // (engine.parts * len(engine) * engine.n_params * engine.params.element_size())
    made = [_by_part(engine, d, vectors[first : first + size], active) for first, size in pieces(len(vectors), room)]
    return Product(*(torch.cat([getattr(one, name) for one in made]) for name in ("of_all", "along", "square")))


def _by_part(engine: Engine, d: Tensor, vectors: Tensor, active: Tensor | None) -> Product:
    parts = engine.products_by_part(d * vectors, active)
    z = torch.zeros_like(vectors)
    for part in parts:
        z += part
    z *= d
    share = engine.shares[:, None, None]

    def dot(other: Tensor) -> Tensor:
        """Return each part's product times D, times another vector, `[P, S, K]`."""
        return torch.stack([torch.einsum("skd,skd->sk", part, (d * other).to(part.dtype)).double() for part in parts])

    along, across = dot(vectors), dot(z)
    own = torch.stack([(d * part).square().sum(dim=2) for part in parts])
    square = torch.cat([across.sum(dim=0, keepdim=True), _without(across, own, share)])
    return Product(z, replicates(along, engine.shares).transpose(0, 1), square.transpose(0, 1))


def _without(across: Tensor, own: Tensor, share: Tensor) -> Tensor:
    return (across.sum(dim=0, keepdim=True) - 2.0 * across + own) / (1.0 - share).square()
