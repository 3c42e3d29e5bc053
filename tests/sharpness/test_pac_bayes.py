from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from torch import Tensor, nn

from flatmin.errors import FlatminError
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.pac_bayes import pac_bayes
from flatmin.stack import Batch, StackedNetwork


def quadratic_value(eigenvalues: Tensor, w: Tensor, epsilon: float, delta: float) -> float:
    """Return the value for a quadratic loss: E rise = sigma^2 tr(H) / 2."""
    square = 2 * epsilon / eigenvalues.sum().item()
    return w.square().sum().item() / (4 * square) + math.log(2 * len(eigenvalues) / delta)


def test_a_quadratic_loss(with_spectrum: Callable[..., Engine]) -> None:
    eigenvalues = 3 * 0.8 ** torch.arange(40.0).double()
    engine = with_spectrum(eigenvalues, 400)
    estimate = pac_bayes(engine, metric="identity", epsilon=0.3, delta=0.05)
    truth = quadratic_value(eigenvalues, engine.params[0], 0.3, 0.05)
    spread = estimate.value.std().item()
    assert bool(estimate.converged.all())
    assert 0 < spread < 0.03 * truth
    assert abs(estimate.value.mean().item() - truth) < 4 * spread / 20 + 1e-3 * truth
    assert bool((estimate.stderr <= 0.02 * estimate.value).all())


@pytest.mark.parametrize(("draws", "tolerance"), [(40, 1e-9), (256, 0.02)], ids=["few pairs", "until the tolerance"])
def test_its_interval_covers(repeated: Callable[[int], Any], draws: int, tolerance: float) -> None:
    engine = repeated(400).engine()
    estimate = pac_bayes(engine, max_draws=draws, tolerance=tolerance)
    d = engine.scale("filter")
    square = (engine.params[0] / d[0]).square().sum().item()
    constant = math.log(2 * 23 / 1e-6)
    near = math.sqrt(square / 4 / (estimate.value.mean().item() - constant))
    noise = d * engine.vectors("normal", "another stream", 0, 150)
    base = engine.losses()[0]
    logs = torch.tensor([math.log(near) + step for step in (-0.1, 0.0, 0.1)], dtype=torch.float64)
    rises = torch.stack(
        [torch.stack([engine.losses_at(way * log.exp() * noise) for way in (1, -1)]).mean() - base for log in logs]
    ).log()
    root = logs[1] + 0.2 * (math.log(0.1) - rises[1]) / (rises[2] - rises[0])
    truth = square / 4 * math.exp(-2 * root.item()) + constant
    pairs = estimate.samples.double() / 2
    quantile = torch.tensor([student.ppf(0.975, n - 1) for n in pairs.tolist()])
    inside = (estimate.value - truth).abs() <= quantile * estimate.stderr
    assert 0.90 <= inside.double().mean().item() <= 0.99
    spread = estimate.value.std().item()
    assert 0 < spread < 0.2 * truth
    assert abs(estimate.value.mean().item() - truth) < 4 * spread / 20 + 0.01 * (truth - constant)


def test_the_control_pays(with_spectrum: Callable[..., Engine]) -> None:
    eigenvalues = 3 * 0.8 ** torch.arange(60.0).double()
    engine = with_spectrum(eigenvalues, 50)
    estimate = pac_bayes(engine, metric="identity", tolerance=0.01, max_draws=400)
    plain = pac_bayes(engine, metric="identity", tolerance=1e-9, max_draws=48)  # too few for a control
    needed = 24 * (plain.stderr / (0.01 * plain.value)).square().mean().item()
    assert bool(estimate.converged.all())
    assert (estimate.samples / 2).mean().item() < 0.3 * needed


def test_the_prior_at_the_initial_weights(mlp: Any) -> None:
    whole = mlp.engine()
    start = whole.params + 0.3 * torch.randn_like(whole.params)
    engine = Engine(whole.network, whole.params, whole.buffers, whole.batches, mlp.keys, initial=start)
    zero, initial = (pac_bayes(engine, prior=prior, max_draws=40, tolerance=1e-9) for prior in ("zero", "initial"))
    d, constant = engine.scale("filter"), math.log(2 * 23 / 1e-6)
    ratio = ((whole.params - start) / d).square().sum(dim=1) / (whole.params / d).square().sum(dim=1)
    value = (initial.value - constant) / (zero.value - constant)
    torch.testing.assert_close(value, ratio, rtol=1e-9, atol=0)
    with pytest.raises(FlatminError, match="initial weights"):
        pac_bayes(whole, prior="initial")


def test_dead_filters(mlp: Any) -> None:
    """They lie at a prior at zero, and infinitely far from one elsewhere."""
    whole = mlp.engine()
    params = whole.params.clone()
    params[:, 0:4], params[:, 20] = 0.0, 0.0
    engine = Engine(whole.network, params, whole.buffers, whole.batches, mlp.keys, initial=whole.params + 0.1)
    assert bool((engine.scale("filter")[:, :4] == 0).all())
    zero, initial = pac_bayes(engine), pac_bayes(engine, prior="initial")
    assert bool(zero.value.isfinite().all())
    assert bool(zero.converged.all())
    assert bool(initial.value.isnan().all())
    assert not bool(initial.converged.any())


