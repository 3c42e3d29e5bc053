from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatmin.errors import RequestError
from flatmin.sharpness import Engine, measure_stack
from flatmin.sharpness.losses import PerExample
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


class Shifted(nn.Module):
    """Its outputs are linear in its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.sum()


def shifted(loss: PerExample) -> Engine:
    params, buffers = StackedNetwork.stack([Shifted()])
    batch = Batch(torch.zeros(3, 4), torch.zeros(1, 3, dtype=torch.int64), shared=True)
    return Engine(StackedNetwork(Shifted()), params, buffers, [batch], torch.tensor([0]), loss=loss)


def test_a_network_without_curvature_has_none() -> None:
    engine = shifted(lambda outputs, targets: outputs.sum(dim=1))
    assert engine.gradient().tolist() == [[4.0, 4.0]]
    assert engine.hvp(torch.ones(1, 2)).tolist() == [[0.0, 0.0]]


def test_a_loss_that_ignores_its_outputs_is_refused() -> None:
    """Also where it hangs on the weights by the graph."""
    with pytest.raises(RequestError, match="the same at the weights and at random ones"):
        shifted(lambda outputs, targets: (0.0 * outputs).sum(dim=1))


def test_a_flat_place_is_measured(mlp: Any) -> None:
    """A network that is certain of every example has no slope at its weights, and one elsewhere."""
    whole, module = mlp.engine(), mlp.modules[0]
    with torch.no_grad():
        module[0].bias.fill_(-1e6)
        module[2].bias.copy_(torch.tensor([1e3, 0.0, 0.0]))
    params, _ = StackedNetwork.stack([module])
    batch = Batch(mlp.x, torch.zeros_like(mlp.y[:1]), shared=True)
    assert not bool(Engine(whole.network, params, {}, [batch], mlp.keys[:1]).gradient().any())


class Mixing(nn.Module):
    """Its outputs for one example depend on the others of a batch."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.mix = nn.Linear(4, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.layer(x))


def by_the_batch(x: Tensor) -> Tensor:
    return nn.functional.batch_norm(x, None, None, training=True)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (lambda x: x - x.mean(dim=0), "depends on the others of its batch"),
        (lambda x: x * (1 + 0.1 * x.softmax(dim=0)), "depends on the others of its batch"),
        (by_the_batch, "cannot be evaluated on one example alone.*Expected more than 1 value"),
    ],
    ids=["centred", "slightly", "batch_norm"],
)
@pytest.mark.parametrize("cuts", [(), tuple(range(1, 23))], ids=["whole", "one by one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_network_that_mixes_examples_is_refused(
    mlp: Any, mix: Any, message: str, cuts: tuple[int, ...], dtype: torch.dtype
) -> None:
    module = Mixing(mix).to(dtype)
    params, _ = StackedNetwork.stack([module])
    batches = [Batch(batch.x.to(dtype), batch.y[:1], shared=True) for batch in mlp.engine(cuts).batches if len(batch.x)]
    with pytest.raises(RequestError, match=message):
        Engine(StackedNetwork(module), params, {}, batches, mlp.keys[:1])


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("rate", [0.5, 1e-3])
def test_dropout_left_on_is_named(mlp: Any, vectorize: Any, rate: float) -> None:
    module = Mixing(lambda x: nn.functional.dropout(x, rate)).double()
    params, _ = StackedNetwork.stack([module])
    with pytest.raises(RequestError, match=r"in eval mode.*dropout left on"):
        Engine(StackedNetwork(module, vectorize), params, {}, [Batch(mlp.x, mlp.y[:1], True)], mlp.keys[:1])


def test_attention_without_a_second_derivative_has_a_way_out(mlp: Any) -> None:
    def attend(x: Tensor) -> Tensor:
        each = x[:, None, :, None].expand(-1, 1, -1, 8).contiguous()
        return nn.functional.scaled_dot_product_attention(each, each, each)[:, 0, :, 0]

    module = Mixing(attend).double()
    params, _ = StackedNetwork.stack([module])
    batch, network = Batch(mlp.x, mlp.y[:1], shared=True), StackedNetwork(module, "loop")
    engine, v = Engine(network, params, {}, [batch], mlp.keys[:1]), torch.ones(1, network.n_params)
    for product in (engine.hvp, lambda v: engine.slopes(v[None])):
        with pytest.raises(RequestError, match=r"no second derivative.*SDPBackend\.MATH"):
            product(v)
    with sdpa_kernel(SDPBackend.MATH):
        assert bool(Engine(network, params, {}, [batch], mlp.keys[:1]).hvp(v).any())


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
