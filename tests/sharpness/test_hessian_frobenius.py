from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from torch import nn

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.hessian_frobenius import hessian_frobenius
from flatmin.sharpness.hessian_trace import hessian_trace
from flatmin.stack import Batch, StackedNetwork

METRICS = ["identity", "filter", "element"]
DECAYING = torch.cat([8 * 0.8 ** torch.arange(60.0), -0.5 * 0.9 ** torch.arange(40.0)])


@pytest.mark.parametrize("metric", METRICS)
def test_the_norm_of_few_weights_is_exact(problem: Any, metric: Any) -> None:
    engine = problem.engine((6,))
    estimate = hessian_frobenius(engine, metric=metric)
    assert estimate.stderr.tolist() == [0.0] * len(engine)
    assert estimate.passes.tolist() == [4.0 * engine.n_params] * len(engine)
    for k in range(len(engine)):
        d = engine.scale(metric)[k]
        norm = (d[:, None] * problem.hessian(k) * d).norm().item()
        assert estimate.value[k].item() == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("tolerance", [1e-9, 0.02], ids=["all samples", "until the tolerance"])
def test_its_interval_covers_and_its_square_is_unbiased(with_spectrum: Callable[..., Engine], tolerance: float) -> None:
    engine = with_spectrum(DECAYING, 400)
    estimate = hessian_frobenius(engine, metric="identity", tolerance=tolerance, max_samples=80)
    truth = DECAYING.norm().item()
    drawn = estimate.samples - 10
    assert bool((drawn >= 16).all())
    quantile = torch.tensor([student.ppf(0.975, n - 1) for n in drawn.tolist()])
    inside = (estimate.value - truth).abs() <= quantile * estimate.stderr
    assert 0.90 <= inside.double().mean().item() <= 0.99
    error = estimate.value.square().std().item() / 20
    assert abs(estimate.value.square().mean().item() - truth**2) < 4 * error
    assert 0 < error < 0.01 * truth**2


def test_deflation_pays(with_spectrum: Callable[..., Engine]) -> None:
    """Its error must be well below that of as many products with Gaussian vectors, as published."""
    engine = with_spectrum(DECAYING, 200)
    estimate = hessian_frobenius(engine, metric="identity", tolerance=1e-9, max_samples=64)
    squares = engine.hvps(engine.vectors("normal", "plain", 0, 64)).square().sum(dim=2)
    plain = squares.mean(dim=0).sqrt().std().item()
    assert estimate.value.std().item() < 0.4 * plain


def test_it_shares_its_products_with_the_trace(with_spectrum: Callable[..., Engine]) -> None:
    class Counted(Engine):
        count = 0

        def hvps(self, vectors: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
            Counted.count += len(vectors)
            return super().hvps(vectors, active)

    engine = with_spectrum(DECAYING, 1)
    engine.__class__ = Counted
    engine.network = StackedNetwork(engine.network.template, vectorize="vmap")
    first = hessian_trace(engine, metric="identity", tolerance=1e-9, max_samples=40)
    made = Counted.count
    second = hessian_frobenius(engine, metric="identity", tolerance=1e-9, max_samples=40)
    assert made == first.samples.item() == second.samples.item() == 40
    assert Counted.count == made


def test_little_memory_takes_a_smaller_basis(with_spectrum: Callable[..., Engine]) -> None:
    engine = with_spectrum(DECAYING, 50, memory=0)
    estimate = hessian_frobenius(engine, metric="identity", max_samples=90)
    truth = DECAYING.norm().item()
    assert estimate.samples.max().item() <= 90
    assert abs(estimate.value.mean().item() - truth) < 4 * estimate.value.std().item() / math.sqrt(50) + 0.02 * truth
    assert bool(((estimate.value - truth).abs() < 6 * estimate.stderr).all())


def test_a_hessian_of_zeros(mlp: Any) -> None:
    whole = mlp.engine()
    engine = Engine(whole.network, torch.zeros_like(whole.params), whole.buffers, whole.batches, mlp.keys)
    for samples in (128, 40):
        estimate = hessian_frobenius(engine, max_samples=samples)
        assert estimate.value.tolist() == estimate.stderr.tolist() == [0.0] * 4
        assert bool(estimate.converged.all())


def test_a_model_that_is_not_finite_is_undefined_and_alone(mlp: Any) -> None:
    whole = mlp.engine()
    params = whole.params.clone()
    params[1, 3] = math.nan
    engine = Engine(whole.network, params, whole.buffers, whole.batches, mlp.keys)
    for samples in (128, 40):
        estimate = hessian_frobenius(engine, max_samples=samples)
        sound = hessian_frobenius(whole, max_samples=samples)
        assert estimate.value.isnan().tolist() == [False, True, False, False]
        assert not estimate.converged[1].item()
        torch.testing.assert_close(estimate.value[[0, 2, 3]], sound.value[[0, 2, 3]], rtol=1e-9, atol=0)


def test_rescaled_layers_leave_the_norm_in_the_filter_metric(mlp: Any) -> None:
    """Hidden filters times 4, what reads them divided by 4: the same function, and the same value where D scales."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        module = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    first, second = (parameter.detach().flatten() for parameter in module.parameters())
    params = torch.stack([torch.cat([first, second]), torch.cat([4 * first, second / 4])])
    batch = Batch(mlp.x, mlp.y[:1].expand(2, -1), shared=True)
    engine = Engine(StackedNetwork(module), params, {}, [batch], mlp.keys[:2])
    filters, plain = (hessian_frobenius(engine, metric=metric).value for metric in ("filter", "identity"))
    assert filters[0].item() == pytest.approx(filters[1].item(), rel=1e-9)
    assert abs(plain[0].item() / plain[1].item() - 1) > 0.1
