from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.eps_sharpness import eps_sharpness
from flatmin.sharpness.hessian_trace import hessian_trace
from flatmin.sharpness.lambda_max import lambda_max
from flatmin.sharpness.lpf import lpf
from flatmin.stack import Batch, StackedNetwork

METRICS = ["identity", "filter", "element"]
MEASURES = [lpf, hessian_trace, lambda_max, eps_sharpness]


def scaled_hessian(problem: Any, engine: Engine, metric: Any, k: int) -> Tensor:
    d = engine.scale(metric)[k]
    result: Tensor = d[:, None] * problem.hessian(k) * d
    return result


@pytest.mark.parametrize("metric", METRICS)
def test_lambda_max_is_the_largest_eigenvalue(problem: Any, metric: Any) -> None:
    engine = problem.engine((6,))
    estimate = lambda_max(engine, metric=metric, tolerance=1e-9)
    assert bool(estimate.converged.all())
    for k in range(len(engine)):
        top = torch.linalg.eigvalsh(scaled_hessian(problem, engine, metric, k))[-1].item()
        assert estimate.value[k].item() == pytest.approx(top, rel=1e-9)


def test_lambda_max_stops_within_its_bound(problem: Any) -> None:
    engine = problem.engine()
    early, full = lambda_max(engine, tolerance=0.05), lambda_max(problem.engine(), tolerance=1e-9)
    assert bool(early.converged.all())
    assert bool((early.samples >= 6).all()), "a loose tolerance still takes the least steps"
    assert bool((early.samples <= min(16, engine.n_params)).all())
    assert bool(((full.value - early.value).abs() <= early.stderr).all())
    assert bool((early.stderr <= 0.05 * early.value).all())
    assert torch.equal(early.passes, 4.0 * early.samples)


def test_lambda_max_is_algebraic() -> None:
    """At a maximum of the loss along one direction the largest eigenvalue in magnitude is negative."""

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.0, 0.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.weight[0], self.weight[1]
            return torch.stack([x[:, 0] + 2 * a**2 - b**2 / 2, torch.zeros_like(x[:, 0])], dim=1)

    params, buffers = StackedNetwork.stack([Squared()])
    batch = Batch(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), shared=True)
    engine = Engine(StackedNetwork(Squared()), params, buffers, [batch], torch.tensor([0]))
    estimate = lambda_max(engine, metric="identity", tolerance=1e-9)  # Hessian: diag(-2, 1/2)
    assert estimate.value.item() == pytest.approx(0.5)
    assert estimate.samples.item() == 2
    assert estimate.converged.item()


def test_lambda_max_without_enough_steps_says_so(mlp: Any) -> None:
    for estimate in (lambda_max(mlp.engine(), max_steps=2), lambda_max(mlp.engine(memory=0), tolerance=1e-6)):
        assert estimate.samples.tolist() == [2] * 4
        assert not bool(estimate.converged.any())
        assert bool((estimate.stderr > 0).all())


@pytest.mark.parametrize("metric", METRICS)
def test_the_trace_of_few_weights_is_exact(problem: Any, metric: Any) -> None:
    engine = problem.engine((6,))
    estimate = hessian_trace(engine, metric=metric, max_samples=engine.n_params)
    assert estimate.converged.tolist() == [True] * len(engine)
    assert estimate.stderr.tolist() == [0.0] * len(engine)
    for k in range(len(engine)):
        trace = scaled_hessian(problem, engine, metric, k).trace().item()
        assert estimate.value[k].item() == pytest.approx(trace, rel=1e-9)


@pytest.mark.parametrize("cuts", [(), (6,)])
@pytest.mark.parametrize("metric", METRICS)
def test_the_trace_of_an_mlp_is_exact_where_it_costs_no_more_than_it_may(mlp: Any, metric: Any, cuts: Any) -> None:
    engine = mlp.engine(cuts, memory=0)
    engine._rows = 3
    assert not bool(hessian_trace(engine, metric=metric, max_samples=1).converged.any())
    estimate = hessian_trace(engine, metric=metric, max_samples=2)
    assert (estimate.samples.tolist(), estimate.stderr.tolist()) == ([1] * 4, [0.0] * 4)
    assert bool(estimate.converged.all())
    assert estimate.passes.tolist() == [2 * (1 + 3)] * 4
    for k in range(4):
        trace = scaled_hessian(mlp, engine, metric, k).trace().item()
        assert estimate.value[k].item() == pytest.approx(trace, rel=1e-9)


def test_derivatives_along_a_chain_are_those_that_autograd_records(mlp: Any) -> None:
    written, recorded = mlp.engine((6,)), mlp.engine((6,))
    recorded.network = StackedNetwork(mlp.modules[0], vectorize="vmap")
    vectors = written.vectors("normal", "any", 0, 3)
    active = torch.tensor([True, False, True, True])
    torch.testing.assert_close(written.gradient(), recorded.gradient(), rtol=1e-12, atol=1e-15)
    ours, theirs = (engine.hvps(vectors, active)[:, active] for engine in (written, recorded))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)
    assert (written.trace_passes, recorded.trace_passes) == (8, math.inf)


