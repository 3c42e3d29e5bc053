"""Counter-based random streams: every number is a function of (seed, stream, step, index) alone.

Nothing here, and nothing trained or measured through it, draws from a global generator. So a model's
numbers do not depend on its neighbours in the stack, on its place, or on where a run was interrupted.
The generator is SplitMix64 (Steele, Lea and Flood 2014): a counter times an odd constant, mixed.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB

_PIECE = 2**17


def stream_key(stream: str, *seeds: int) -> int:
    """Return the 63-bit key of a stream.

    >>> stream_key("order", 0) == stream_key("order", 0) != stream_key("order", 1)
    True
    """
    text = "/".join([stream, *map(str, seeds)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def permutation(key: int, n: int) -> Tensor:
    """Return a random order of `0 .. n - 1` on the CPU, int64 `[n]`."""
    bits = bits_at(torch.tensor(key), torch.arange(n))
    return torch.sort(bits, stable=True).indices


def uniform(
    key: Tensor | int,
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return numbers in [0, 1) of a shape, as the stream `key` has them; drawn in float64."""
    key, count = _key(key, device), math.prod(shape)
    drawn = key.new_empty(count, dtype=dtype)
    for start, stop in _pieces(count, key.device):
        drawn[start:stop] = _shift(_bits_between(key, start, stop), 11).to(torch.float64).mul_(2.0**-53)
    return drawn.reshape(tuple(shape))


