"""What the engine says of outputs: functions of them, their derivatives along directions, single examples' slopes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from flatmin.errors import FlatminError
from flatmin.sharpness import Engine
from flatmin.stack import Batch, StackedNetwork

CUTS = (5, 6)


def outputs_of(problem: Any, k: int, flat: Tensor) -> Tensor:
    module = problem.modules[k].eval()
    named = dict(module.named_parameters())
    pieces = torch.split(flat, [parameter.numel() for parameter in named.values()])
    own = {name: piece.reshape(named[name].shape) for name, piece in zip(named, pieces, strict=True)}
    result: Tensor = functional_call(module, own, (problem.x,))
    return result


def entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    logs = outputs.log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_functions_of_outputs(problem: Any, vectorize: Any) -> None:
    engine = problem.engine(CUTS)
    engine.network.vectorize = vectorize
    found = engine.per_example(entropy)
    assert found.dtype == torch.float64
    for k in range(len(engine)):
        assert torch.allclose(found[k], entropy(outputs_of(problem, k, engine.params[k]), problem.y[k]), rtol=1e-12)
    assert torch.allclose(engine.per_example(engine.loss).mean(dim=1), engine.losses(), rtol=1e-12)


def test_functions_of_outputs_elsewhere_and_of_some_models(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatmin.sharpness.engine._ACTIVATION_BYTES", {"cpu": 1})
    engine, active = mlp.engine(CUTS), torch.tensor([True, False, True, True])
    moved = engine.params + 0.1
    found = engine.per_example(lambda outputs, targets: outputs, moved, active)
    assert found.shape == (4, 23, 3)
    assert torch.allclose(found[2], outputs_of(mlp, 2, moved[2]), rtol=1e-12)
    assert bool(found[1].isnan().all())
    assert engine.per_example(entropy, active=torch.zeros(4, dtype=torch.bool)).isnan().all()


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_outputs_change_along_directions_as_the_jacobian_says(problem: Any, vectorize: Any) -> None:
    engine = problem.engine(CUTS)
    engine.network.vectorize = vectorize
    v = torch.randn(2, len(engine), engine.n_params, dtype=torch.float64)
    active = torch.arange(len(engine)) != 1
    for c in range(3):
        found = engine.per_example_along(v, lambda outputs, tangents, targets, c=c: tangents[:, c], active)
        for k in torch.nonzero(active).flatten().tolist():
            jacobian = jacrev(lambda flat, k=k: outputs_of(problem, k, flat))(engine.params[k])
            assert torch.allclose(found[:, k], v[:, k] @ jacobian[:, c].T, rtol=1e-9, atol=1e-12)
        assert bool(found[:, 1].isnan().all())


def test_the_true_fisher_is_a_mean_over_examples(problem: Any) -> None:
    engine = problem.engine(CUTS)
    v = torch.randn(1, len(engine), engine.n_params, dtype=torch.float64)

    def quadratic(outputs: Tensor, tangents: Tensor, targets: Tensor) -> Tensor:
        p = outputs.softmax(dim=1)
        return (p * tangents.square()).sum(dim=1) - (p * tangents).sum(dim=1).square()

    found = engine.per_example_along(v, quadratic).mean(dim=2)[0]
    for k in range(len(engine)):
        jacobian = jacrev(lambda flat, k=k: outputs_of(problem, k, flat))(engine.params[k])
        p = outputs_of(problem, k, engine.params[k]).softmax(dim=1)
        middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        fisher = torch.einsum("bci,bcd,bdj->ij", jacobian, middle, jacobian) / len(p)
        assert found[k].item() == pytest.approx((v[0, k] @ fisher @ v[0, k]).item(), rel=1e-10)


def test_slopes_are_those_of_each_examples_loss(problem: Any) -> None:
    engine = problem.engine(CUTS)
    v = torch.randn(2, len(engine), engine.n_params, dtype=torch.float64)
    found = engine.slopes(v)
    assert torch.allclose(found.mean(dim=2), (v * engine.gradient()).sum(dim=2), rtol=1e-9)
    single = [Batch(batch.x[:1], batch.y[:, :1], shared=True) for batch in engine.batches]
    alone = Engine(engine.network, engine.params, engine.buffers, single[:1], engine.keys)
    assert torch.allclose(found[:, :, 0], (v * alone.gradient()).sum(dim=2), rtol=1e-9)


def test_initial_weights_are_handed_on_and_missed(mlp: Any) -> None:
    engine = mlp.engine()
    given = {"network": engine.network, "buffers": {}, "batches": engine.batches, "keys": mlp.keys}
    with pytest.raises(FlatminError, match="the initial weights are needed, and were not given"):
        engine.initial_weights()
    start = torch.randn_like(engine.params)
    known = Engine(params=engine.params, initial=start, **given)
    assert torch.equal(known.initial_weights(), start)
    assert torch.equal(known.select(torch.tensor([2, 0])).initial_weights(), start[[2, 0]])
    lost = Engine(params=engine.params, no_initial="and the disk is full", **given)
    with pytest.raises(FlatminError, match="needed, and the disk is full"):
        lost.initial_weights()
    with pytest.raises(ValueError, match="initial weights must be"):
        Engine(params=engine.params, initial=start[:, 1:], **given)


def engine_of(module: nn.Module, loss: Any = None, x: Tensor | None = None) -> Engine:
    params, buffers = StackedNetwork.stack([module])
    batch = Batch(torch.randn(9, 4) if x is None else x, torch.randint(3, (1, 9)), shared=True)
    more = {} if loss is None else {"loss": loss}
    return Engine(StackedNetwork(module), params, buffers, [batch], torch.tensor([0]), **more)


class Random(nn.Linear):
    """A layer with dropout that is left on, whatever the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


