"""Quadratic: a regression whose squared error is a quadratic function of 100 weights, of a chosen Hessian.

A linear network of weights theta has the loss (1/n) |X theta|^2 = 1/2 theta^T H theta for X = sqrt(n / 2) H^(1/2) and
targets of zero. H = G^T G / 2 with standard normal G, [100, 100]; then the K smallest eigenvalues are drawn again from
U(1e-5, 1e-3), or all of them from U(0.9 c, 1.1 c). Source: Bisla et al. 2022, supplement C (K = 0, 5, ..., 100, and
c = 100, ..., 1).

Every eigenvalue has a number of its own in the stream it is drawn from. So more flat directions are those of fewer and
others, and another c scales the same spectrum: differences are paired.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.settings import Setting
from flatmin.stack import normal, stream_key, uniform
from flatmin.trainables.dataset import Dataset

WEIGHTS = 100
"""Weights, and examples."""


def quadratic(
    root: Path,
    *,
    quadratic_flat: Annotated[
        int, Setting(about="How many of the smallest eigenvalues are drawn from U(1e-5, 1e-3).", ge=0, le=100)
    ] = 0,
    quadratic_curvature: Annotated[
        float | None,
        Setting(
            about="Draws every eigenvalue from 0.9 to 1.1 times this; unless given, they are those of G^T G / 2.",
            unit="nats per squared weight",
            gt=0,
        ),
    ] = None,
    quadratic_seed: Annotated[int, Setting(about="Seed of the eigenvalues and eigenvectors.", ge=0)] = 0,
) -> Dataset:
    """Return 100 inputs `[100]` and targets of 0, float64, not normalised; the test set is the training set.

    Args:
        root: Where data sets lie; unused, for this one is computed.
        quadratic_flat: K.
        quadratic_curvature: c.
        quadratic_seed: Seed.

    Raises:
        RequestError: Both the K smallest eigenvalues and all are to be drawn again.
    """
    if quadratic_flat and quadratic_curvature is not None:
        raise RequestError(
            f"quadratic_flat = {quadratic_flat} and quadratic_curvature = {quadratic_curvature:g}: the second draws "
            "every eigenvalue, the first some; give one of the two"
        )
    values, vectors = eigensystem(quadratic_flat, quadratic_curvature, quadratic_seed)
    x = math.sqrt(WEIGHTS / 2) * (vectors * values.sqrt()) @ vectors.T
    y = torch.zeros(WEIGHTS, 1, dtype=torch.float64)
    return Dataset(x, y, x, y, torch.zeros(1), torch.ones(1), classes=1, task="regression")


def eigensystem(flat: int, curvature: float | None, seed: int) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues `[100]` and eigenvectors `[100, 100]`, as columns, of the Hessian.

    Args:
        flat: K.
        curvature: c.
        seed: Seed.
    """
    g = normal(stream_key("quadratic", seed), (WEIGHTS, WEIGHTS))
    values, vectors = torch.linalg.eigh(g.T @ g / 2)
    drawn = uniform(stream_key("quadratic eigenvalues", seed), (WEIGHTS,))
    if curvature is not None:
        return curvature * (0.9 + 0.2 * drawn), vectors
    return torch.cat([1e-5 + (1e-3 - 1e-5) * drawn[:flat], values[flat:]]), vectors


def write_stand_in(root: Path) -> None:
    """Write nothing: the examples are computed."""