def normal(
    key: Tensor | int,
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return standard normal numbers of a shape (Box and Muller 1958), drawn in float64."""
    key, count = _key(key, device), math.prod(shape)
    half = (count + 1) // 2
    drawn = key.new_empty(2 * half, dtype=dtype)
    for start, stop in _pieces(half, key.device):
        bits = _bits_between(key, start, stop)
        radius = _shift(bits, 32).to(torch.float64).add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = (bits & 0xFFFFFFFF).to(torch.float64).mul_(2.0 * math.pi * 2.0**-32)
        drawn[start:stop] = torch.cos(angle).mul_(radius)
        drawn[half + start : half + stop] = angle.sin_().mul_(radius)
    return drawn[:count].reshape(tuple(shape))


def rademacher(
    key: Tensor | int,
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return numbers of a shape, each -1 or 1 with equal probability; the bits of a word of the stream make 64."""
    key, count = _key(key, device), math.prod(shape)
    words = bits_at(key, torch.arange(math.ceil(count / 64), device=key.device))
    bits = torch.arange(256, device=key.device)[:, None] >> torch.arange(8, device=key.device) & 1
    signs = (2 * bits - 1).to(dtype)
    drawn: Tensor = signs[words.view(torch.uint8).long()].reshape(-1)[:count].reshape(tuple(shape))
    return drawn


def _key(key: Tensor | int, device: torch.device | str) -> Tensor:
    return key if isinstance(key, Tensor) else torch.tensor(key, dtype=torch.int64, device=device)


def _pieces(count: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Return where the pieces of 0 .. count - 1 start and stop.

    On a CPU they stay in its cache, and are large enough for threads that wait for each other, on a busy machine.
    """
    size = _PIECE if device.type == "cpu" else max(1, count)
    return ((start, min(start + size, count)) for start in range(0, count, size))


def bits_at(key: Tensor, index: Tensor) -> Tensor:
    """Return 64 random bits for every index of a stream, as int64."""
    place = index + 1
    if torch.compiler.is_compiling():
        # or the constant goes into the bounds of a loop in C++, where nothing may overflow: it wrote out of its memory
        place = place & (2**63 - 1)
    return _mix(_mix(key) + place * _GOLDEN)


def _bits_between(key: Tensor, start: int, stop: int) -> Tensor:
    return bits_at(key, torch.arange(start, stop, device=key.device))


def _mix(z: Tensor) -> Tensor:
    z = _shift(z, 30).bitwise_xor_(z).mul_(_MIX1)
    z = _shift(z, 27).bitwise_xor_(z).mul_(_MIX2)
    return _shift(z, 31).bitwise_xor_(z)


def _shift(z: Tensor, places: int) -> Tensor:
    """Shift right without carrying the sign along, into a tensor of its own; int64 has no such operator."""
    return (z >> places).bitwise_and_((1 << (64 - places)) - 1)


def _wrapped(number: int) -> int:
    """Return a Python integer as int64 arithmetic would hold it."""
    return (number + 2**63) % 2**64 - 2**63


class Streams:
    """The streams that K models draw from inside their forward passes.

    Args:
        keys: The key of each model, int64 `[K]`.
        step: The step, so that each has numbers of its own.

    Attributes:
        first: The place of the pass's first example in its batch: a part of a batch draws what it draws in the whole.
    """

    def __init__(self, keys: Tensor, step: int = 0) -> None:
        self._models, self._step = keys, step
        self.first = 0

    @cached_property
    def keys(self) -> Tensor:
        """The key of each model in this step; most networks and optimizers never ask for it."""
        return _mix(self._models + _wrapped((self._step + 1) * _MIX1))

    @staticmethod
    def of_keys(keys: Tensor, first: int = 0) -> Streams:
        """Return the streams whose attributes are these."""
        own = object.__new__(Streams)
        own.keys, own.first = keys, first
        return own

    def starting_at(self, first: int) -> Streams:
        """Return the same streams for a pass whose first example stands there in its batch."""
        if first == self.first:
            return self
        chosen = copy.copy(self)
        chosen.first = first
        return chosen

    @staticmethod
    def joined(parts: Sequence[Streams]) -> Streams:
        """Return the streams of several groups of models as those of one stack."""
        return Streams.of_keys(torch.cat([part.keys for part in parts]))

    def keys_of(self, stream: str, number: int) -> Tensor:
        """Return the keys `[K]` of one numbered draw of a named stream in this step."""
        return _mix((self.keys ^ stream_key(stream)) + _wrapped((number + 1) * _MIX2))


class _Draws(TorchFunctionMode):
    """Gives every dropout and every `torch.rand_like` of a forward pass numbers from the model's own stream."""

    def __init__(self, key: Tensor, first: int) -> None:
        super().__init__()
        self.key, self.first = key, first
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._dropout(func, *args, **kwargs)
        if func is torch.rand_like:
            return self._rand_like(*args, **kwargs)
        return func(*args, **kwargs)

    def _rand_like(self, input: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        self.calls += 1
        return layer_uniform(self.key, self.calls, input.shape, self.first).to(dtype or input.dtype)

    def _dropout(
        self, func: Any, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0.0:
            return input
        whole_channels = func is not torch.nn.functional.dropout
        shape = [*input.shape[:2], *[1] * (input.dim() - 2)] if whole_channels else input.shape
        self.calls += 1
        keep = dropout_mask(self.key, self.calls, shape, p, self.first)
        return input * keep.to(input.dtype) / (1.0 - p)


_DROPOUTS = {
    torch.nn.functional.dropout,
    torch.nn.functional.dropout1d,
    torch.nn.functional.dropout2d,
    torch.nn.functional.dropout3d,
}


def dropout_mask(key: Tensor, call: int, shape: Sequence[int], p: float, first: int = 0) -> Tensor:
    """Return which elements the `call`-th draw (from 1) of a forward pass keeps, a dropout; bool of a shape.

    Args:
        key: The model's key for this step (an entry of `Streams.keys`).
        call: Which dropout or `torch.rand_like` of the pass it is, counted from 1.
        shape: The mask's shape.
        p: The probability of dropping an element.
        first: The place in the batch of the first example.
    """
    return _layer_bits(key, call, shape, first) >= int(p * 2**53)


def layer_uniform(key: Tensor, call: int, shape: Sequence[int], first: int = 0) -> Tensor:
    """Return numbers in [0, 1), float64 of a shape: the `call`-th draw (from 1) of a forward pass, a `torch.rand_like`.

    Arguments are those of `dropout_mask`; the shape's first axis counts examples.
    """
    return _layer_bits(key, call, shape, first).to(torch.float64) * 2.0**-53


def _layer_bits(key: Tensor, call: int, shape: Sequence[int], first: int) -> Tensor:
    """Return 53 random bits for every element of a draw, as int64 of a shape."""
    start = first * math.prod(shape[1:])
    index = torch.arange(start, start + math.prod(shape), device=key.device)
    return _shift(bits_at(_mix(key + _wrapped(call * _MIX2)), index).reshape(tuple(shape)), 11)


def draws_from(key: Tensor, first: int = 0) -> AbstractContextManager[Any]:
    """Return a context in which what random layers draw comes from a model's stream.

    That is the masks of `torch.nn.functional.dropout*`, and `torch.rand_like` of a tensor whose first axis counts
    examples. Draws are told apart by their order in the pass, so a pass made again draws the same. Outside such a
    context, a module's layers draw from torch's generator, as they always do.

    Args:
        key: The model's key for this step (an entry of `Streams.keys`).
        first: The place in the batch of the pass's first example.
    """
    return _Draws(key, first)