class Detached(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_network_that_is_random_in_eval_mode_is_refused(vectorize: Any) -> None:
    module, state = Random(4, 3), torch.get_rng_state()
    params, buffers = StackedNetwork.stack([module])
    batch = Batch(torch.zeros(9, 4), torch.zeros(1, 9, dtype=torch.int64), shared=True)
    with pytest.raises(FlatminError, match="random"):
        Engine(StackedNetwork(module, vectorize), params, buffers, [batch], torch.tensor([0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_and_training_mode_do_not_matter() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3))
    x = torch.randn(9, 4)
    quiet = engine_of(module.train(), loss=lambda outputs, targets: outputs.sum(dim=1), x=x)
    assert quiet.losses().item() == pytest.approx(module.eval()(x).sum(dim=1).mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("module", "loss", "message"),
    [
        (Detached(4, 3), None, "the network's output does not depend on the weights"),
        (nn.Linear(4, 3), lambda outputs, targets: targets.float(), "the loss does not depend on the weights"),
        (nn.Linear(4, 3), lambda outputs, targets: outputs.mean(), r"one number per example: \[2\], not \[\]"),
        (nn.Linear(5, 3), None, "cannot be evaluated on the examples"),
        (nn.BatchNorm1d(4, track_running_stats=False), None, "normalises by the batch in eval mode"),
    ],
    ids=["output", "loss", "mean", "shape", "batch"],
)
def test_what_cannot_be_measured_is_refused(module: nn.Module, loss: Any, message: str) -> None:
    with pytest.raises(FlatminError, match=message):
        engine_of(module, loss)


def test_examples_on_another_device_are_refused() -> None:
    with pytest.raises(FlatminError, match="examples are on the device 'meta' and the weights on 'cpu'"):
        engine_of(nn.Linear(4, 3), x=torch.randn(9, 4, device="meta"))


def test_large_batches_are_cut_to_fit(mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mlp.engine()
    monkeypatch.setattr("flatmin.sharpness.engine._LEAST_GRAPH_BYTES", 8 * 8 * 13 * 4)
    bounded = mlp.engine(memory=0)
    assert max(batch.y.shape[1] for batch in bounded.batches) == 4
    assert torch.allclose(bounded.gradient(), whole.gradient(), rtol=1e-12)
    assert math.isclose(bounded.losses()[1], whole.losses()[1], rel_tol=1e-12)
