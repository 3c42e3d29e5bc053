"""Parts of a set of examples: cut, drawn by index, and laid side by side as the examples of more models."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flatmin.errors import RequestError
from flatmin.stack import Batch


def cut(batch: Batch, size: int) -> list[Batch]:
    """Return a batch as batches of at most `size` examples; itself if it is small enough."""
    if batch.y.shape[1] <= size:
        return [batch]
    xs = torch.split(batch.x, size, dim=0 if batch.shared else 1)
    ys = torch.split(batch.y, size, dim=1)
    return [Batch(x, y, batch.shared) for x, y in zip(xs, ys, strict=True)]


def edges(count: int, parts: int) -> list[int]:
    """Return where consecutive parts of about equal size begin, of so many examples.

    >>> edges(10, 4)
    [0, 2, 5, 7]
    """
    return [part * count // parts for part in range(parts)]


def cut_at(batches: Sequence[Batch], bounds: Sequence[int]) -> tuple[list[Batch], list[int]]:
    """Cut batches where consecutive parts begin; return what comes of it and the number of each one's part.

    Args:
        batches: The set, cut in any way.
        bounds: The first example of each part, ascending, counted through all batches; 0 first.
    """
    made, numbers, start = [], [], 0
    for batch in batches:
        stop = start + batch.y.shape[1]
        inner = [bound - start for bound in bounds if start < bound < stop]
        xs = torch.tensor_split(batch.x, inner, dim=0 if batch.shared else 1)
        ys = torch.tensor_split(batch.y, inner, dim=1)
        pairs = zip(xs, ys, strict=True)
        made += [batch] if not inner else [Batch(x, y, batch.shared) for x, y in pairs]
        numbers += [bisect_right(bounds, start + place) - 1 for place in [0, *inner]]
        start = stop
    return made, numbers


def membership(batches: Sequence[Batch], parts: int) -> list[Tensor]:
    """Return which examples of each batch lie in which part, as float64 `[P, b]` of ones and zeros."""
    count = sum(batch.y.shape[1] for batch in batches)
    device = batches[0].y.device
    bounds = torch.tensor([*edges(count, parts), count], device=device)
    part = torch.searchsorted(bounds, torch.arange(count, device=device), right=True) - 1
    inside = (part == torch.arange(parts, device=device)[:, None]).double()
    return list(torch.split(inside, [batch.y.shape[1] for batch in batches], dim=1))


def stratified(values: Tensor, rank: Tensor, count: int, parts: int) -> Tensor:
    """Return the numbers of `count` examples drawn evenly from blocks of similar values, int64 `[count]`.

    Sorted by their values, largest first, the examples are cut into blocks from each of which `parts` are drawn without
    replacement: one for each of the consecutive parts of the answer, which so are stratified samples themselves and as
    different as chance makes them. The last block gives what is left over, and is smaller in proportion.

    Args:
        values: `[n]`.
        rank: The place of every example in a random order, int64 `[n]`.
        count: How many to draw, n at most.
        parts: How many parts there are, cut as `edges` cuts them.
    """
    n, device = len(values), values.device
    draws = torch.full((-(-count // parts),), parts, device=device)
    draws[-1] = count - draws[:-1].sum()
    stops = draws.cumsum(dim=0) * n // count
    order = values.argsort(descending=True, stable=True)
    block = torch.searchsorted(stops, torch.arange(n, device=device), right=True)
    order = order[(block * n + rank[order]).argsort()]
    place = torch.arange(count, device=device)
    starts = stops - torch.diff(stops, prepend=stops.new_zeros(1))
    drawn = order[starts[place // parts] + place % parts]
    bounds = torch.tensor(edges(count, parts), device=device)
    part = torch.searchsorted(bounds, place, right=True) - 1
    turn = (place - bounds[part]) * parts + part
    dealt = drawn[turn.argsort().argsort()]
    return dealt[(part * n + rank[dealt]).argsort()]


def take(batches: Sequence[Batch], index: Tensor, *, alike: bool) -> Batch:
    """Return the examples of numbers `index`, int64 `[K, b]`, counted through all batches.

    Args:
        batches: The set, cut in any way.
        index: Each model's choice.
        alike: Whether all models choose the same.

    Raises:
        RequestError: The examples of two batches differ in shape.
    """
    shapes = {tuple(batch.x.shape[1 if batch.shared else 2 :]): None for batch in batches}
    if len(shapes) > 1:
        raise RequestError(f"examples of different shapes cannot be drawn from: {', '.join(map(str, shapes))}")
    models, width = index.shape
    rows = torch.arange(models, device=index.device)[:, None].expand_as(index)
    shared = alike and all(batch.shared for batch in batches)
    x_index, x_rows = (part[:1] if shared else part for part in (index, rows))
    first = batches[0]
    x = first.x.new_empty(*x_index.shape, *first.x.shape[1 if first.shared else 2 :])
    y = first.y.new_empty(models, width, *first.y.shape[2:])
    start = 0
    for batch in batches:
        stop = start + batch.y.shape[1]
        here, x_here = ((part >= start) & (part < stop) for part in (index, x_index))
        y[here] = batch.y[rows[here], index[here] - start]
        chosen = x_index[x_here] - start
        x[x_here] = batch.x[chosen] if batch.shared else batch.x[x_rows[x_here], chosen]
        start = stop
    return Batch(x[0] if shared else x, y, shared)


def side_by_side(groups: Sequence[Batch]) -> Batch:
    """Return G batches of K models and equal size as one batch of G K models, the groups one after another."""
    if len(groups) == 1:
        return groups[0]
    xs = [group.x.expand(len(group.y), *group.x.shape) if group.shared else group.x for group in groups]
    return Batch(torch.cat(xs), torch.cat([group.y for group in groups]))


def pieces(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield (first, number) of consecutive runs of at most `most`, at least one, of `count` things."""
    for first in range(0, count, max(1, most)):
        yield first, min(max(1, most), count - first)
