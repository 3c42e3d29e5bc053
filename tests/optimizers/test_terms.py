"""Terms of updates: the square root that is as fast for zeros."""

from __future__ import annotations

import math

import pytest
import torch

from flatmin.optimizers.terms import root


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_are_the_square_roots_but_for_nothing(dtype: torch.dtype) -> None:
    squares = torch.cat([torch.rand(50, dtype=dtype), torch.tensor([1e-30, 1.0, 3e30], dtype=dtype)])
    assert root(squares).tolist() == pytest.approx([math.sqrt(s) for s in squares.tolist()], rel=1e-6)
    least = root(torch.zeros(1, dtype=dtype))
    assert torch.equal(least + 1e-8, torch.full_like(least, 1e-8)), "nothing beside what Adam adds"
    assert root(torch.tensor([math.nan], dtype=dtype)).isnan().all()
