from __future__ import annotations

import pytest
import torch

from flatmin.sharpness.sampling import cut, cut_at, edges, membership, pieces, side_by_side, take
from flatmin.stack import Batch

X, Y = torch.arange(20.0).reshape(10, 2), torch.arange(30).reshape(3, 10)


def batches(shared: bool) -> list[Batch]:
    whole = Batch(X, Y, shared=True) if shared else Batch(torch.stack([X, X + 100, X + 200]), Y)
    return [part for half in cut(whole, 7) for part in cut(half, 4)]


@pytest.mark.parametrize("shared", [True, False])
def test_cuts_hold_all_examples_in_order(shared: bool) -> None:
    parts = batches(shared)
    assert [part.y.shape[1] for part in parts] == [4, 3, 3]
    assert torch.equal(torch.cat([part.y for part in parts], dim=1), Y)
    assert torch.equal(torch.cat([part.x if shared else part.x[0] for part in parts]), X)
    assert cut(parts[0], 4) == [parts[0]]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("alike", [True, False])
def test_examples_are_taken_by_number(shared: bool, alike: bool) -> None:
    index = torch.tensor([[9, 0, 4, 4]] * 3 if alike else [[9, 0, 4, 4], [1, 2, 3, 8], [7, 6, 5, 0]])
    found = take(batches(shared), index, alike=alike)
    assert found.shared is (shared and alike)
    for k in range(3):
        assert torch.equal(found.y[k], Y[k, index[k]])
        own = found.x if found.shared else found.x[k]
        assert torch.equal(own, X[index[k]] + (0 if shared else 100 * k))


def test_groups_lie_one_after_another() -> None:
    one = take(batches(True), torch.tensor([[0, 1]]).expand(3, -1), alike=True)
    two = take(batches(True), torch.tensor([[2, 3]]).expand(3, -1), alike=True)
    both = side_by_side([one, two])
    assert both.y.tolist() == [[0, 1], [10, 11], [20, 21], [2, 3], [12, 13], [22, 23]]
    assert both.x[4].tolist() == X[2:4].tolist()
    assert side_by_side([one]) is one


def test_pieces_are_at_least_one() -> None:
    assert list(pieces(5, 2)) == [(0, 2), (2, 2), (4, 1)]
    assert list(pieces(2, 0)) == [(0, 1), (1, 1)]


@pytest.mark.parametrize("shared", [True, False])
def test_parts_are_cut_out_of_batches(shared: bool) -> None:
    whole = batches(shared)
    made, numbers = cut_at(whole, edges(10, 3))
    assert [part.y.shape[1] for part in made] == [3, 1, 2, 1, 3], "batches of 4, 3 and 3; parts of 3, 3 and 4"
    assert numbers == [0, 1, 1, 2, 2]
    assert torch.equal(torch.cat([part.y for part in made], dim=1), Y)
    assert torch.equal(torch.cat([part.x if shared else part.x[0] for part in made]), X)
    inside = torch.cat(membership(whole, 3), dim=1)
    assert inside.argmax(dim=0).tolist() == [0] * 3 + [1] * 3 + [2] * 4
    assert inside.sum(dim=0).tolist() == [1.0] * 10
    assert cut_at(whole, [0]) == (whole, [0, 0, 0])
