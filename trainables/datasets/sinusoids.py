"""Sinusoids: a regression on one input, a sum of sine waves.

f(x) = sum_i a_i sin(2 pi k_i x + phi_i) at x = 0, 1/n, ..., (n - 1)/n; amplitudes a, frequencies k in cycles per unit,
phases phi in radians. Source: aryol/CS-439-project (EPFL), synthetic_task, after Rahaman et al. 2019.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.settings import Setting
from flatmin.trainables.dataset import Dataset


def sinusoids(
    root: Path,
    *,
    sinusoid_amplitudes: Annotated[tuple[float, ...], Setting(about="Amplitude of each wave.")] = (
        0.25,
        0.5,
        0.75,
        1.0,
    ),
    sinusoid_frequencies: Annotated[
        tuple[float, ...], Setting(about="Frequency of each wave.", unit="cycles per unit of x")
    ] = (1.0, 2.0, 4.0, 8.0),
    sinusoid_phases: Annotated[tuple[float, ...], Setting(about="Phase of each wave at x = 0.", unit="radians")] = (
        0.0,
        0.0,
        0.0,
        0.0,
    ),
    sinusoid_points: Annotated[int, Setting(about="Evenly spaced training points.", unit="examples", ge=2)] = 200,
) -> Dataset:
    """Return inputs `[1]` and values `[1]`, neither normalised, as published.

    The study has no test set. Here it has as many points, each half-way between two of the training set.

    Args:
        root: Where data sets lie; unused, for this one is computed.
        sinusoid_amplitudes: Amplitudes a.
        sinusoid_frequencies: Frequencies k.
        sinusoid_phases: Phases phi.
        sinusoid_points: Training points n.

    Raises:
        RequestError: There are not as many amplitudes as frequencies and phases.
    """
    waves = (sinusoid_amplitudes, sinusoid_frequencies, sinusoid_phases)
    if len({len(numbers) for numbers in waves}) > 1:
        raise RequestError(
            f"sinusoid_amplitudes, sinusoid_frequencies and sinusoid_phases have {len(waves[0])}, {len(waves[1])} and "
            f"{len(waves[2])} numbers; each wave needs one of each"
        )
    a, k, phi = (torch.tensor(numbers, dtype=torch.float64) for numbers in waves)

    def points(first: float) -> tuple[Tensor, Tensor]:
        x = (torch.arange(sinusoid_points, dtype=torch.float64)[:, None] + first) / sinusoid_points
        y = (a * torch.sin(2 * math.pi * k * x + phi)).sum(dim=1, keepdim=True)
        return x.float(), y.float()

    (train_x, train_y), (test_x, test_y) = points(0.0), points(0.5)
    return Dataset(train_x, train_y, test_x, test_y, torch.zeros(1), torch.ones(1), classes=1, task="regression")


def write_stand_in(root: Path) -> None:
    """Write nothing: the examples are computed."""
