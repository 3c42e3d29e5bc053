"""Noise of their own for parts of the examples: against plain loops, and intervals against the truth."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from tests.sharpness.conftest import near_a_minimum
from torch import Tensor, nn

from flatmin.sharpness import Engine, Estimate, measure_stack
from flatmin.sharpness.average_sharpness import average_sharpness
from flatmin.sharpness.estimate import fewest, stratified_mean
from flatmin.sharpness.lpf import lpf
from flatmin.sharpness.lpf_gap import lpf_gap
from flatmin.sharpness.lpf_relative import lpf_relative
from flatmin.sharpness.pac_bayes import pac_bayes
from flatmin.sharpness.sampling import edges
from flatmin.stack import Batch, StackedNetwork

PLACES, CLASSES = 16, 3
Rows = list[list[dict[str, Any]]]


class Places(nn.Module):
    """A perceptron at each of 16 places, and the mean of its outputs: every weight is used 16 times an example."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x).mean(dim=1)
        return result


def fitted(examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network of 43 weights near a minimum, and its examples."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, x = Places(), torch.randn(examples, PLACES, 4, dtype=torch.float64)
        y = (x.mean(dim=1) @ torch.randn(4, CLASSES, dtype=torch.float64)).argmax(dim=1)
        y = torch.where(torch.rand(examples) < 0.2, torch.randint(CLASSES, (examples,)), y)
    near_a_minimum(module, x, y)
    return module, x, y


def copies(examples: int, count: int, cuts: tuple[int, ...] = (), **options: Any) -> Engine:
    """Return an engine of copies of one model that differ in their streams alone."""
    module, x, y = fitted(examples)
    params, _ = StackedNetwork.stack([module] * count)
    bounds = [0, *cuts, examples]
    batches = [Batch(x[a:b], y[a:b].expand(count, -1), shared=True) for a, b in pairwise(bounds)]
    return Engine(StackedNetwork(module), params, {}, batches, torch.arange(count), **options)


def by_hand(engine: Engine, k: int, noise: Tensor) -> Tensor:
    """Return the mean loss of each stratum of model k under its row of noise `[P, d]`, by the module itself."""
    x = torch.cat([batch.x for batch in engine.batches])
    y = torch.cat([batch.y[k] for batch in engine.batches])
    bounds, module = [*edges(len(x), engine.strata), len(x)], copy.deepcopy(engine.network.template)
    losses = []
    for own, (a, b) in zip(noise, pairwise(bounds), strict=True):
        nn.utils.vector_to_parameters(engine.params[k] + own, module.parameters())
        losses.append(nn.functional.cross_entropy(module(x[a:b]), y[a:b]))
    return torch.stack(losses).detach()


def assert_alike(whole: Rows, other: Rows) -> None:
    """Assert that model 2 has the same rows, but for rounding."""
    for row, twin in zip(whole, other, strict=True):
        assert twin[2]["value"] == pytest.approx(row[2]["value"], rel=1e-9)
        assert twin[2]["stderr"] == pytest.approx(row[2]["stderr"], rel=1e-6)
        assert twin[2]["samples"] == row[2]["samples"]


def test_the_mean_of_strata_and_its_error() -> None:
    ys = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    mean, error = stratified_mean(ys, torch.zeros_like(ys), shares)
    torch.testing.assert_close(mean, ys.mean(dim=0))
    variance = sum(shares[p].item() ** 2 * ys[:, p].var(dim=0) / 5 for p in range(3))
    torch.testing.assert_close(error.square(), variance)
    assert bool(stratified_mean(ys[:1], ys[:1], shares)[1].isnan().all())


def test_the_control_of_strata_is_unbiased_and_pays() -> None:
    """Two draws of 16 strata, the least there may be, over 20,000 models: skewed controls of mean zero."""
    generator, shape = torch.Generator().manual_seed(0), (2, 16, 20_000)
    xs = torch.randn(shape, generator=generator, dtype=torch.float64).square() - 1
    ys = 3 * xs + 0.3 * xs.square() + 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    shares = torch.full((16,), 1 / 16, dtype=torch.float64)
    mean, error = stratified_mean(ys, xs, shares)
    value, truth = mean.mean(dim=0), 0.3 * 2
    assert abs(value.mean().item() - truth) < 4 * value.std().item() / math.sqrt(20_000)
    plain, _ = stratified_mean(ys, torch.zeros_like(xs), shares)
    assert value.var().item() < 0.35 * plain.mean(dim=0).var().item()
    assert 0.8 <= (error.square().mean() / value.var()).item() <= 1.3


@pytest.mark.parametrize("cuts", [(), (7, 100, 101, 250)])
def test_losses_of_strata_are_those_of_their_examples(cuts: tuple[int, ...]) -> None:
    engine = copies(301, 3, cuts)
    assert engine.strata == 18
    noise = 0.3 * engine.vectors("normal", "any", 0, 18)
    found = engine.losses_of_strata(noise, range(18), torch.tensor([True, False, True]))
    assert found.isnan().any(dim=0).tolist() == [False, True, False]
    for k in (0, 2):
        torch.testing.assert_close(found[:, k], by_hand(engine, k, noise[:, k]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("measure", "start"), [(lpf, False), (lpf_gap, True), (lpf_relative, True)])
def test_a_value_and_those_without_a_part_are_sums_over_strata(measure: Any, start: bool) -> None:
    engine = copies(301, 2, (130,), population=900)
    shares = torch.tensor([b - a for a, b in pairwise([*edges(301, 18), 301])]).double() / 301
    noise = 0.3 * engine.scale("filter") * engine.vectors("normal", "perturbation of strata", 0, 2 * 18)
    found = measure(engine, sigma=0.3, tolerance=1e-9, max_samples=2)
    assert found.samples.tolist() == [36, 36]
    assert found.passes.tolist() == [2 + start] * 2
    assert found.without is not None
    for k in range(2):
        each = torch.stack([by_hand(engine, k, noise[first : first + 18, k]) for first in (0, 18)])
        centre = by_hand(engine, k, torch.zeros_like(noise[:18, k])) if start else torch.zeros_like(shares)
        divisor = (shares * centre).sum() if measure is lpf_relative else torch.tensor(1.0)
        value = (shares * (each.mean(dim=0) - centre)).sum() / divisor
        error = (shares.square() * each.var(dim=0) / 2).sum().sqrt() / divisor
        torch.testing.assert_close(found.value[k], value, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.stderr[k], error, rtol=1e-9, atol=0)
        for p in (0, 9, 17):
            kept = torch.arange(18) != p
            below = (shares * centre)[kept].sum() / shares[kept].sum() if measure is lpf_relative else 1.0
            less = (shares * (each.mean(dim=0) - centre))[kept].sum() / shares[kept].sum() / below
            torch.testing.assert_close(found.without[p, k], less, rtol=1e-9, atol=0)


def test_values_do_not_depend_on_cuts_memory_neighbours_or_other_measures() -> None:
    labels = ["lpf_gap(sigma=0.1)", "pac_bayes"]
    whole = measure_stack(copies(301, 4), labels)
    others = [
        measure_stack(copies(301, 4, (3, 140)), ["lpf", *labels])[1:],
        measure_stack(copies(301, 4, memory=8 * 43 * 40), labels),
        [[row] * 4 for (row,) in measure_stack(copies(301, 4).select(torch.tensor([2])), labels)],
    ]
    for other in others:
        assert_alike(whole, other)


def test_draws_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = copies(301, 1), 0
    inner = engine.losses_of_strata

    def counted(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += len(arguments[1])
        made: Tensor = inner(*arguments)
        return made

    monkeypatch.setattr(engine, "losses_of_strata", counted)
    lpf(engine, max_samples=2)
    assert calls == 2 * 18
    for measure in (lpf_gap, lpf_relative):
        measure(engine, max_samples=2)
    assert calls == 3 * 18, "and once more for the loss at the centre"


def test_few_examples_or_few_uses_of_a_weight_have_no_strata(mlp: Any) -> None:
    assert copies(255, 1).strata == 0
    assert copies(256, 1).strata == 16
    assert copies(1600, 1).strata == 32
    assert mlp.engine().strata == 0
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    params, _ = StackedNetwork.stack([module])
    counts = []
    for examples in (300, 6000):
        batch = Batch(torch.randn(examples, 4), torch.zeros(1, examples, dtype=torch.int64), shared=True)
        counts.append(Engine(StackedNetwork(module), params, {}, [batch], torch.arange(1)).strata)
    assert counts == [0, 32], "an MLP uses a weight once an example"
    assert [fewest(16, strata) for strata in (1, 16, 32)] == [16, 2, 2]


def test_one_stratum_that_is_not_finite_undoes_its_model_alone() -> None:
    engine = copies(301, 3)
    engine.params[1, 3] = math.nan
    sound = copies(301, 3)
    for measure in (lpf, lpf_gap, pac_bayes):
        estimate, expected = measure(engine), measure(sound)
        assert estimate.value.isnan().tolist() == [False, True, False]
        assert estimate.converged.tolist() == [True, False, True]
        torch.testing.assert_close(estimate.value[[0, 2]], expected.value[[0, 2]], rtol=1e-9, atol=0)


def rise(engine: Engine, sigma: float, metric: Any, pairs: int) -> tuple[float, float]:
    """Return the mean rise of the loss under noise of another stream, less what a dense Hessian tells of it."""
    count, d, losses, curved = engine.strata, engine.scale(metric), [], []
    one = engine.select(torch.tensor([0]))
    a = d[0] * d[0][:, None] * one.hvps(torch.eye(engine.n_params, dtype=torch.float64)[:, None])[:, 0]
    for j in range(pairs):
        u = engine.vectors("normal", "another stream", j * count, count)
        sides = [engine.losses_of_strata(way * sigma * d * u, range(count)) for way in (1, -1)]
        losses.append(torch.stack(sides).mean(dim=(0, 1)))
        curved.append(((u @ a) * u).sum(dim=2).mean(dim=0) - a.diagonal().sum())
    rises, x = torch.stack(losses).flatten() - engine.losses()[0], torch.stack(curved).flatten()
    slope = (x * (rises - rises.mean())).sum() / (x - x.mean()).square().sum()
    left = rises - slope * x
    return left.mean().item(), left.std().item() / math.sqrt(len(left))


def true_pac_bayes(engine: Engine, near: float) -> tuple[float, float]:
    """Return the value of `pac_bayes`, from the rises at three sigmas near the root, and its standard error."""
    (low, _), (middle, blur), (high, _) = (rise(engine, near * factor, "filter", 2) for factor in (0.9, 1.0, 1.1))
    power = math.log(high / low) / math.log(1.1 / 0.9)
    root = math.log(near) + math.log(0.1 / middle) / power
    square = (engine.params[0] / engine.scale("filter")[0]).square().sum().item()
    norm = square / 4 * math.exp(-2 * root)
    return norm + math.log(2 * 256 / 1e-6), 2 * norm * blur / middle / power


MEASURES: dict[str, tuple[Callable[..., Estimate], dict[str, Any]]] = {
    "lpf": (lpf, {"sigma": 0.3}),
    "lpf in pairs": (lpf, {"sigma": 0.3, "tolerance": 0.006}),
    "lpf_gap": (lpf_gap, {"sigma": 0.05}),
    "average_sharpness": (average_sharpness, {"sigma": 0.2}),
    "pac_bayes": (pac_bayes, {}),
    "pac_bayes of few pairs": (pac_bayes, {"tolerance": 0.06}),
}
QUICK = ("lpf", "lpf_gap", "pac_bayes")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MEASURES]
)
def test_intervals_cover(name: str) -> None:
    """95 % intervals of 150 seeds hold the truth, which other draws tell."""
    (measure, options), seeds = MEASURES[name], 150
    engine = copies(256, seeds)
    estimate = measure(engine, **options)
    if measure is pac_bayes:
        d, constant = engine.scale("filter")[0], math.log(2 * 256 / 1e-6)
        square = (engine.params[0] / d).square().sum().item()
        truth, blur = true_pac_bayes(engine, math.sqrt(square / 4 / (estimate.value.mean().item() - constant)))
    else:
        truth, blur = rise(engine, options["sigma"], "element" if measure is average_sharpness else "filter", 4)
        truth += engine.losses()[0].item() if measure is lpf else 0.0
    spread = estimate.value.std().item()
    assert bool(estimate.converged.all())
    assert blur < 0.4 * spread, "the truth must be known better than the estimates"
    curved = 0.005 * truth if measure is pac_bayes else 0.0
    assert abs(estimate.value.mean().item() - truth) < 4 * math.hypot(spread / math.sqrt(seeds), blur) + curved
    quantile = student.ppf(0.975, estimate.samples.double().mean().item() / 2)
    inside = ((estimate.value - truth).abs() <= float(quantile) * estimate.stderr).double().mean().item()
    assert 0.90 <= inside <= 0.99
    assert 0.85 <= (estimate.stderr.square().mean().sqrt() / spread).item() <= 1.2


def test_draws_count_once_in_the_error_of_a_subset() -> None:
    """Half of 640 examples at a noise that rules: were it counted twice, the error would be 1.2 times as large."""
    engine = copies(640, 200)
    (rows,) = measure_stack(engine, ["lpf(sigma=2, max_samples=2, subset=320)"])
    values, errors = (
        torch.tensor([row[column] for row in rows], dtype=torch.float64) for column in ("value", "stderr")
    )
    assert 0.9 <= (errors.square().mean().sqrt() / values.std()).item() <= 1.1
    ((alone, *_),) = measure_stack(copies(320, 1), ["lpf(sigma=2, max_samples=2)"])
    assert alone["stderr"] > 0.8 * values.std().item(), "the noise does rule"
