from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from torch import Tensor

from flatmin.sharpness.effective_dimension import effective_dimension
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.hessian_trace import hessian_trace

METRICS = ["identity", "filter", "element"]
DECAYING = torch.cat([6 * 0.9 ** torch.arange(90.0), -0.4 * 0.95 ** torch.arange(90.0)]).double()
SHORT = torch.cat([6 * 0.9 ** torch.arange(80.0), -0.4 * 0.95 ** torch.arange(70.0)]).double()


def counted(negative: str, x: Tensor, c: float) -> float:
    """Return the effective dimension of eigenvalues, written out one by one."""
    total = 0.0
    for value in x.tolist():
        size = abs(value)
        if value >= 0 or negative == "absolute":
            total += size / (size + c)
        elif negative == "signed":
            total -= size / (size + c)
    return total


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("negative", ["signed", "zero", "absolute"])
def test_that_of_few_weights_is_exact(problem: Any, metric: Any, negative: Any) -> None:
    engine = problem.engine((6,))
    estimate = effective_dimension(engine, metric=metric, negative=negative, curvature=0.05)
    assert estimate.stderr.tolist() == [0.0] * len(engine)
    for k in range(len(engine)):
        d = engine.scale(metric)[k]
        eigenvalues = torch.linalg.eigvalsh(d[:, None] * problem.hessian(k) * d)
        assert eigenvalues[0].item() < 0
        assert estimate.value[k].item() == pytest.approx(counted(negative, eigenvalues, 0.05), rel=1e-9)


def test_an_eigenvalue_at_the_pole_is_harmless(with_spectrum: Callable[..., Engine]) -> None:
    engine = with_spectrum(torch.tensor([2.0, 1.0, -1.0, -1.0 + 1e-9]), 1)
    values = {n: effective_dimension(engine, metric="identity", negative=n).value.item() for n in ("signed", "zero")}
    assert values["zero"] == pytest.approx(2 / 3 + 1 / 2)
    assert values["signed"] == pytest.approx(2 / 3 + 1 / 2 - 1)


def test_its_interval_covers(with_spectrum: Callable[..., Engine]) -> None:
    engine = with_spectrum(SHORT, 400)
    estimate = effective_dimension(engine, metric="identity", curvature=2.0, max_samples=145, tolerance=0.03)
    truth = counted("signed", SHORT, 2.0)
    spread = estimate.value.std().item()
    assert 0 < spread < 0.1 * truth
    assert abs(estimate.value.mean().item() - truth) < 4 * spread / 20
    inside = (estimate.value - truth).abs() <= student.ppf(0.975, 15) * estimate.stderr
    assert 0.90 <= inside.double().mean().item() <= 0.99
    assert bool((estimate.stderr <= 0.03 * 2**0.5 * estimate.value)[estimate.converged].all())


@pytest.mark.parametrize("negative", ["signed", "zero", "absolute"])
def test_its_error_holds_the_bias_of_few_steps(with_spectrum: Callable[..., Engine], negative: Any) -> None:
    """At a small c nothing converges; the error must say by how much."""
    engine = with_spectrum(DECAYING, 20)
    estimate = effective_dimension(engine, metric="identity", curvature=0.01, negative=negative, max_samples=170)
    truth = counted(negative, DECAYING, 0.01)
    assert not bool(estimate.converged.any())
    assert bool(((estimate.value - truth).abs() < 3 * estimate.stderr).all())


def test_little_memory(with_spectrum: Callable[..., Engine]) -> None:
    engine = with_spectrum(DECAYING, 8, memory=0)
    estimate = effective_dimension(engine, metric="identity", curvature=2.0, max_samples=300)
    assert estimate.samples.max().item() <= 300
    assert bool((estimate.stderr > 0).all()), "the dense matrix does not fit"
    truth = counted("signed", DECAYING, 2.0)
    assert bool(((estimate.value - truth).abs() < 5 * estimate.stderr).all())


def test_as_published(with_spectrum: Callable[..., Engine]) -> None:
    """Sums over the 100 Ritz values, whose extremes have converged: the small ones count only where they are found."""
    eigenvalues = torch.cat([torch.linspace(5, 50, 10), torch.linspace(-1e-3, 1e-3, 290)]).double()
    engine = with_spectrum(eigenvalues, 3)
    trace = hessian_trace(engine, metric="identity", published=True)
    dimension = effective_dimension(engine, metric="identity", published=True)
    top = eigenvalues[:10]
    assert bool(trace.converged.all())
    torch.testing.assert_close(trace.value, top.sum().expand(3), rtol=1e-3, atol=0)
    torch.testing.assert_close(dimension.value, (top / (top + 1)).sum().expand(3), rtol=1e-2, atol=0)
    assert trace.samples.tolist() == [200] * 3
    flat = with_spectrum(torch.linspace(0.5, 1.5, 300), 1)
    few = hessian_trace(flat, metric="identity", published=True)
    assert few.value.item() == pytest.approx(100, rel=0.05), "100 of 300 eigenvalues: no trace"
    assert hessian_trace(flat, metric="identity").value.item() == pytest.approx(300, rel=0.05)


def test_as_published_explodes_at_the_pole(with_spectrum: Callable[..., Engine]) -> None:
    engine = with_spectrum(torch.tensor([2.0, 1.0, -1.0 + 1e-7]), 1)
    assert effective_dimension(engine, metric="identity", published=True).value.item() < -1e6


def test_as_published_without_memory_says_so(with_spectrum: Callable[..., Engine]) -> None:
    engine = with_spectrum(DECAYING, 1, memory=8 * 180 * 20)
    for estimate in (
        effective_dimension(engine, metric="identity", published=True),
        hessian_trace(engine, metric="identity", published=True),
    ):
        assert estimate.samples.tolist() == [40]
        assert not estimate.converged.item()


def test_a_model_that_is_not_finite_is_undefined_and_alone(mlp: Any) -> None:
    whole = mlp.engine()
    params = whole.params.clone()
    params[1, 3] = math.nan
    engine = Engine(whole.network, params, whole.buffers, whole.batches, mlp.keys)
    for arguments in ({}, {"max_samples": 40}, {"published": True}):
        estimate, sound = effective_dimension(engine, **arguments), effective_dimension(mlp.engine(), **arguments)
        assert estimate.value.isnan().tolist() == [False, True, False, False]
        assert not estimate.converged[1].item()
        torch.testing.assert_close(estimate.value[[0, 2, 3]], sound.value[[0, 2, 3]], rtol=1e-9, atol=0)
