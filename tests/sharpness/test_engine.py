from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatmin.sharpness import Engine, measure_stack
from flatmin.stack import Batch, StackedNetwork

ALL = ["lpf", "lpf(sigma=0.3)", "hessian_trace(max_samples=30)", "lambda_max", "eps_sharpness"]
CUTS = [(), (5, 6), (10,)]


def close(left: Tensor, right: Tensor, tolerance: float = 1e-12) -> bool:
    return bool(((left - right).norm() <= tolerance * right.norm()).item())


@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("memory", [0, 2**31], ids=["rebuilt", "kept"])
def test_losses_gradients_and_products_are_exact(problem: Any, cuts: tuple[int, ...], memory: int) -> None:
    engine = problem.engine(cuts, memory)
    v = torch.randn(3, len(engine), engine.n_params, dtype=torch.float64)
    products, gradient, losses = engine.hvps(v), engine.gradient(), engine.losses()
    for k in range(len(engine)):
        loss, flat = problem.loss_of(k)
        assert close(losses[k], loss(flat))
        assert close(gradient[k], problem.gradient(k))
        assert close(products[:, k], v[:, k] @ problem.hessian(k))
    assert torch.equal(engine.hvp(v[1]), products[1])


def test_many_displacements_are_many_losses(problem: Any) -> None:
    engine = problem.engine((9,))
    moves = 0.1 * torch.randn(7, len(engine), engine.n_params, dtype=torch.float64)
    at_once = engine.losses_at(moves)
    for s, move in enumerate(moves):
        assert close(at_once[s], engine.losses(engine.params + move))


def test_few_rows_at_once_give_the_same(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = 0.1 * torch.randn(5, 4, 43, dtype=torch.float64)
    whole = mlp.engine()
    monkeypatch.setattr("flatmin.sharpness.engine._ACTIVATION_BYTES", {"cpu": 1})
    rows = mlp.engine()
    assert close(rows.losses_at(moves), whole.losses_at(moves))
    assert close(rows.hvps(moves), whole.hvps(moves))
    assert close(rows.gradient(), whole.gradient())


def test_only_active_models_are_evaluated(mlp: Any) -> None:
    engine, active = mlp.engine(), torch.tensor([True, False, True, False])
    moves = torch.zeros(2, 4, 43)
    for losses in (engine.losses(active=active), engine.losses_at(moves, active)[1]):
        assert close(losses[active], engine.losses()[active])
        assert bool(losses[~active].isnan().all())


def test_nothing_is_changed(problem: Any) -> None:
    engine = problem.engine((9,))
    params, buffers = engine.params.clone(), {name: b.clone() for name, b in engine.buffers.items()}
    state = torch.get_rng_state()
    measure_stack(engine, ALL)
    assert torch.equal(engine.params, params)
    assert all(torch.equal(engine.buffers[name], buffer) for name, buffer in buffers.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not engine.params.requires_grad


def test_a_model_is_measured_alike_in_any_company(problem: Any) -> None:
    engine = problem.engine()
    together = measure_stack(engine, ALL)
    backwards = measure_stack(engine.select(torch.arange(len(engine)).flip(0)), ALL)
    alone = [measure_stack(engine.select(torch.tensor([k])), ALL) for k in range(len(engine))]
    for row, reverse, singles in zip(together, backwards, zip(*alone, strict=True), strict=True):
        for k in range(len(engine)):
            for other in (reverse[-1 - k], singles[k][0]):
                assert other["value"] == pytest.approx(row[k]["value"], rel=1e-9)
                assert other["samples"] == row[k]["samples"]
                assert other["passes"] == row[k]["passes"]


def test_the_order_of_measures_changes_nothing(mlp: Any) -> None:
    forwards = measure_stack(mlp.engine(), ALL)
    backwards = measure_stack(mlp.engine(), ALL[::-1])[::-1]
    for rows, others in zip(forwards, backwards, strict=True):
        for row, other in zip(rows, others, strict=True):
            assert {**row, "seconds": 0} == {**other, "seconds": 0}


def test_random_vectors_are_numbered(mlp: Any) -> None:
    engine = mlp.engine()
    whole = engine.vectors("normal", "a", 0, 6)
    assert torch.equal(engine.vectors("normal", "a", 4, 2), whole[4:])
    assert not torch.equal(engine.vectors("normal", "b", 0, 6), whole)
    assert set(engine.vectors("rademacher", "a", 0, 6).unique().tolist()) == {-1.0, 1.0}
    assert abs(whole.mean().item()) < 0.15
    assert whole.std().item() == pytest.approx(1.0, abs=0.1)


def test_portions_cover_all_and_are_bounded(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatmin.sharpness.engine._VECTOR_BYTES", {"cpu": 8 * 4 * 43 * 3})
    assert list(mlp.engine().portions(5, 8)) == [(5, 3), (8, 3), (11, 2)]


def test_half_precision_is_widened(mlp: Any) -> None:
    whole = mlp.engine()
    batch = Batch(mlp.x.bfloat16(), mlp.y, shared=True)
    engine = Engine(whole.network, whole.params.bfloat16(), {}, [batch], mlp.keys)
    assert engine.params.dtype == torch.float32
    assert close(engine.losses(), whole.losses(), 0.02)


def test_a_network_without_curvature_has_none() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.0 * self.weight.sum()

    params, buffers = StackedNetwork.stack([Constant()])
    batch = Batch(torch.zeros(3, 4), torch.zeros(1, 3, dtype=torch.int64), shared=True)
    engine = Engine(StackedNetwork(Constant()), params, buffers, [batch], torch.tensor([0]))
    assert engine.hvp(torch.ones(1, 2)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": torch.zeros(4, 42)}, r"weights must be \[K, 43\], got \(4, 42\)"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, r"keys must be int64 \[4\]"),
        ({"keys": torch.zeros(4)}, r"keys must be int64 \[4\]"),
        ({"batches": []}, "no examples"),
        ({"batches": [Batch(torch.zeros(0, 4), torch.zeros(4, 0, dtype=torch.int64), True)]}, "no examples"),
        ({"batches": [Batch(torch.zeros(2, 4), torch.zeros(1, 2, dtype=torch.int64), True)]}, "all 4 models"),
    ],
)
def test_what_does_not_fit_is_refused(mlp: Any, change: dict[str, Any], message: str) -> None:
    whole = mlp.engine()
    given = {"params": whole.params, "buffers": {}, "batches": whole.batches, "keys": mlp.keys, **change}
    with pytest.raises(ValueError, match=message):
        Engine(whole.network, **given)


def test_a_network_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        StackedNetwork(nn.ReLU())
