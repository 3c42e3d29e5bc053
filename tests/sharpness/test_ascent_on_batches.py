"""What follows the gradient, on batches of the examples: means over batches, and chains of Langevin steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import chi
from tests.sharpness.conftest import METRICS, engine_of
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from flatmin.sharpness import Engine
from flatmin.sharpness.local_entropy_gradient import local_entropy_gradient
from flatmin.sharpness.sam_sharpness import sam_sharpness
from flatmin.sharpness.worst_sharpness import worst_sharpness


def many_examples(models: int, examples: int = 1000) -> tuple[Engine, nn.Module, Tensor, Tensor]:
    """Return copies of one smooth model on more examples, which differ in their streams alone."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        x, y = torch.randn(examples, 3, dtype=torch.float64), torch.randint(3, (examples,))
    return engine_of([module] * models, x, y), module, x, y


def batch_gradients(module: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """Return the gradients `[S, d]` of the batches of examples `index`, `[S, b]`."""
    named: dict[str, Tensor] = dict(module.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(module, weights, (x,)), y)

    found = vmap(grad(loss), in_dims=(None, 0, 0))(named, x[index], y[index])
    return torch.cat([found[name].flatten(1) for name in named], dim=1).detach()


def test_the_mean_over_batches_covers_that_over_all_batches(coverage: Any) -> None:
    engine, module, x, y = many_examples(400)
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(1000, generator=generator)[:8] for _ in range(20_000)])
    slopes = (engine.scale("element")[0] * batch_gradients(module, x, y, index)).norm(dim=1)
    truth = 2.0 * slopes.mean().item()
    estimate = sam_sharpness(
        engine, kind="first_order", metric="element", radius=2.0, batch=8, tolerance=0.1, max_samples=40
    )
    assert bool(estimate.converged.all())
    spread = estimate.value.std().item()
    assert abs(estimate.value.mean().item() - truth) < 4 * spread / 20 + 8 * slopes.std().item() / math.sqrt(20_000)
    assert 0.90 <= coverage(estimate, truth) <= 0.99
    torch.testing.assert_close(estimate.passes, 2.0 * 8 / 1000 * estimate.samples.double())
    whole = sam_sharpness(engine, kind="first_order", metric="element", radius=2.0)
    assert whole.value[0].item() < 0.5 * truth, "batches see another, larger gradient"


def test_worst_over_batches_is_the_mean_of_theirs() -> None:
    engine, _, _, _ = many_examples(1, 200)
    estimate = worst_sharpness(engine, radius=0.05, batch=11, tolerance=1e-9, max_samples=18)
    assert not estimate.converged.item()
    values = torch.cat([worst_sharpness(part, radius=0.05, batch=None).value for part in engine.sample(198).groups(18)])
    assert estimate.value.item() == pytest.approx(values.mean().item(), rel=1e-9)
    assert estimate.stderr.item() >= (values.std() / math.sqrt(18)).item() * (1 - 1e-9)
    assert estimate.passes.item() == pytest.approx(43.0 * 198 / 200)


def test_a_set_of_few_batches_is_shuffled_anew(coverage: Any) -> None:
    """Two batches of 20 are in 50 examples without one in both: more come from other orders, and are as random."""
    engine, module, x, y = many_examples(400, 50)
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(50, generator=generator)[:20] for _ in range(20_000)])
    truth = (engine.scale("element")[0] * batch_gradients(module, x, y, index)).norm(dim=1).mean().item()
    estimate = sam_sharpness(
        engine, kind="first_order", metric="element", radius=1.0, batch=20, tolerance=0.05, max_samples=400
    )
    assert bool(estimate.converged.all())
    assert abs(estimate.value.mean().item() - truth) < 5 * estimate.value.std().item() / 20
    assert 0.90 <= coverage(estimate, truth) <= 0.99
    for measure in (worst_sharpness, local_entropy_gradient):
        assert measure(engine.select(torch.arange(2)), batch=20, tolerance=10.0).converged.tolist() == [True, True]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("times_gamma", [True, False])
def test_the_chain_without_noise(problem: Any, metric: Any, times_gamma: bool) -> None:
    engine = problem.engine((6,))
    estimate = local_entropy_gradient(
        engine, gamma=0.3, metric=metric, batch=None, times_gamma=times_gamma, steps=7, langevin_noise=0.0
    )
    for k in range(len(engine)):
        loss, flat = problem.loss_of(k)
        d = engine.scale(metric)[k]
        u = mean = torch.zeros_like(d)
        for _ in range(7):
            u = u - 0.1 * (d * grad(loss)(flat + d * u) + 0.3 * u)
            mean = 0.75 * mean + 0.25 * u
        expected = (0.3 if times_gamma else 1.0) * mean.norm().item()
        assert estimate.value[k].item() == pytest.approx(expected, rel=1e-9)
    assert estimate.samples.tolist() == [16] * len(engine)
    assert estimate.passes.tolist() == [16 * 7 * 2.0] * len(engine)
    assert bool((estimate.stderr < 1e-12).all())


def test_a_chain_on_a_flat_loss_is_noise(mlp: Any) -> None:
    """After one step mu = (1 - alpha) sqrt(2 eta) eps z, whose norm follows a chi distribution of d degrees."""
    flat = mlp.engine().with_loss(lambda outputs, targets: 1e-200 * outputs.sum(dim=1))
    options: dict[str, Any] = {"metric": "identity", "times_gamma": False, "steps": 1, "langevin_noise": 0.5}
    estimate = local_entropy_gradient(flat, tolerance=1e-9, max_samples=48, **options)
    of_one = chi(flat.n_params)
    unit = 0.25 * math.sqrt(2 * 0.1) * 0.5
    allowed = 4 * unit * of_one.std() / math.sqrt(4 * 48)
    assert estimate.value.mean().item() == pytest.approx(unit * of_one.mean(), abs=allowed)


@pytest.mark.parametrize("batch", [None, 8], ids=["noise", "noise and batches"])
def test_the_chains_interval_covers(coverage: Any, batch: int | None) -> None:
    (engine, *_), (others, *_) = (many_examples(400, 40 if batch is None else 1000) for _ in range(2))
    others.keys = others.keys + 1000
    options: dict[str, Any] = {"batch": batch, "steps": 5, "langevin_noise": 0.2}
    truth = local_entropy_gradient(others, tolerance=1e-9, max_samples=24, **options).value.mean().item()
    estimate = local_entropy_gradient(engine, tolerance=0.1, max_samples=24, **options)
    assert abs(estimate.value.mean().item() - truth) < 4 * math.sqrt(2) * estimate.value.std().item() / 20
    assert 0.90 <= coverage(estimate, truth) <= 0.99


def test_chains_on_the_noise_of_batches_move_further() -> None:
    engine, _, _, _ = many_examples(1, 200)
    batches = local_entropy_gradient(engine, batch=8)
    whole = local_entropy_gradient(engine, batch=None)
    assert whole.value.item() < 0.5 * batches.value.item()


def test_a_first_chain_that_is_lost_by_all_models_is_the_last(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    gradient_at = Engine.gradient_at

    def counted(self: Engine, displacement: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(len(self))
        return gradient_at(self, displacement)

    monkeypatch.setattr(Engine, "gradient_at", counted)
    estimate = local_entropy_gradient(mlp.engine(), batch=5, langevin_lr=1e200)
    assert not bool(estimate.value.isfinite().any())
    assert set(rows) == {4}, "one chain of each model"
    rows.clear()
    assert bool(local_entropy_gradient(mlp.engine(), batch=5, steps=2).value.isfinite().all())
    assert sum(rows) >= 2 * 16 * 4
