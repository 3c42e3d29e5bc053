from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from flatmin.errors import RequestError
from flatmin.sharpness import measure
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.fisher_rao import fisher_rao
from flatmin.sharpness.losses import squared_error
from flatmin.stack import Batch, StackedNetwork


def outputs_and_jacobian(problem: Any, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs `[n, c]`, their Jacobian `[n, c, d]` and the flat weights of model k."""
    module = problem.modules[k].eval()
    named = dict(module.named_parameters())
    flat = nn.utils.parameters_to_vector(module.parameters()).detach()

    def outputs(vector: Tensor) -> Tensor:
        pieces = torch.split(vector, [parameter.numel() for parameter in named.values()])
        own = {name: piece.reshape(named[name].shape) for name, piece in zip(named, pieces, strict=True)}
        result: Tensor = functional_call(module, own, (problem.x,))
        return result

    return outputs(flat).detach(), jacrev(outputs)(flat).detach(), flat


def test_the_true_fisher_is_the_expectation_over_predictions(problem: Any) -> None:
    engine = problem.engine((6,))
    estimate = fisher_rao(engine)
    assert estimate.stderr.tolist() == [0.0] * len(engine)
    for k in range(len(engine)):
        outputs, jacobian, w = outputs_and_jacobian(problem, k)
        p = outputs.softmax(dim=1)
        total = 0.0
        for c in range(outputs.shape[1]):
            towards = torch.eye(outputs.shape[1], dtype=torch.float64)[c] - p
            gradients = (towards[:, :, None] * jacobian).sum(dim=1)
            total += (p[:, c] * (gradients @ w).square()).mean().item()
        assert estimate.value[k].item() == pytest.approx(total, rel=1e-9)


def test_the_empirical_fisher_takes_the_labels(problem: Any) -> None:
    estimate = fisher_rao(problem.engine((6,)), fisher="empirical")
    for k in range(len(estimate.value)):
        outputs, jacobian, w = outputs_and_jacobian(problem, k)
        towards = nn.functional.one_hot(problem.y[k], 3) - outputs.softmax(dim=1)
        gradients = (towards[:, :, None] * jacobian).sum(dim=1)
        fisher = gradients.T @ gradients / len(gradients)
        assert estimate.value[k].item() == pytest.approx((w @ fisher @ w).item(), rel=1e-9)


def test_the_hessian_form_is_the_published_one(problem: Any) -> None:
    """On the balanced network, w / D and D H D."""
    engine = problem.engine((6,))
    estimate = fisher_rao(engine, fisher="hessian")
    for k in range(len(engine)):
        d = engine.scale("filter")[k]
        balanced = engine.params[k] / d
        truth = balanced @ (d[:, None] * problem.hessian(k) * d) @ balanced
        assert estimate.value[k].item() == pytest.approx(truth.item(), rel=1e-9)


def test_the_squared_error_is_a_gaussian(mlp: Any) -> None:
    """Of variance q / 2 for q outputs: p proportional to exp(-loss)."""
    engine = mlp.engine().with_loss(squared_error)
    estimate = fisher_rao(engine)
    _, jacobian, w = outputs_and_jacobian(mlp, 0)
    truth = (2 / 3 * (jacobian @ w).square().sum(dim=1)).mean().item()
    assert estimate.value[0].item() == pytest.approx(truth, rel=1e-9)


def test_a_loss_without_a_distribution_is_refused(mlp: Any) -> None:
    def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - nn.functional.one_hot(targets, 3)).pow(4).sum(dim=1)

    engine = mlp.engine().with_loss(quartic)
    with pytest.raises(RequestError, match="fisher=empirical"):
        fisher_rao(engine)
    assert bool(fisher_rao(engine, fisher="empirical").converged.all())


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), reduction="none")


@pytest.mark.parametrize("cut", ["whole", "one by one", "by class", "one class"])
@pytest.mark.parametrize("kind", ["weighted", "huber"])
def test_no_cut_of_the_examples_hides_a_dependence_on_the_labels(mlp: Any, kind: str, cut: str) -> None:
    x, y = mlp.x, mlp.y[0].clamp(max=1 if cut == "one class" else 2)
    y = torch.ones_like(y) if cut == "one class" else y
    targets = y if kind == "weighted" else nn.functional.one_hot(y, 3).double()
    parts = {"whole": [x[:, 0] < torch.inf], "by class": [y == c for c in range(3)]}.get(cut, [])
    batches = [(x[part], targets[part]) for part in parts] or list(zip(x.split(1), targets.split(1), strict=True))
    loss = WEIGHTED if kind == "weighted" else nn.HuberLoss(delta=0.5)
    with pytest.raises(RequestError, match="depends on the labels"):
        measure(mlp.modules[0], loss, batches, ["fisher_rao"])


@pytest.mark.parametrize("targets", ["classes", "probabilities"])
@pytest.mark.parametrize("alike", [True, False])
def test_every_cut_of_a_likelihood_gives_the_same(mlp: Any, targets: str, alike: bool) -> None:
    y = torch.ones_like(mlp.y[0]) if alike else mlp.y[0]
    given = y if targets == "classes" else 0.1 + 0.7 * nn.functional.one_hot(y, 3).double()
    for data in ((mlp.x, given), list(zip(mlp.x.split(1), given.split(1), strict=True))):
        frame = measure(mlp.modules[0], "cross_entropy", data, ["fisher_rao"])
        assert frame["value"][0] == pytest.approx(fisher_rao(mlp.engine()).value[0].item(), rel=1e-9)


def test_a_torch_loss_will_do(mlp: Any) -> None:
    frame = measure(mlp.modules[0], nn.CrossEntropyLoss(), (mlp.x, mlp.y[0]), ["fisher_rao"])
    assert frame["value"][0] == pytest.approx(fisher_rao(mlp.engine()).value[0].item(), rel=1e-9)


@pytest.mark.parametrize("fisher", ["true", "empirical", "hessian"])
def test_rescaled_layers_change_nothing(mlp: Any, fisher: Any) -> None:
    module = mlp.modules[0]
    parts = [parameter.detach() for parameter in module.parameters()]
    scaled = [4 * parts[0], 4 * parts[1], parts[2] / 4, parts[3]]
    params = torch.stack([torch.cat([part.flatten() for part in each]) for each in (parts, scaled)])
    batch = Batch(mlp.x, mlp.y[:1].expand(2, -1), shared=True)
    engine = Engine(StackedNetwork(module), params, {}, [batch], mlp.keys[:2])
    value = fisher_rao(engine, fisher=fisher).value
    assert value[0].item() == pytest.approx(value[1].item(), rel=1e-9)


@pytest.mark.parametrize("fisher", ["true", "empirical", "hessian"])
def test_models_that_are_not_finite_or_all_zero(mlp: Any, fisher: Any) -> None:
    whole = mlp.engine()
    params = whole.params.clone()
    params[1, 3] = math.nan
    params[2] = 0.0
    engine = Engine(whole.network, params, whole.buffers, whole.batches, mlp.keys)
    estimate = fisher_rao(engine, fisher=fisher)
    assert estimate.value.isnan().tolist() == [False, True, False, False]
    assert estimate.converged.tolist() == [True, False, True, True]
    assert estimate.value[2].item() == 0.0
