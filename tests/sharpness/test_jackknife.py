"""The sampling error of a subset: values without each part against measuring again, and intervals against the truth."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.sharpness.conftest import near_a_minimum
from torch import Tensor, nn

from flatmin import plugins
from flatmin.sharpness import Engine, Estimate, measure_stack
from flatmin.sharpness.jackknife import mean_of_first, replicates, sampling_variance
from flatmin.sharpness.products import product
from flatmin.sharpness.sampling import edges
from flatmin.stack import Batch, StackedNetwork

SHARED = [
    ("shannon_entropy", {}),
    ("fisher_rao", {"fisher": "true"}),
    ("fisher_rao", {"fisher": "empirical"}),
    ("fisher_rao", {"fisher": "hessian"}),
    ("hessian_trace", {}),
    ("hessian_frobenius", {}),
    ("lpf", {"tolerance": 1.0}),
    ("lpf_gap", {"tolerance": 1.0}),
    ("lpf_relative", {"tolerance": 1.0}),
    ("lpf_relative", {"tolerance": 1.0, "absolute": True}),
    ("average_sharpness", {"tolerance": 1.0, "normalise_logits": True}),
    ("local_entropy", {"tolerance": 1.0}),
]
"""Measures whose value without a part is that of the other examples with the same random vectors, to rounding."""


def fitted(examples: int, activation: type[nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network of 43 weights that fits a teacher's classes, a third of them random, and the examples."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 3)).double()
        x = torch.randn(examples, 4, dtype=torch.float64)
        y = (x @ torch.randn(4, 3, dtype=torch.float64)).argmax(dim=1)
        y = torch.where(torch.rand(examples) < 0.3, torch.randint(3, (examples,)), y)
    near_a_minimum(module, x, y)
    return module, x, y


def copies(
    examples: int,
    count: int,
    *,
    memory: int = 2**31,
    population: int | None = None,
    activation: type[nn.Module] = nn.Tanh,
) -> Engine:
    """Return an engine of copies of one model that differ in their streams alone, its examples in two batches."""
    module, x, y = fitted(examples, activation)
    params, _ = StackedNetwork.stack([module] * count)
    cut = examples // 3
    batches = [Batch(x[part], y[part].expand(count, -1), shared=True) for part in (slice(cut), slice(cut, None))]
    keys = torch.arange(count)
    return Engine(StackedNetwork(module), params, {}, batches, keys, memory=memory, population=population)


def less(sample: Engine, start: int, stop: int) -> Engine:
    """Return a whole set: the examples of a sample but those from `start` to `stop`."""
    x, y = (
        torch.cat([getattr(batch, name) for batch in sample.batches], dim=dim) for name, dim in (("x", 0), ("y", 1))
    )
    kept = torch.cat([torch.arange(start), torch.arange(stop, sample.n_examples)])
    batch = Batch(x[kept], y[:, kept], shared=True)
    return Engine(sample.network, sample.params, {}, [batch], sample.keys)


def take(engine: Engine, name: str, **arguments: Any) -> Estimate:
    found: Estimate = plugins.get("measure", name).load()(engine, **arguments)
    return found


def test_replicates_are_means_without_a_part() -> None:
    values = torch.arange(10.0, dtype=torch.float64).square()
    bounds = [*edges(10, 4), 10]
    parts = torch.stack([values[a:b].sum() / 10 for a, b in pairwise(bounds)])
    shares = torch.tensor([2, 3, 2, 3]).double() / 10
    found = replicates(parts, shares)
    assert found[0].item() == pytest.approx(values.mean().item())
    for p, (a, b) in enumerate(pairwise(bounds)):
        assert found[1 + p].item() == pytest.approx(torch.cat([values[:a], values[b:]]).mean().item())


def test_the_variance_of_a_mean_is_that_of_survey_sampling() -> None:
    values = torch.randn(50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, *without = replicates(values / 50, torch.full((50,), 1 / 50, dtype=torch.float64))
    found = sampling_variance(whole, torch.stack(without), torch.full((50,), 1 / 50, dtype=torch.float64), 0.75)
    assert found.item() == pytest.approx((values.var() / 50 * 0.75).item(), rel=1e-9)


def test_the_bias_of_a_square_is_found() -> None:
    """Of the square of a mean it is the mean's variance, which the jackknife finds exactly."""
    values = torch.randn(40, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shares = torch.full((40,), 1 / 40, dtype=torch.float64)
    whole, *without = (made.square() for made in replicates(values / 40, shares))
    found = sampling_variance(whole, torch.stack(without), shares, 1.0)
    spread = 39 / 40 * (torch.stack(without) - torch.stack(without).mean(dim=0)).square().sum()
    assert found.item() == pytest.approx((spread + (values.var() / 40).square()).item(), rel=1e-6)


def test_the_mean_of_the_first() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [torch.nan, 9.0]])
    assert mean_of_first(values, torch.tensor([2, 3])).tolist() == [2.0, 5.0]


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU], ids=["recorded", "written out"])
@pytest.mark.parametrize(("name", "arguments"), SHARED)
def test_a_value_without_a_part_is_that_of_the_other_examples(
    name: str, arguments: dict[str, Any], activation: type[nn.Module]
) -> None:
    sample = copies(150, 2, population=1000, activation=activation)
    bounds = [*edges(150, sample.parts), 150]
    found = take(sample, name, **arguments)
    assert found.without is not None
    assert found.without.shape == (16, 2)
    for p in (0, 7, 15):
        expected = take(less(sample, bounds[p], bounds[p + 1]), name, **arguments)
        assert found.without[p].tolist() == pytest.approx(expected.value.tolist(), rel=1e-8)
    assert found.value.tolist() == pytest.approx(take(less(sample, 0, 0), name, **arguments).value.tolist(), rel=1e-8)


