"""The Hessian D H D of few weights, column by column: where that is no dearer than sampling, nothing is sampled."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.metric import Metric
from flatmin.sharpness.products import Product, product
from flatmin.sharpness.sampling import pieces


def column_products(engine: Engine, metric: Metric, active: Tensor | None = None) -> Iterator[Product]:
    """Yield the products of D H D with unit vectors, its columns, as many at once as fit in memory.

    Args:
        engine: The models.
        metric: The metric of D.
        active: bool `[K]`, the models whose columns are needed; the rest get anything.
    """
    d, n = engine.scale(metric), engine.n_params
    basis = torch.eye(n, dtype=torch.float64, device=engine.device)
    for start, size in engine.portions(0, n):
        yield product(engine, d, basis[start : start + size, None].expand(size, len(engine), n), active)


def fits(engine: Engine) -> bool:
    """Return whether one model's Hessian fits in the engine's memory."""
    return 8 * engine.n_params**2 <= engine.memory


def spectrum(engine: Engine, metric: Metric) -> Tensor:
    """Return all eigenvalues of D H D, ascending, float64 `[K, d]`; NaN for a model that is not finite.

    The Hessians of as many models are held at once as fit in memory.
    """
    made: Tensor = engine.shared(("spectrum", metric), lambda: _spectrum(engine, metric))
    return made


def _spectrum(engine: Engine, metric: Metric) -> Tensor:
    models, n = len(engine), engine.n_params
    values = torch.full((models, n), torch.nan, dtype=torch.float64, device=engine.device)
    for first, count in pieces(models, engine.memory // (8 * n * n)):
        rows = slice(first, first + count)
        active = torch.zeros(models, dtype=torch.bool, device=engine.device)
        active[rows] = True
        a = torch.cat([part.of_all[:, rows].transpose(0, 1) for part in column_products(engine, metric, active)], dim=1)
        sound = a.isfinite().flatten(1).all(dim=1)
        eigenvalues = torch.linalg.eigvalsh(torch.where(sound[:, None, None], (a + a.mT) / 2, 0.0))
        values[rows] = torch.where(sound[:, None], eigenvalues, torch.nan)
    return values
