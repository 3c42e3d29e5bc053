from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import t as student

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.hessian_density import hessian_density

METRICS = ["identity", "filter", "element"]
FEW_VALUES = torch.cat([torch.full((n,), x) for x, n in ((4.0, 3), (0.5, 80), (-0.3, 50), (-1.0, 7))])
DECAYING = torch.cat([6 * 0.9 ** torch.arange(90.0), -0.4 * 0.95 ** torch.arange(90.0)]).double()


def share(eigenvalues: torch.Tensor) -> float:
    return (eigenvalues.clamp(max=0).abs().sum() / eigenvalues.abs().sum()).item()


def broadened(eigenvalues: torch.Tensor, width: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the mean of normal densities about eigenvalues, at points x."""
    z = (x[:, None] - eigenvalues) / width
    result: torch.Tensor = (torch.exp(-z.square() / 2) / (width * math.sqrt(2 * math.pi))).mean(dim=1)
    return result


@pytest.mark.parametrize("metric", METRICS)
def test_that_of_few_weights_is_exact(problem: Any, metric: Any) -> None:
    engine = problem.engine((6,))
    estimate = hessian_density(engine, metric=metric)
    density, error = estimate.curves
    for k in range(len(engine)):
        d = engine.scale(metric)[k]
        eigenvalues = torch.linalg.eigvalsh(d[:, None] * problem.hessian(k) * d)
        assert estimate.value[k].item() == pytest.approx(share(eigenvalues), rel=1e-9)
        width = 0.01 * (eigenvalues[-1] - eigenvalues[0])
        truth = broadened(eigenvalues, width, density.x[k])
        torch.testing.assert_close(density.value[k], truth, rtol=1e-6, atol=1e-9 * truth.max().item())
    assert error.value.abs().max().item() == 0


def test_the_share_of_a_minimum_and_of_a_maximum(with_spectrum: Callable[..., Engine]) -> None:
    for sign, expected in ((1, 0.0), (-1, 1.0)):
        engine = with_spectrum(sign * torch.linspace(0.1, 2, 60), 1)
        assert hessian_density(engine, metric="identity").value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("budget", [139, 60], ids=["converges", "does not"])
def test_its_interval_covers(with_spectrum: Callable[..., Engine], budget: int) -> None:
    """Four distinct eigenvalues: the quadrature is exact after four steps, so the error is that of sampling."""
    engine = with_spectrum(FEW_VALUES, 400)
    estimate = hessian_density(engine, metric="identity", max_samples=budget, share_tolerance=0.01)
    truth = share(FEW_VALUES)
    spread = estimate.value.std().item()
    assert 1e-3 < spread < 0.1
    if budget == 139:
        assert abs(estimate.value.mean().item() - truth) < 4 * spread / 20 + 1e-3
        inside = (estimate.value - truth).abs() <= student.ppf(0.975, 15) * estimate.stderr
        assert 0.90 <= inside.double().mean().item() <= 0.99
        assert bool((estimate.stderr[estimate.converged] <= 0.01).all())
    else:
        assert bool(((estimate.value - truth).abs() <= 5 * estimate.stderr).all())


def test_the_curve_is_a_density_within_its_error(with_spectrum: Callable[..., Engine]) -> None:
    engine = with_spectrum(DECAYING, 20)
    estimate = hessian_density(engine, metric="identity", max_samples=170, broadening=0.05)
    density, error = estimate.curves
    assert (density.kind, density.settings, error.settings) == (
        "hessian_density",
        {"part": "density"},
        {"part": "stderr"},
    )
    torch.testing.assert_close(torch.trapezoid(density.value, density.x), torch.ones(20, dtype=torch.float64))
    assert density.value.min().item() >= 0
    width = 0.05 * (density.x[:, -1] - density.x[:, 0]) / (1 + 12 * 0.05)
    truth = torch.stack([broadened(DECAYING, s, x) for s, x in zip(width, density.x, strict=True)])
    matters = truth > 0.05 * truth.max()
    outside = ((density.value - truth).abs() > 3 * error.value)[matters].double().mean().item()
    assert outside < 0.05
    assert (error.value[matters] / truth[matters]).median().item() < 0.2, "an error that says something"


def test_the_share_of_a_smooth_spectrum_is_within_its_error(with_spectrum: Callable[..., Engine]) -> None:
    engine = with_spectrum(DECAYING, 20)
    estimate = hessian_density(engine, metric="identity", max_samples=170)
    assert bool(((estimate.value - share(DECAYING)).abs() <= 3 * estimate.stderr).all())
    assert estimate.stderr.max().item() < 0.25


def test_negative_curvature_that_few_steps_do_not_see_is_in_the_error(with_spectrum: Callable[..., Engine]) -> None:
    """A bulk around 0 of which a third is just below: after 8 steps no node is negative, and none was after 7."""
    bulk = torch.cat([0.01 * torch.linspace(0.01, 1, 150) ** 2, -0.003 * torch.linspace(0.01, 1, 60) ** 2])
    eigenvalues = torch.cat([6 * 0.8 ** torch.arange(20.0), bulk]).double()
    engine = with_spectrum(eigenvalues, 10)
    for budget in (220, 150):
        estimate = hessian_density(engine, metric="identity", max_samples=budget)
        assert bool(((estimate.value - share(eigenvalues)).abs() <= 2 * estimate.stderr).all())


def test_the_curve_of_a_bulk_and_outliers_is_within_its_error(with_spectrum: Callable[..., Engine]) -> None:
    eigenvalues = torch.cat([6 * 0.8 ** torch.arange(20.0), 0.2 * torch.randn(200, generator=torch.manual_seed(0))])
    engine = with_spectrum(eigenvalues.double(), 10)
    density, error = hessian_density(engine, metric="identity", max_samples=200).curves
    width = 0.01 * (density.x[:, -1] - density.x[:, 0]) / (1 + 12 * 0.01)
    truth = torch.stack([broadened(eigenvalues, s, x) for s, x in zip(width, density.x, strict=True)])
    outside = (density.value - truth).abs() > 2.1 * error.value + 1e-6 * truth.max()
    assert outside.double().mean().item() < 0.1


def test_little_memory(with_spectrum: Callable[..., Engine]) -> None:
    engine = with_spectrum(DECAYING, 5, memory=0)
    estimate = hessian_density(engine, metric="identity")
    assert estimate.samples.max().item() <= 1024
    assert bool((estimate.stderr > 0).all()), "the dense matrix does not fit"
    assert bool(((estimate.value - share(DECAYING)).abs() <= 4 * estimate.stderr).all())


def test_a_hessian_of_zeros_has_no_share(mlp: Any) -> None:
    whole = mlp.engine()
    engine = Engine(whole.network, torch.zeros_like(whole.params), whole.buffers, whole.batches, mlp.keys)
    for samples in (1024, 40):
        estimate = hessian_density(engine, max_samples=samples)
        assert bool(estimate.value.isnan().all())
        assert not bool(estimate.converged.any())
        assert bool(estimate.curves[0].x.isfinite().all())


def test_a_model_that_is_not_finite_is_undefined_and_alone(mlp: Any) -> None:
    whole = mlp.engine()
    params = whole.params.clone()
    params[1, 3] = math.nan
    engine = Engine(whole.network, params, whole.buffers, whole.batches, mlp.keys)
    for samples in (1024, 40):
        estimate = hessian_density(engine, max_samples=samples)
        assert estimate.value.isnan().tolist() == [False, True, False, False]
        assert not estimate.converged[1].item()
        density = estimate.curves[0]
        assert bool(density.x.isfinite().all())
        assert density.value.isnan().all(dim=1).tolist() == [False, True, False, False]
