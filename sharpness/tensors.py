"""The tensors of K networks by every name they go by: weights, frozen weights and buffers; shared ones have several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from flatmin.stack import StackedNetwork


def first_names(template: nn.Module) -> dict[str, str]:
    """Return for every name of a parameter or buffer the first name of the same tensor.

    >>> first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    >>> second.weight = first.weight
    >>> first_names(nn.Sequential(first, second))
    {'0.weight': '0.weight', '1.weight': '0.weight'}
    """
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(tensor), name) for name, tensor in _named(template)}


def every_tensor(network: StackedNetwork, params: Tensor, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all tensors of K models by every name, `[K, ...]`.

    Args:
        network: Their network.
        params: Their weights `[K, d]`.
        buffers: Their buffers, and frozen weights.
    """
    own = {**network.views(params), **buffers}
    return {name: own[first] for name, first in first_names(network.template).items() if first in own}


def _named(template: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from template.named_parameters(remove_duplicate=False)
    yield from template.named_buffers(remove_duplicate=False)
