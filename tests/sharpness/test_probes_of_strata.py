"""Probes of their own for parts of the examples, and for pairs of parts: against dense Hessians of each part."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from tests.sharpness.test_strata import assert_alike, copies
from torch import Tensor

from flatmin.sharpness import Engine, measure_stack, probes_of_strata
from flatmin.sharpness.hessian_frobenius import _root, hessian_frobenius
from flatmin.sharpness.hessian_trace import hessian_trace
from flatmin.sharpness.lanczos import krylov
from flatmin.sharpness.probes_of_strata import PairsOfStrata, traces_of_strata
from flatmin.sharpness.sampling import edges
from flatmin.stack import Batch, permutation, stream_key

LENGTH = 5


def hessians(engine: Engine, k: int) -> tuple[Tensor, Tensor]:
    """Return the Hessian of model k on each stratum alone, times the stratum's share, `[P, d, d]`, and the shares."""
    x = torch.cat([batch.x for batch in engine.batches])
    y = torch.cat([batch.y for batch in engine.batches], dim=1)
    one = engine.select(torch.tensor([k]))
    basis, found, shares = torch.eye(engine.n_params, dtype=torch.float64)[:, None], [], []
    for a, b in pairwise([*edges(len(x), engine.strata), len(x)]):
        batch = Batch(x[a:b], y[k : k + 1, a:b], shared=True)
        part = Engine(engine.network, one.params, {}, [batch], one.keys)
        shares.append((b - a) / len(x))
        found.append(shares[-1] * part.hvps(basis)[:, 0])
    return torch.stack(found), torch.tensor(shares, dtype=torch.float64)


def scaled(engine: Engine, k: int) -> tuple[Tensor, Tensor]:
    """Return f_p D H_p D of model k in the filter metric, and the shares f."""
    found, shares = hessians(engine, k)
    d = engine.scale("filter")[k]
    return d[:, None] * found * d, shares


def outside(engine: Engine, k: int) -> Tensor:
    """Return I - Q Q^T of model k, which the engine's Krylov space must hold already."""
    eye = torch.eye(engine.n_params, dtype=torch.float64)
    return krylov(engine, "filter").deflate(eye[:, None].expand(-1, len(engine), -1), LENGTH)[:, k]


@pytest.mark.parametrize("memory", [2**31, 0], ids=["graphs kept", "graphs made anew"])
@pytest.mark.parametrize("cuts", [(), (7, 100, 101, 250)])
def test_products_of_strata_are_those_of_their_examples(cuts: tuple[int, ...], memory: int) -> None:
    engine = copies(301, 2, cuts, memory=memory)
    assert engine.strata == 18
    vectors = engine.vectors("normal", "any", 0, 3)
    each = torch.stack([engine.products_of_stratum(vectors, stratum) for stratum in range(18)])
    torch.testing.assert_close(each.sum(dim=0), engine.hvps(vectors), rtol=1e-11, atol=1e-13)
    for k in range(2):
        expected = torch.einsum("pde,se->psd", hessians(engine, k)[0], vectors[:, k])
        torch.testing.assert_close(each[:, :, k], expected, rtol=1e-10, atol=1e-13)


def test_draws_are_those_of_dense_hessians() -> None:
    engine, active = copies(301, 2), torch.ones(2, dtype=torch.bool)
    traces = traces_of_strata(engine, "filter", LENGTH)
    pairs = PairsOfStrata(engine, "filter", LENGTH)
    found, squares = traces(0, 3, active), torch.cat([pairs.draw(0, 16, active), pairs.draw(16, 3, active)])
    assert (found.shape, squares.shape) == ((3, 18, 2), (19, 2))
    for k in range(2):
        (parts, shares), z = scaled(engine, k), outside(engine, k)
        for p in (0, 17):
            probes = engine.vectors("rademacher", f"probe of stratum {p}", 0, 3)[:, k] @ z
            expected = torch.einsum("sd,de,se->s", probes, parts[p], probes) / shares[p]
            torch.testing.assert_close(found[:, p, k], expected, rtol=1e-9, atol=1e-12)
        for j in (0, 18):
            turn, place = divmod(j, 9)
            p, q = permutation(stream_key("pairs of strata", turn), 18)[2 * place : 2 * place + 2].tolist()
            probe = engine.vectors("rademacher", "probe of a pair", j, 1)[0, k] @ z
            a, b = parts[p] @ probe, parts[q] @ probe
            torch.testing.assert_close(squares[j, k], 9 * (a @ a + b @ b) + 18 * 17 * (a @ b), rtol=1e-9, atol=1e-12)