@pytest.mark.parametrize("tolerance", [1e-9, 0.03], ids=["all samples", "until the tolerance"])
def test_the_trace_is_unbiased_and_its_interval_covers(
    repeated: Callable[[int], Any], coverage: Any, tolerance: float
) -> None:
    problem = repeated(500)
    engine = problem.engine()
    truth = scaled_hessian(problem, engine, "filter", 0).trace().item()
    estimate = hessian_trace(engine, tolerance=tolerance, max_samples=engine.n_params - 1)
    spread = estimate.value.std().item()
    assert 0 < spread < 0.2 * truth
    assert abs(estimate.value.mean().item() - truth) < 4 * spread / math.sqrt(500)
    assert 0.90 <= coverage(estimate, truth) <= 0.99


def test_the_trace_deflates_what_is_large(repeated: Callable[[int], Any]) -> None:
    """Its error must be well below that of plain Hutchinson with as many products."""
    problem = repeated(200)
    engine = problem.engine()
    a = scaled_hessian(problem, engine, "filter", 0)
    products = engine.n_params - 1
    plain = (2 * (a.square().sum() - a.diagonal().square().sum()) / products).sqrt().item()
    assert hessian_trace(engine, tolerance=1e-9, max_samples=products).value.std().item() < 0.75 * plain


def test_lpf_is_half_the_trace_at_a_small_sigma(repeated: Callable[[int], Any], coverage: Any) -> None:
    problem, sigma = repeated(500), 0.02
    engine = problem.engine()
    rise = 0.5 * sigma**2 * scaled_hessian(problem, engine, "filter", 0).trace().item()
    truth = engine.losses()[0].item() + rise
    estimate = lpf(engine, sigma=sigma, max_samples=32, tolerance=1e-9)
    error = estimate.value.std().item() / math.sqrt(500)
    assert rise > 20 * error
    assert abs(estimate.value.mean().item() - truth) < 4 * error
    assert 0.90 <= coverage(estimate, truth) <= 0.99


def test_lpf_in_pairs_is_unbiased_and_covers(repeated: Callable[[int], Any], coverage: Any) -> None:
    problem, sigma, tolerance = repeated(400), 0.03, 0.005
    engine = problem.engine()
    noise = sigma * engine.scale("filter") * engine.vectors("normal", "another stream", 0, 200)
    plain = engine.losses_at(noise).flatten()
    estimate = lpf(engine, sigma=sigma, tolerance=tolerance)
    without = (plain.std() / plain.mean() / tolerance).square().item()
    assert estimate.samples.double().mean().item() < 0.3 * without
    paired = estimate.passes > estimate.samples
    assert paired.double().mean().item() > 0.9
    error = math.hypot(plain.std().item() / math.sqrt(len(plain)), estimate.value.std().item() / math.sqrt(400))
    assert abs((estimate.value.mean() - plain.mean()).item()) < 4 * error
    assert 0.90 <= coverage(estimate, plain.mean().item()) <= 0.99


def test_lpf_does_not_subtract_the_centre(mlp: Any) -> None:
    estimate = lpf(mlp.engine(), sigma=1e-9)
    torch.testing.assert_close(estimate.value, mlp.engine().losses(), rtol=1e-6, atol=0)
    assert estimate.samples.tolist() == estimate.passes.tolist() == [16] * 4


def test_lpf_out_of_samples_says_so(mlp: Any) -> None:
    estimate = lpf(mlp.engine(), sigma=1.0, tolerance=1e-6, max_samples=20)
    assert estimate.samples.tolist() == [20] * 4
    assert not bool(estimate.converged.any())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 2.0])
def test_eps_sharpness_is_the_first_crossing(problem: Any, metric: Any, epsilon: float) -> None:
    engine = problem.engine()
    estimate = eps_sharpness(engine, epsilon=epsilon, metric=metric, tolerance=1e-9)
    assert bool(estimate.converged.all())
    for k in range(len(engine)):
        loss, flat = problem.loss_of(k)
        d = engine.scale(metric)[k]
        ascent = d * problem.gradient(k)

        def rise(eta: float, *, loss: Any = loss, flat: Any = flat, step: Any = d * ascent) -> float:
            return float(loss(flat + eta * step) - loss(flat)) - epsilon

        high = 1e-6
        while rise(high) < 0:
            high *= 1.05
        eta = brentq(rise, high / 1.05, high, xtol=1e-14, rtol=1e-12)
        assert estimate.value[k].item() == pytest.approx(1 / (eta * ascent.norm().item()), rel=1e-7)
        assert estimate.stderr[k].item() <= 1e-8 * estimate.value[k].item()