def test_balancing_by_hand_changes_nothing(mlp: Any) -> None:
    """A network whose filters were divided by their norms, and its outputs multiplied by them, has metric identity."""
    module = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
    params, _ = StackedNetwork.stack([module])
    batch = Batch(mlp.x, mlp.y[:1], shared=True)
    engine = Engine(StackedNetwork(module), params, {}, [batch], mlp.keys[:1])
    d = engine.scale("filter")

    class Balanced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter((params / d)[0])

        def forward(self, x: Tensor) -> Tensor:
            w = self.weight * d[0]
            return torch.relu(x @ w[:20].reshape(5, 4).T) @ w[20:].reshape(3, 5).T

    balanced, _ = StackedNetwork.stack([Balanced()])
    by_hand = Engine(StackedNetwork(Balanced()), balanced, {}, [batch], mlp.keys[:1])
    assert pac_bayes(by_hand, metric="identity").value.item() == pytest.approx(pac_bayes(engine).value.item(), rel=1e-9)


def test_published_settings_are_ten_draws_and_not_converged(mlp: Any) -> None:
    estimate = pac_bayes(mlp.engine(), max_draws=10, tolerance=1e-6)
    good = pac_bayes(mlp.engine())
    assert estimate.samples.tolist() == [10] * 4
    assert not bool(estimate.converged.any())
    assert bool(((estimate.value - good.value).abs() < 6 * (estimate.stderr + good.stderr)).all())


def test_two_draws_have_no_error(mlp: Any) -> None:
    estimate = pac_bayes(mlp.engine(), max_draws=2)
    assert bool(estimate.stderr.isnan().all())
    assert not bool(estimate.converged.any())


def test_little_memory(mlp: Any) -> None:
    tight, wide = (pac_bayes(mlp.engine(memory=memory), max_draws=512) for memory in (0, 2**31))
    assert bool(tight.converged.all())
    assert bool(((tight.value - wide.value).abs() < 5 * (tight.stderr + wide.stderr)).all())


class Scalar(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], start: float = 0.3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.function(self.weight).expand(len(x), 1), torch.zeros_like(x)], dim=1)


def engine_of(function: Callable[[Tensor], Tensor]) -> Engine:
    params, buffers = StackedNetwork.stack([Scalar(function)])
    batch = Batch(torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), shared=True)
    return Engine(StackedNetwork(Scalar(function)), params, buffers, [batch], torch.tensor([0]))


def test_a_loss_that_never_rises_by_epsilon() -> None:
    estimate = pac_bayes(engine_of(torch.tanh), epsilon=10.0)
    assert estimate.value.isnan().item()
    assert not estimate.converged.item()


def test_a_loss_that_is_not_finite_is_too_far() -> None:
    """A wall at three times the weight: no sigma that throws a draw over it may be the answer."""

    def wall(w: Tensor) -> Tensor:
        return torch.where(w.abs() < 0.9, -w.square(), torch.nan)

    found = pac_bayes(engine_of(wall), epsilon=1e-3, metric="identity")
    assert found.value.isfinite().item()
    none = pac_bayes(engine_of(wall), epsilon=10.0, metric="identity")
    assert none.value.isnan().item()
    assert not none.converged.item()


def test_a_wall_below_the_first_sigma_and_a_loss_that_falls_first() -> None:
    def near_wall(w: Tensor) -> Tensor:
        return torch.where((w - 0.3).abs() < 1e-4, -1e6 * (w - 0.3).square(), torch.inf)

    def falls_first(w: Tensor) -> Tensor:
        return (w - 0.3).square() - (w - 0.3) ** 4

    for function, epsilon, least, most in ((near_wall, 1e-4, 1e-6, 1e-4), (falls_first, 0.1, 0.6, 2.0)):
        engine = engine_of(function)
        estimate = pac_bayes(engine, epsilon=epsilon, metric="identity")
        norm = estimate.value.item() - math.log(2 / 1e-6)
        assert least < 0.3 / math.sqrt(4 * norm) < most


def test_models_that_are_not_finite_or_all_zero(mlp: Any) -> None:
    whole = mlp.engine()
    params = whole.params.clone()
    params[1, 3] = math.nan
    params[2] = 0.0
    engine = Engine(whole.network, params, whole.buffers, whole.batches, mlp.keys)
    estimate, sound = pac_bayes(engine), pac_bayes(whole)
    assert estimate.value.isnan().tolist() == [False, True, True, False]
    assert not bool(estimate.converged[1:3].any())
    torch.testing.assert_close(estimate.value[[0, 3]], sound.value[[0, 3]], rtol=1e-9, atol=0)