def test_a_square_is_the_mean_over_all_pairs() -> None:
    """Of all probes and pairs: E over p != q of what a pair tells is |A Z|^2, with and without a stratum."""
    engine = copies(301, 1)
    pairs = PairsOfStrata(engine, "filter", LENGTH)
    draws = 2000
    found = pairs.draw(0, draws, torch.ones(1, dtype=torch.bool))[:, 0]
    (parts, shares), z = scaled(engine, 0), outside(engine, 0)
    truth = (parts.sum(dim=0) @ z).square().sum().item()
    assert abs(found.mean().item() - truth) < 4 * found.std().item() / draws**0.5
    without = pairs.without(torch.tensor([draws]))[:, 0]
    for p in (0, 9):
        less = ((parts.sum(dim=0) - parts[p]) @ z).square().sum().item() / (1 - shares[p].item()) ** 2
        assert abs(without[p].item() - less) < 5 * found.std().item() / draws**0.5
    assert found.std().item() / draws**0.5 < 0.1 * truth, "it must be known well enough to be told from the whole"


def over_pairs(monkeypatch: pytest.MonkeyPatch, engine: Engine, taken: Callable[[Engine], Tensor]) -> Tensor:
    """Return what is taken of models, twenty at a time, each twenty with pairs of strata of their own."""
    found = []
    for seed, rows in enumerate(torch.split(torch.arange(len(engine)), 20)):
        monkeypatch.setattr(probes_of_strata, "permutation", lambda key, n, seed=seed: permutation(key ^ seed, n))
        found.append(taken(engine.select(rows)))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(("measure", "fewest"), [(hessian_trace, 8 + 2 * 16), (hessian_frobenius, 8 + 16)])
@pytest.mark.parametrize("tolerance", [pytest.param(1e-9, marks=pytest.mark.slow), 0.05])
def test_intervals_cover(monkeypatch: pytest.MonkeyPatch, measure: Any, fewest: int, tolerance: float) -> None:
    """95 % intervals of 400 seeds hold the value of the dense Hessian."""

    def taken(engine: Engine) -> Tensor:
        made = measure(engine, tolerance=tolerance, max_samples=20)
        return torch.stack([made.value, made.stderr, made.samples.double(), made.passes])

    engine = copies(256, 400)
    value, stderr, samples, passes = over_pairs(monkeypatch, engine, taken)
    truth = measure(engine.select(torch.tensor([0])), max_samples=engine.n_params)
    assert truth.stderr.item() == 0
    assert samples.min().item() >= fewest
    assert passes.max().item() <= 4 * 20
    spread, off = value.std().item(), value.mean().item() - truth.value.item()
    assert abs(off) < (4 * spread / 20 if measure is hessian_trace else 0.3 * spread), "a root of a mean is biased"
    quantile = float(student.ppf(0.975, samples.mean().item() - 9))
    inside = ((value - truth.value).abs() <= quantile * stderr).double().mean().item()
    assert 0.90 <= inside <= 0.99
    assert 0.85 <= (stderr.square().mean().sqrt() / spread).item() <= 1.2


@pytest.mark.parametrize("measure", ["hessian_trace", "hessian_frobenius"])
def test_intervals_of_a_subset_cover(monkeypatch: pytest.MonkeyPatch, measure: str) -> None:
    """95 % intervals of 320 of 960 examples, 200 seeds, hold the value of all examples."""

    def taken(engine: Engine) -> Tensor:
        (rows,) = measure_stack(engine, [f"{measure}(max_samples=30, subset=320)"])
        return torch.tensor([[row[name] for row in rows] for name in ("value", "stderr")], dtype=torch.float64)

    engine = copies(960, 200)
    values, errors = over_pairs(monkeypatch, engine, taken)
    ((whole, *_),) = measure_stack(engine.select(torch.tensor([0])), [measure])
    assert whole["stderr"] == 0
    inside = ((values - whole["value"]).abs() <= 1.96 * errors).double().mean().item()
    assert 0.90 <= inside <= 0.99
    assert 0.9 <= (errors.square().mean().sqrt() / values.std()).item() <= 1.25