@pytest.mark.parametrize("sizes", [(8, 8), (8, 5)], ids=["one shape", "two shapes"])
def test_eps_sharpness_of_many_examples_glances_at_a_few(sizes: tuple[int, int]) -> None:
    """The search begins where 256 of them say, or all where they cannot be drawn from, and finds the same."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Linear(4, 3)).double()
    parts = [(torch.randn(400, size).double(), torch.arange(400) % 3) for size in sizes]
    params, _ = StackedNetwork.stack([module])
    batches = [Batch(x, y[None], shared=True) for x, y in parts]
    engine = Engine(StackedNetwork(module), params, {}, batches, torch.arange(1))
    estimate = eps_sharpness(engine, metric="identity", tolerance=1e-9)
    ascent = engine.gradient()

    def rise(eta: float) -> float:
        return float(engine.losses(params + eta * ascent) - engine.losses()) - 0.1

    eta = brentq(rise, 1e-6, 1e3, xtol=1e-14, rtol=1e-12)
    assert estimate.value.item() == pytest.approx(1 / (eta * ascent.norm().item()), rel=1e-7)
    glance = 256 / 800 if sizes[0] == sizes[1] else 1
    assert estimate.passes.item() == pytest.approx(1 + 2 + 4 * glance + estimate.samples.item())


def with_weights(problem: Any, params: Tensor) -> Engine:
    whole = problem.engine()
    return Engine(whole.network, params, whole.buffers, whole.batches, problem.keys)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_is_not_finite_is_undefined_and_alone(mlp: Any, measure: Any, bad: float) -> None:
    params = mlp.engine().params.clone()
    params[1, 3] = bad
    estimate, sound = measure(with_weights(mlp, params)), measure(mlp.engine())
    assert estimate.value.isnan().tolist() == [False, True, False, False]
    assert not estimate.converged[1].item()
    for k in (0, 2, 3):
        assert estimate.value[k].item() == pytest.approx(sound.value[k].item(), rel=1e-9)


def test_the_trace_by_sampling_of_a_model_that_is_not_finite(mlp: Any) -> None:
    params = mlp.engine().params.clone()
    params[1, 3] = math.nan
    engine = with_weights(mlp, params)
    engine.network = StackedNetwork(mlp.modules[0], vectorize="vmap")
    estimate = hessian_trace(engine, max_samples=42)
    assert estimate.value.isnan().tolist() == [False, True, False, False]
    assert estimate.samples[1].item() <= 5


@pytest.mark.parametrize("metric", ["filter", "element"])
def test_a_network_of_zeros(mlp: Any, metric: Any) -> None:
    """All filters are dead: nothing can be displaced, so everything is flat and there is no gradient."""
    engine = with_weights(mlp, torch.zeros_like(mlp.engine().params))
    for measure, expected in ((lambda_max, 0.0), (hessian_trace, 0.0), (lpf, math.log(3))):
        estimate = measure(engine, metric=metric)
        torch.testing.assert_close(estimate.value, torch.full((4,), expected, dtype=torch.float64))
        assert bool(estimate.converged.all())
        assert bool((estimate.stderr < 1e-12).all())
    undefined = eps_sharpness(engine, metric=metric)
    assert bool(undefined.value.isnan().all())
    assert not bool(undefined.converged.any())


@pytest.mark.parametrize("metric", METRICS)
def test_eps_sharpness_along_the_top_eigenvector(mlp: Any, metric: Any) -> None:
    engine = mlp.engine()
    estimate = eps_sharpness(engine, direction="top_eigenvector", metric=metric, tolerance=1e-6)
    assert bool(estimate.converged.all())
    for k in range(len(engine)):
        loss, flat = mlp.loss_of(k)
        d = engine.scale(metric)[k]
        step = d * torch.linalg.eigh(d[:, None] * mlp.hessian(k) * d).eigenvectors[:, -1]
        uphill = step * torch.sign(step @ mlp.gradient(k))

        def rise(t: float, *, loss: Any = loss, flat: Any = flat, step: Any = uphill) -> float:
            return float(loss(flat + t * step) - loss(flat)) - 0.1

        high = 1e-3
        while rise(high) < 0:
            high *= 1.05
        distance = brentq(rise, high / 1.05, high, xtol=1e-14, rtol=1e-12)
        assert estimate.value[k].item() == pytest.approx(1 / distance, rel=1e-5)


def test_a_loss_that_never_rises_by_epsilon_has_no_eps_sharpness() -> None:
    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x + torch.tanh(self.weight), torch.zeros_like(x)], dim=1)

    params, buffers = StackedNetwork.stack([Bounded()])
    batch = Batch(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), shared=True)
    engine = Engine(StackedNetwork(Bounded()), params, buffers, [batch], torch.tensor([0]))
    never = eps_sharpness(engine, epsilon=10.0)
    assert never.value.isnan().item()
    assert not never.converged.item()
    assert eps_sharpness(engine, epsilon=0.1).converged.item()


def test_a_wall_is_not_a_rise() -> None:
    """Where the loss stops being finite before it has risen by epsilon, there is no such distance."""

    class Wall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x - 0.01 * torch.sqrt(1.0 - self.weight) * -1.0, torch.zeros_like(x)], dim=1)

    params, buffers = StackedNetwork.stack([Wall()])
    batch = Batch(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), shared=True)
    engine = Engine(StackedNetwork(Wall()), params, buffers, [batch], torch.tensor([0]))
    assert eps_sharpness(engine, epsilon=0.1).value.isnan().item()
