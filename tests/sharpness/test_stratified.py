"""Subsets drawn evenly over examples sorted by their loss, and what the intervals of subsets are worth."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from tests.sharpness.test_jackknife import copies
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.sharpness import Engine, measure_stack
from flatmin.sharpness.jackknife import pseudo_values, replicates, sampling_variance, widening
from flatmin.sharpness.sampling import edges, stratified
from flatmin.sharpness.subject import subject
from flatmin.stack import permutation


def skewed(count: int) -> Tensor:
    """Return numbers of which a tenth carries nearly all, as the losses of a network under label noise."""
    numbers = -torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log()
    numbers[count // 10 :] /= 100
    return numbers


def rank(seed: int, count: int) -> Tensor:
    return permutation(seed, count).argsort()


@pytest.mark.parametrize(("count", "parts"), [(24, 4), (22, 4), (40, 7), (64, 16)])
def test_every_part_has_one_example_of_every_block(count: int, parts: int) -> None:
    n = 100
    values = torch.arange(n).double()[rank(3, n)]
    drawn = stratified(values, rank(5, n), count, parts)
    assert len(set(drawn.tolist())) == count
    stops = [0, *(min((h + 1) * parts, count) * n // count for h in range(-(-count // parts)))]
    blocks = [set(range(n - b, n - a)) for a, b in pairwise(stops)]
    for first, last in pairwise([*edges(count, parts), count]):
        own = [int(value) for value in values[drawn[first:last]]]
        hits = [sum(value in block for value in own) for block in blocks]
        assert hits[:-1] == [1] * (len(blocks) - 1)
        assert hits[-1] <= 1
        assert len(own) in (count // parts, -(-count // parts))


def test_the_error_of_a_mean_is_that_of_a_stratified_sample() -> None:
    """Its mean over 2000 draws, the spread of theirs, and what each tells of it are those of the closed form."""
    n, count, parts, draws = 400, 160, 16, 2000
    values = skewed(n)
    near = values * torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    blocks = near.sort(descending=True).indices.tensor_split(count // parts)
    closed = sum((len(b) / n) ** 2 * values[b].var().item() / parts * (1 - parts / len(b)) for b in blocks)
    shares = torch.full((parts,), 1 / parts, dtype=torch.float64)
    means, told = torch.zeros(draws, dtype=torch.float64), torch.zeros(draws, dtype=torch.float64)
    for draw in range(draws):
        chosen = values[stratified(near, rank(draw, n), count, parts)]
        of_parts = chosen.reshape(parts, -1).sum(dim=1, keepdim=True) / count
        whole, *without = replicates(of_parts, shares)
        means[draw] = whole.item()
        told[draw] = sampling_variance(whole, torch.stack(without), shares, 1 - count / n).item()
    assert abs(means.mean().item() - values.mean().item()) < 4 * math.sqrt(closed / draws)
    assert means.var().item() == pytest.approx(closed, rel=0.13)
    assert told.mean().item() == pytest.approx(closed, rel=0.05)
    assert closed < values.var().item() / count * (1 - count / n), "and less than that of a plain sample"


def test_a_subset_is_stratified_by_the_loss_of_the_model() -> None:
    engine = copies(800, 3)
    whole = engine.per_example(engine.loss)
    sample = subject(engine, subset=320, subset_stratified=True)
    assert (sample.n_examples, sample.population, sample.parts) == (320, 800, 20)
    found = sample.per_example(sample.loss)
    assert bool((found[0] != found[1]).any()), "by the model's own stream"
    for k in range(3):
        assert {round(loss, 9) for loss in found[k].tolist()} <= {round(loss, 9) for loss in whole[k].tolist()}
        quantiles = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
        for part in found[k].reshape(20, 16):
            inside = [(part <= bound).double().mean().item() for bound in whole[k].quantile(quantiles)]
            assert inside == pytest.approx(quantiles.tolist(), abs=0.1)
    alone = subject(engine.select(torch.tensor([1])), subset=320, subset_stratified=True)
    assert torch.allclose(alone.per_example(alone.loss)[0], found[1], rtol=1e-12)


def test_it_costs_a_pass_and_tells_more() -> None:
    engine = copies(800, 1)
    labels = [f"{name}(subset=320{more})" for name in ("shannon_entropy", "lpf") for more in ("", STRATIFIED)]
    rows = [row for (row,) in measure_stack(engine, labels)]
    for plain, other in (rows[:2], rows[2:]):
        assert other["stderr"] < 0.6 * plain["stderr"]
    assert rows[1]["passes"] == pytest.approx(rows[0]["passes"] + 1)
    assert '"subset_stratified": true' in rows[1]["settings"]


def test_what_cannot_be_stratified_is_refused() -> None:
    engine = copies(200, 1)
    assert subject(engine, subset=200, subset_stratified=True) is engine
    with pytest.raises(RequestError, match="subset_stratified=true says how a subset is drawn; write subset=2000"):
        subject(engine, subset_stratified=True)
    with pytest.raises(RequestError, match="needs the loss of all 900 examples, of which 200 are in memory"):
        subject(copies(200, 1, population=900), subset=100, subset_stratified=True)


STRATIFIED = ", subset_stratified=true"

CASES: list[tuple[str, str, str, str]] = [
    ("shannon_entropy", "", "", ""),
    ("shannon_entropy", "", "", STRATIFIED),
    ("fisher_rao", "fisher=hessian", "fisher=hessian", ""),
    ("fisher_rao", "fisher=hessian", "fisher=hessian", STRATIFIED),
    ("fisher_rao", "", "", ""),
    ("lpf", "sigma=0.1", "sigma=0.1, tolerance=0.0005, max_samples=4000", ""),
    ("lpf", "sigma=0.1", "sigma=0.1, tolerance=0.0005, max_samples=4000", STRATIFIED),
    ("lpf_gap", "sigma=0.1", "sigma=0.1, tolerance=0.002, max_samples=4000", ""),
    ("pac_bayes", "", "tolerance=0.002, max_draws=4000", ""),
    ("pac_bayes", "", "tolerance=0.002, max_draws=4000", STRATIFIED),
    ("hessian_trace", "max_samples=40", "", ""),
    ("hessian_trace", "max_samples=40", "", STRATIFIED),
    ("hessian_frobenius", "max_samples=40", "", ""),
    ("lambda_max", "", "tolerance=1e-9", ""),
    ("lambda_max", "", "tolerance=1e-9", STRATIFIED),
    ("local_entropy", "", "tolerance=0.001, max_samples=4000", ""),
    ("average_sharpness", "", "tolerance=0.002, max_samples=4000", ""),
]
QUICK = ("shannon_entropy", "fisher_rao")


def values_and_errors(engine: Engine, label: str) -> tuple[Tensor, Tensor]:
    (rows,) = measure_stack(engine, [label])
    values, errors = (
        torch.tensor([row[column] for row in rows], dtype=torch.float64) for column in ("value", "stderr")
    )
    return values, errors


@pytest.mark.parametrize(
    ("name", "own", "exactly", "drawn"),
    [case if case[0] in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_the_interval_of_a_small_subset_holds_the_value_of_all_examples(
    name: str, own: str, exactly: str, drawn: str
) -> None:
    """95 % intervals of 400 subsets of 100 of 800 examples: 16 parts of 6, whose spread has 15 degrees of freedom."""
    engine = copies(800, 400)
    truth, _ = values_and_errors(engine.select(torch.tensor([0])), f"{name}({exactly})" if exactly else name)
    values, errors = values_and_errors(engine, f"{name}({', '.join(filter(None, [own, f'subset=100{drawn}']))})")
    inside = ((values - truth).abs() <= 1.96 * errors).double().mean().item()
    most, widest = (
        (1.0, 2.5) if name == "lambda_max" else (0.99, 1.7)
    )  # its error is an upper estimate: docs/measures.md
    assert 0.90 <= inside <= most
    assert 0.9 <= (errors.square().mean().sqrt() / values.std()).item() <= widest


def trials(values: Tensor, by: Tensor | None, draws: int) -> float:
    """Return the share of 95 % intervals of a mean, of subsets of 100, that hold that of all the values."""
    shares = torch.tensor([b - a for a, b in pairwise([*edges(100, 16), 100])]).double() / 100
    part, hits = torch.repeat_interleave(torch.arange(16), (100 * shares).round().long()), 0
    for draw in range(draws):
        order = permutation(draw, len(values))
        chosen = values[order[:100] if by is None else stratified(by, order.argsort(), 100, 16)]
        sums = torch.zeros(16, 1, dtype=torch.float64).index_add(0, part, chosen[:, None] / 100)
        found = replicates(sums, shares)
        parts = found[0], found[1:], shares
        error = sampling_variance(*parts, 1 - 100 / len(values)).sqrt() * widening(pseudo_values(*parts))
        hits += abs(found[0].item() - values.mean().item()) <= 1.959964 * error.item()
    return hits / draws


@pytest.mark.parametrize("by_values", [False, True], ids=["plain", "stratified"])
def test_a_tenth_of_the_examples_may_carry_a_mean(by_values: bool) -> None:
    """Of 1000 subsets of 100 of 800 numbers whose skewness is 5."""
    values = skewed(800)
    near = values + 0.01 * torch.linspace(0, 1, 800, dtype=torch.float64)
    assert 0.90 <= trials(values, near if by_values else None, 1000) <= 0.99


def test_the_widening_of_an_interval() -> None:
    """Student's t of 15 and 31 degrees of freedom from a table; the term of skewness by hand; nothing of no spread."""
    symmetric = torch.linspace(-1, 1, 16, dtype=torch.float64)[:, None]
    assert widening(symmetric).item() == pytest.approx(2.131450 / 1.959964, rel=1e-6)
    assert widening(symmetric.repeat(2, 1)).item() == pytest.approx(2.039513 / 1.959964, rel=1e-6)
    one = torch.zeros(16, 1, dtype=torch.float64)
    one[0] = 1.0
    square, z = 14**2 / 15 - 6 * 14 / (17 * 19), 1.959964
    term = 1 + (z**4 + 2 * z**2 - 3) / 18 * square / 16
    assert widening(one).item() == pytest.approx(2.131450 / z * term, rel=1e-6)
    assert widening(torch.ones(16, 1)).item() == pytest.approx(2.131450 / z, rel=1e-6)