@pytest.mark.parametrize("measure", ["hessian_trace", "hessian_frobenius"])
def test_draws_count_once_in_the_error_of_a_subset(monkeypatch: pytest.MonkeyPatch, measure: str) -> None:
    """A sixth of 3072 examples and one Krylov vector: the draws rule, which the jackknife holds once or twice more."""
    monkeypatch.setattr(probes_of_strata, "_LENGTH", 1)
    label = f"{measure}(max_samples=5, subset=512)"

    def taken(engine: Engine) -> Tensor:
        (rows,) = measure_stack(engine, [label])
        return torch.tensor([[row[name] for row in rows] for name in ("value", "stderr")], dtype=torch.float64)

    values, errors = over_pairs(monkeypatch, copies(3072, 160), taken)
    told = errors.square().mean().sqrt().item()
    assert 0.85 <= told / values.std().item() <= 1.3
    alone = measure_stack(copies(512, 1), [f"{measure}(max_samples=5)"])[0][0]["stderr"]
    assert alone > 0.5 * told, "the draws do rule"


@pytest.mark.parametrize("measure", ["hessian_trace", "hessian_frobenius"])
@pytest.mark.parametrize("subset", [200, 320], ids=["no strata", "strata"])
def test_a_subset_of_models_that_are_not_finite_is_undefined(measure: str, subset: int) -> None:
    engine = copies(640, 2)
    engine.params[:] = torch.nan
    (rows,) = measure_stack(engine, [f"{measure}(max_samples=30, subset={subset})"])
    assert [(row["value"], row["converged"]) for row in rows] == [(None, False)] * 2


def test_a_square_that_comes_out_below_zero_is_zero_and_goes_on() -> None:
    value, stderr = _root(torch.tensor([-0.5, 4.0, torch.nan]), torch.tensor([1.0, 1.0, 1.0]))
    assert value[:2].tolist() == [0.0, 2.0]
    assert stderr[:2].tolist() == [1.0, 0.25], "with an error that no tolerance of a value of 0 allows"
    assert bool(value[2].isnan())


def test_values_do_not_depend_on_cuts_memory_neighbours_or_other_measures() -> None:
    labels = ["hessian_trace(max_samples=30)", "hessian_frobenius(max_samples=30)"]
    whole = measure_stack(copies(301, 4), labels)
    others = [
        measure_stack(copies(301, 4, (3, 140)), ["lambda_max", "lpf", *labels])[2:],
        measure_stack(copies(301, 4, memory=8 * 43 * 40), labels),
        measure_stack(copies(301, 4), labels[::-1])[::-1],
        [[row] * 4 for (row,) in measure_stack(copies(301, 4).select(torch.tensor([2])), labels)],
    ]
    for other in others:
        assert_alike(whole, other)


@pytest.mark.parametrize("measure", [hessian_trace, hessian_frobenius])
def test_a_model_that_is_not_finite_is_undefined_and_alone(measure: Any) -> None:
    engine = copies(301, 3)
    engine.params[1, 3] = torch.nan
    estimate, expected = measure(engine, max_samples=30), measure(copies(301, 3), max_samples=30)
    assert estimate.value.isnan().tolist() == [False, True, False]
    assert not estimate.converged[1].item()
    torch.testing.assert_close(estimate.value[[0, 2]], expected.value[[0, 2]], rtol=1e-9, atol=0)


@pytest.mark.parametrize("measure", [hessian_trace, hessian_frobenius])
@pytest.mark.parametrize("most", [1, 2])
def test_a_budget_too_small_says_so(measure: Any, most: int) -> None:
    estimate = measure(copies(301, 2), max_samples=most)
    assert not estimate.converged.any()
    assert bool((estimate.passes <= 4 * most).all())