@pytest.mark.parametrize(
    ("name", "arguments"), [("lambda_max", {"tolerance": 1e-9}), ("pac_bayes", {"tolerance": 1.0})]
)
def test_other_values_without_a_part_are_close_to_it(name: str, arguments: dict[str, Any]) -> None:
    """To a seventh of how much a part changes them: lambda_max to second order, pac_bayes by a line in log sigma."""
    sample = copies(150, 1, population=1000)
    bounds = [*edges(150, sample.parts), 150]
    found = take(sample, name, **arguments)
    assert found.without is not None
    whole = take(less(sample, 0, 0), name, **arguments).value
    expected = torch.cat([take(less(sample, a, b), name, **arguments).value for a, b in pairwise(bounds)])
    changes, ours = expected - whole, found.without[:, 0] - found.value
    assert (ours - changes).norm().item() <= 0.15 * changes.norm().item()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU], ids=["recorded", "written out"])
@pytest.mark.parametrize("graphs", [True, False], ids=["kept", "rebuilt"])
def test_products_without_a_part(graphs: bool, activation: type[nn.Module]) -> None:
    sample = copies(150, 2, population=1000, activation=activation)
    sample._keeps_graphs = graphs
    bounds, d = [*edges(150, sample.parts), 150], sample.scale("filter")
    v = sample.vectors("normal", "any", 0, 3)
    found = product(sample, d, v)
    for p, (a, b) in enumerate([(0, 0), *pairwise(bounds)]):
        expected = product(less(sample, a, b), d, v)
        assert torch.allclose(found.along[:, p], expected.along[:, 0], rtol=1e-9)
        assert torch.allclose(found.square[:, p], expected.square[:, 0], rtol=1e-9)
    assert torch.allclose(found.of_all, product(less(sample, 0, 0), d, v).of_all, rtol=1e-9)


def test_a_subset_costs_its_share_and_no_more() -> None:
    """Draws of a subset get 0.7 of the tolerance, and the rest is for what drawing it adds."""
    labels = ["lpf(sigma=0.1, tolerance={})", "hessian_trace", "fisher_rao", "lambda_max(tolerance={})"]
    whole = measure_stack(copies(150, 1), [label.format(0.014) for label in labels])
    part = measure_stack(copies(150, 1, population=600), [label.format(0.02) for label in labels])
    further = {"lambda_max": 4.0}
    for (one,), (other,) in zip(whole, part, strict=True):
        assert other["samples"] == one["samples"]
        assert other["passes"] == pytest.approx((one["passes"] + further.get(one["measure"], 0.0)) / 4)
        assert other["value"] == pytest.approx(one["value"], rel=1e-9)
        assert other["stderr"] > one["stderr"]


def test_little_memory_takes_groups_in_place_of_parts() -> None:
    assert copies(150, 1, population=600).parts == 16
    engine = copies(150, 1, population=600, memory=8 * 43 * 15)
    assert engine.parts == 0
    (rows,) = measure_stack(engine, ["lpf(sigma=0.1)"])
    assert rows[0]["stderr"] > 0
    assert rows[0]["passes"] > rows[0]["samples"] / 4


def test_a_model_whose_parts_are_not_finite_has_no_stderr() -> None:
    engine = copies(150, 2, population=600)
    engine.params[1] = 1e200
    (rows,) = measure_stack(engine, ["lpf(sigma=0.1)"])
    assert rows[0]["stderr"] is not None
    assert (rows[1]["value"], rows[1]["stderr"]) == (None, None)


TRUTHS = {
    "lpf": ("sigma=0.1", "sigma=0.1, tolerance=0.001, max_samples=4000"),
    "lpf_gap": ("sigma=0.1", "sigma=0.1, tolerance=0.003, max_samples=4000"),
    "pac_bayes": ("", "tolerance=0.003, max_draws=4000"),
    "hessian_trace": ("max_samples=40", ""),
    "hessian_frobenius": ("max_samples=40", ""),
    "lambda_max": ("", "tolerance=1e-9"),
    "fisher_rao": ("fisher=hessian", "fisher=hessian"),
    "shannon_entropy": ("", ""),
    "local_entropy": ("", "tolerance=0.002, max_samples=4000"),
    "average_sharpness": ("", "tolerance=0.003, max_samples=4000"),
}


SLOW = ("lpf_gap",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TRUTHS]
)
def test_the_interval_of_a_subset_holds_the_value_of_all_examples(name: str) -> None:
    """95 % intervals of 200 subsets of 320 of 1600 examples, in float64."""
    engine, (own, exactly) = copies(1600, 200), TRUTHS[name]
    (truth,) = measure_stack(engine.select(torch.tensor([0])), [f"{name}({exactly})"])[0]
    (rows,) = measure_stack(engine, [f"{name}({', '.join(filter(None, [own, 'subset=320']))})"])
    values, errors = (torch.tensor([row[column] for row in rows]) for column in ("value", "stderr"))
    inside = ((values - truth["value"]).abs() <= 1.96 * errors).double().mean().item()
    assert 0.9 <= inside <= 0.99
    assert 0.8 <= (errors.square().mean().sqrt() / values.std()).item() <= 1.7
