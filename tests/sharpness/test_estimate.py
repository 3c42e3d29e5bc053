from __future__ import annotations

import math

import torch
from torch import Tensor

from flatmin.sharpness.estimate import Antithetic, sample_mean


def from_table(table: Tensor) -> object:
    def draw(first: int, count: int, active: Tensor) -> Tensor:
        return table[first : first + count].where(active, math.nan)

    return draw


def test_each_model_stops_at_its_own_time() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    table = 1.0 + torch.tensor([0.01, 0.3, 3.0], dtype=torch.float64) * noise
    mean = sample_mean(from_table(table), 3, tolerance=0.05, max_samples=100)  # type: ignore[arg-type]
    assert mean.samples[0] == 16
    assert 16 < mean.samples[1] < 100
    assert mean.samples[2] == 100
    assert mean.converged.tolist() == [True, True, False]
    for k, n in enumerate(mean.samples.tolist()):
        torch.testing.assert_close(mean.value[k], table[:n, k].mean())
        torch.testing.assert_close(mean.stderr[k], table[:n, k].std() / math.sqrt(n))


def test_an_offset_counts_in_the_value_and_the_tolerance() -> None:
    table = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offset = torch.tensor([1000.0], dtype=torch.float64)
    mean = sample_mean(from_table(table), 1, tolerance=0.01, max_samples=64, offset=offset)  # type: ignore[arg-type]
    torch.testing.assert_close(mean.value, offset + table[:16].mean())
    assert mean.samples.tolist() == [16]


def test_what_is_not_finite_is_undefined_and_alone() -> None:
    table = torch.ones(40, 3, dtype=torch.float64)
    table[3, 0], table[20, 1] = math.inf, math.nan
    table[:, 1] += torch.arange(40) % 2
    offset = torch.zeros(3, dtype=torch.float64)
    mean = sample_mean(from_table(table), 3, tolerance=1e-6, max_samples=40, offset=offset)  # type: ignore[arg-type]
    assert mean.value.isnan().tolist() == [True, True, False]
    assert mean.stderr.isnan().tolist() == [True, True, False]
    assert mean.converged.tolist() == [False, False, True]
    assert mean.samples.tolist() == [16, 24, 16]


def test_too_few_samples_never_converge() -> None:
    table = torch.ones(8, 1, dtype=torch.float64)
    mean = sample_mean(from_table(table), 1, tolerance=1.0, max_samples=8)  # type: ignore[arg-type]
    assert mean.converged.tolist() == [False]
    single = sample_mean(from_table(table), 1, tolerance=1.0, max_samples=1)  # type: ignore[arg-type]
    assert single.value.tolist() == [1.0]
    assert bool(single.stderr.isnan())


def test_pairs_and_their_control_save_samples_and_leave_the_mean_unbiased() -> None:
    """Odd noise goes with the pairs, even noise with the control; what is left is 0.05 of each sample."""
    generator = torch.Generator().manual_seed(0)
    odd, even, first, second = torch.randn(4, 400, 2000, generator=generator, dtype=torch.float64)
    even = even.square() - 1
    one, other = (1.0 + 0.4 * (even + way * odd) + 0.05 * rest for way, rest in ((1, first), (-1, second)))
    pairs = Antithetic(from_table(other), from_table(even), price=20)  # type: ignore[arg-type]
    draw = from_table(one)
    plain = sample_mean(draw, 2000, tolerance=1e-9, max_samples=24)  # type: ignore[arg-type]
    # the price is above what 24 samples can save, so that there are no pairs
    refused = sample_mean(draw, 2000, tolerance=1e-9, max_samples=24, antithetic=pairs)  # type: ignore[arg-type]
    assert not bool(refused.paired.any())
    assert torch.equal(refused.value, plain.value)
    taken = sample_mean(draw, 2000, tolerance=0.02, max_samples=400, antithetic=pairs)  # type: ignore[arg-type]
    assert bool(taken.paired.all())
    assert bool(taken.converged.all())
    assert taken.samples.double().mean() < 65
    error = taken.value - 1.0
    assert abs(error.mean().item()) < 4 * error.std().item() / math.sqrt(2000)
    covered = (error.abs() <= 2.1 * taken.stderr).double().mean().item()
    assert 0.90 <= covered <= 0.99


def test_pairs_count_twice_against_the_most_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 100, 3, generator=generator, dtype=torch.float64) + 0.01
    pairs = Antithetic(from_table(other), from_table(torch.zeros_like(one)), price=1)  # type: ignore[arg-type]
    mean = sample_mean(from_table(one), 3, tolerance=1e-3, max_samples=100, antithetic=pairs)  # type: ignore[arg-type]
    assert mean.samples.tolist() == [112, 112, 112]
    torch.testing.assert_close(mean.value, ((one + other) / 2)[: mean.samples[0] // 2].mean(dim=0))
