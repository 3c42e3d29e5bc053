"""shannon_entropy and random: measures that look at no neighbourhood of the weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor, nn

from flatmin.errors import FlatminError, RequestError
from flatmin.labels import parse_label
from flatmin.sharpness import Engine, measure
from flatmin.sharpness.random import random
from flatmin.sharpness.shannon_entropy import shannon_entropy
from flatmin.stack import Batch, StackedNetwork


def test_the_entropy_is_that_of_the_predicted_classes(problem: Any) -> None:
    engine = problem.engine((5,))
    estimate = shannon_entropy(engine)
    for k in range(len(engine)):
        p: Tensor = problem.modules[k].eval()(problem.x).softmax(dim=1)
        expected = -(p * p.log()).sum(dim=-1).mean().item()
        assert estimate.value[k].item() == pytest.approx(expected, rel=1e-9)
    assert estimate.stderr.tolist() == [0.0] * len(engine)
    assert estimate.passes.tolist() == [1.0] * len(engine)


def test_the_entropy_of_one_who_knows_nothing_and_of_one_who_knows_all(mlp: Any) -> None:
    whole = mlp.engine()
    nothing = Engine(whole.network, torch.zeros_like(whole.params), {}, whole.batches, mlp.keys)
    assert shannon_entropy(nothing).value.tolist() == pytest.approx([math.log(3)] * 4, rel=1e-12)
    certain = Engine(whole.network, 1e6 * whole.params, {}, whole.batches, mlp.keys)
    estimate = shannon_entropy(certain)
    assert estimate.value.tolist() == pytest.approx([0.0] * 4, abs=1e-9)
    assert bool(estimate.converged.all())


def test_pixels_are_averaged() -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.conv(x)
            return result

    module, x = Pixels(), torch.randn(5, 1, 4, 4, dtype=torch.float64)
    frame = measure(module, "cross_entropy", (x, torch.zeros(5, 4, 4, dtype=torch.int64)), ["shannon_entropy"])
    p = module(x).softmax(dim=1).movedim(1, -1)
    assert frame["value"][0] == pytest.approx(-(p * p.log()).sum(dim=-1).mean().item(), rel=1e-9)


def test_a_regression_has_no_entropy() -> None:
    x = torch.randn(8, 3)
    with pytest.raises(FlatminError, match=r"shannon_entropy failed: logits of two classes or more.*got \[.*, 1\]"):
        measure(nn.Linear(3, 1), nn.MSELoss(), (x, torch.randn(8, 1)), ["shannon_entropy"])


def test_random_is_standard_normal_and_belongs_to_the_stream() -> None:
    module, count = nn.Linear(2, 2).double(), 2000
    params, _ = StackedNetwork.stack([module] * count)
    batch = Batch(torch.zeros(3, 2, dtype=torch.float64), torch.zeros(count, 3, dtype=torch.int64), shared=True)
    engine = Engine(StackedNetwork(module), params, {}, [batch], torch.arange(count))
    estimate = random(engine)
    assert kstest(estimate.value.numpy(), "norm").pvalue > 1e-3
    assert len(set(estimate.value.tolist())) == count
    assert bool(estimate.converged.all())
    assert estimate.passes.abs().sum() == 0
    some = random(engine.select(torch.tensor([17, 3])))
    assert some.value.tolist() == estimate.value[[17, 3]].tolist()
    other = Engine(StackedNetwork(module), params + 1e-9, {}, [batch], torch.arange(count))
    assert not set(random(other).value.tolist()) & set(estimate.value.tolist()), "models of one seed differ"
    broken = random(Engine(StackedNetwork(module), engine.params * torch.nan, {}, engine.batches, engine.keys))
    assert bool(broken.value.isnan().all())
    assert not bool(broken.converged.any())


def test_what_they_do_not_look_at_is_refused() -> None:
    for label in ("random(data=test)", "random(subset=100)", "random(loss=squared_error)"):
        with pytest.raises(RequestError, match=r"random does not take .*: it looks at no"):
            parse_label(label)
    with pytest.raises(RequestError, match="shannon_entropy does not take 'loss': it is a function of the outputs"):
        parse_label("shannon_entropy(loss=squared_error)")
    assert parse_label("shannon_entropy(subset=100, data=test)").label == "shannon_entropy(data=test, subset=100)"
