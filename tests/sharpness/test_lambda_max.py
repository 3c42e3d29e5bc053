"""The largest eigenvalue where it is hard: beside another one, and under a strongly negative spectrum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.lambda_max import lambda_max

BULK = torch.linspace(-0.1, 1.0, 198).double()


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-4, 0.02, 0.3])
@pytest.mark.parametrize("tolerance", [0.05, 0.005, 1e-6])
def test_a_pair_at_the_top(with_spectrum: Callable[..., Engine], gap: float, tolerance: float) -> None:
    eigenvalues = torch.cat([BULK, torch.tensor([3.0 - gap, 3.0]).double()])
    estimate = lambda_max(with_spectrum(eigenvalues, 100), metric="identity", tolerance=tolerance)
    to_one = (estimate.value[:, None] - eigenvalues).abs().min(dim=1).values
    assert bool(estimate.converged.all())
    assert bool((to_one <= estimate.stderr + 1e-9).all())
    assert bool((estimate.value <= 3.0 + 1e-9).all())
    assert bool((3.0 - estimate.value <= estimate.stderr + 1e-9).all()), "of 100 starts none rests on the second"
    assert bool((estimate.stderr <= tolerance * estimate.value).all())


def test_a_loose_tolerance_is_met_early_and_is_the_error(with_spectrum: Callable[..., Engine]) -> None:
    eigenvalues = torch.cat([BULK, torch.tensor([2.7, 3.0]).double()])
    engine = with_spectrum(eigenvalues, 100)
    early, late = (lambda_max(engine, metric="identity", tolerance=tolerance) for tolerance in (0.02, 0.009))
    assert early.samples.double().mean().item() < 10
    assert early.samples.min().item() >= 6
    assert late.samples.min().item() >= 16
    assert bool(early.converged.all())
    assert torch.allclose(early.stderr, 0.02 * early.value)
    assert bool((3.0 - early.value <= 1e-4).all())


@pytest.mark.parametrize("tolerance", [0.005, 1e-6])
def test_a_strongly_negative_spectrum(with_spectrum: Callable[..., Engine], tolerance: float) -> None:
    eigenvalues = torch.cat([-100 * 0.8 ** torch.arange(50.0), torch.linspace(-1, 0.2, 140), torch.tensor([0.5, 0.4])])
    estimate = lambda_max(with_spectrum(eigenvalues, 100), metric="identity", tolerance=tolerance)
    assert bool(estimate.converged.all())
    assert bool((estimate.value <= 0.5 + 1e-6).all())
    assert bool((0.5 - estimate.value <= estimate.stderr + 1e-6).all())


def test_all_eigenvalues_negative(with_spectrum: Callable[..., Engine]) -> None:
    eigenvalues = -torch.linspace(0.5, 100, 120)
    estimate = lambda_max(with_spectrum(eigenvalues, 20), metric="identity")
    assert bool((estimate.value <= -0.5 + 1e-6).all())
    assert bool(((estimate.value + 0.5).abs() <= estimate.stderr + 1e-6).all())


def test_a_space_that_ends_early(with_spectrum: Callable[..., Engine]) -> None:
    """Two distinct eigenvalues make a Krylov space of two vectors, which is exact."""
    eigenvalues = torch.cat([torch.full((60,), 2.0), torch.full((40,), -7.0)])
    estimate = lambda_max(with_spectrum(eigenvalues, 3), metric="identity", tolerance=1e-9)
    torch.testing.assert_close(estimate.value, torch.full((3,), 2.0, dtype=torch.float64))
    assert estimate.samples.max().item() <= 3
    assert bool(estimate.converged.all())
