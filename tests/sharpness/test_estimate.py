from __future__ import annotations

import math

import torch
from torch import Tensor

from flatmin.sharpness.estimate import Control, sample_mean


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


def test_a_control_saves_samples_and_leaves_the_mean_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 2000, generator=generator, dtype=torch.float64)
    x = x.square() - 1
    y = 1.0 + 0.4 * x + 0.05 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    draw = from_table(y)
    control = Control(from_table(x), price=20)  # type: ignore[arg-type]
    plain = sample_mean(draw, 2000, tolerance=1e-9, max_samples=24)  # type: ignore[arg-type]
    # the price is above what 24 samples can save, so that this control is never taken
    refused = sample_mean(draw, 2000, tolerance=1e-9, max_samples=24, control=control)  # type: ignore[arg-type]
    assert not bool(refused.controlled.any())
    assert torch.equal(refused.value, plain.value)
    taken = sample_mean(draw, 2000, tolerance=0.02, max_samples=400, control=control)  # type: ignore[arg-type]
    assert bool(taken.controlled.all())
    assert bool(taken.converged.all())
    assert taken.samples.double().mean() < 30
    error = taken.value - 1.0
    assert abs(error.mean().item()) < 4 * error.std().item() / math.sqrt(2000)
    covered = (error.abs() <= 2.1 * taken.stderr).double().mean().item()
    assert 0.90 <= covered <= 0.99
