"""K trained models of one network and the examples that they are measured on: fewer of them, other ones, a part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.func import vmap

from flatmin.errors import FlatminError, RequestError
from flatmin.sharpness.sampling import pieces, side_by_side, stratified, take
from flatmin.stack import Batch, StackedNetwork, Streams, normal, permutation, rademacher, stream_key

_VECTORS_PER_GROUP = 128

_FEWEST_PARTS, _MOST_PARTS, _EXAMPLES_PER_PART = 16, 32, 16
"""With fewer parts their spread is not known. Each has a graph of its own, which costs a Hessian-vector product on a
CPU about as much as 4 images of a narrow ResNet-18 do, so that parts should not be small."""

_USES_PER_DRAW = 128
"""On a CPU a normal number costs about as much as so many multiplications: a narrow ResNet-18 uses a weight 50 times an
image, an MLP once an example, of which draws for parts of 44 took 3 times as long as draws for all (n = 1)."""


class Models:
    """K models, their examples and their random streams; see `flatmin.sharpness.Engine` for arguments and errors."""

    _uses_per_example: int

    def __init__(
        self,
        network: StackedNetwork,
        params: Tensor,
        buffers: Mapping[str, Tensor],
        batches: Sequence[Batch],
        keys: Tensor,
        *,
        initial: Tensor | None,
        no_initial: str,
        sets: Mapping[str, Sequence[Batch]] | None,
        memory: int,
        population: int | None,
    ) -> None:
        if params.dim() != 2 or params.shape[1] != network.n_params:
            raise ValueError(f"weights must be [K, {network.n_params}], got {tuple(params.shape)}")
        if initial is not None and initial.shape != params.shape:
            raise ValueError(f"initial weights must be {list(params.shape)}, got {tuple(initial.shape)}")
        if keys.shape != params.shape[:1] or keys.dtype != torch.int64:
            raise ValueError(f"keys must be int64 [{len(params)}], got {keys.dtype} {tuple(keys.shape)}")
        self.network = network
        self.params = _widen(params.detach())
        self.buffers = {name: _widen(buffer) for name, buffer in buffers.items()}
        self.keys = keys.to(params.device)
        self.memory = memory
        self._initial = None if initial is None else _widen(initial.detach())
        self._no_initial = no_initial
        self._sets = dict(sets or {})
        self._is_group = False
        self._take_on(batches)
        self.population = self.n_examples if population is None else population
        """Examples in the whole set, of which a subset has `n_examples`."""

    def __len__(self) -> int:
        return len(self.params)

    @property
    def n_params(self) -> int:
        """Weights of one model, d."""
        return self.network.n_params

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.params.device

    @property
    def is_subset(self) -> bool:
        """Whether the examples are a part of the set, drawn at random."""
        return self.n_examples < self.population

    @property
    def parts(self) -> int:
        """Into how many parts a subset is cut whose spread tells its sampling error.

        There are none of a whole set, of a group, and where a Hessian-vector product by part does not fit in memory.
        """
        count = _parts_of(self.n_examples)
        fit = count * self.params.element_size() * self.params.numel() <= self.memory
        return count if self.is_subset and not self._is_group and fit else 0

    @property
    def strata(self) -> int:
        """Into how many parts the examples are cut that have random draws of their own; 0 where that does not pay.

        It does of 256 examples or more, if the network uses a weight so often in a part that a draw for each costs less
        than the part's losses do. Values rest on it, so it is a function of the network and of the number of examples
        alone. A subset's `parts` are these.
        """
        count = min(_MOST_PARTS, self.n_examples // _EXAMPLES_PER_PART)
        if count < _FEWEST_PARTS:
            return 0
        uses = self._uses_per_example * (self.n_examples // count)
        return count if uses >= _USES_PER_DRAW * self.n_params else 0

    def select(self, index: Tensor) -> Self:
        """Return an engine of some of the models, int64 `[n]`; each keeps its random stream."""
        chosen = self._of_rows(index, [batch.select(index) for batch in self.batches])
        chosen._sets = {name: [batch.select(index) for batch in own] for name, own in self._sets.items()}
        return chosen

    def on(self, name: str) -> Self:
        """Return an engine of the same models on another set of examples; `train` is this one's.

        Raises:
            RequestError: There is no such set.
        """
        if name == "train":
            return self
        if name not in self._sets:
            raise RequestError(
                f"there is no '{name}' set to measure on; there are: {', '.join(['train', *self._sets])}"
            )
        other = copy.copy(self)
        other._take_on(self._sets[name])
        other._of_examples = self._of_examples.setdefault(f"set {name}", {})
        other.population = other.n_examples
        other._begin()
        return other

    def sample(self, count: int, by: Tensor | None = None) -> Self:
        """Return an engine on `count` of the examples, or this one when there are no more.

        They are drawn without replacement by a stream of the model's key, so that every measure of a model sees the
        same ones, and a larger sample holds a smaller one, unless they are stratified.

        Args:
            count: How many.
            by: A number of every example by which they are stratified (`sampling.stratified`), `[K, n]`.
        """
        if count >= self.n_examples:
            return self
        tag = stream_key("subset")
        orders = {key: permutation(key ^ tag, self.n_examples) for key in set(self.keys.tolist())}
        if by is None:
            rows = [orders[key][:count] for key in self.keys.tolist()]
        else:
            own = zip(by.cpu(), self.keys.tolist(), strict=True)
            rows = [stratified(values, orders[key].argsort(), count, _parts_of(count)) for values, key in own]
        index = torch.stack(rows).to(self.device)
        size = max(batch.y.shape[1] for batch in self.batches)
        alike = bool((index == index[:1]).all())
        other = copy.copy(self)
        other._take_on([take(self.batches, part, alike=alike) for part in torch.split(index, size, dim=1)])
        other._begin()
        return other

    def groups(self, count: int, wanted: range | None = None) -> Iterator[Self]:
        """Yield engines on disjoint groups of the examples, `count` groups in all, each of n // count examples.

        An engine holds g groups as g K models, model k of group j in row j K + k: as many at once as their
        Krylov spaces fit in memory.

        Args:
            count: How many groups there are.
            wanted: The consecutive groups that are asked for; all of them by default.
        """
        size, every = self.n_examples // count, torch.arange(len(self), device=self.device)
        numbers = torch.arange(count * size, device=self.device).reshape(count, 1, size).expand(-1, len(self), -1)
        chosen = numbers if wanted is None else numbers[wanted.start : wanted.stop]
        for first, number in pieces(len(chosen), self.memory // (8 * len(self) * self.n_params * _VECTORS_PER_GROUP)):
            each = [take(self.batches, index, alike=True) for index in chosen[first : first + number]]
            yield self._of_rows(every.repeat(number), [side_by_side(each)], is_group=True)

    def initial_weights(self) -> Tensor:
        """Return the weights that training started from, `[K, d]`.

        Raises:
            FlatminError: They are not known.
        """
        if self._initial is None:
            raise FlatminError(f"the initial weights are needed, {self._no_initial}")
        return self._initial

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what an earlier measure of this engine has made under a key, making it if none has."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def of_examples(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return what depends on the examples alone, as `shared`, but kept by engines of the same examples too."""
        if key not in self._of_examples:
            self._of_examples[key] = make()
        return self._of_examples[key]

    def vectors(self, kind: Literal["normal", "rademacher"], stream: str, first: int, count: int) -> Tensor:
        """Return random vectors, float64 `[count, K, d]`: numbers `first`, `first + 1`, ... of a stream.

        A vector is a function of the model's key, the stream's name and its number alone. Measures that name
        the same stream share their vectors, so their values are paired.
        """
        source = normal if kind == "normal" else rademacher
        tag = self.keys ^ stream_key(stream)
        keys = torch.cat([Streams(tag, step).keys for step in range(first, first + count)])
        drawn: Tensor = vmap(lambda key: source(key, (self.n_params,)))(keys)
        return drawn.reshape(count, len(self), self.n_params)

    def _of_rows(self, index: Tensor, batches: Sequence[Batch], *, is_group: bool = False) -> Self:
        """Return an engine of models `index`, which may repeat, on examples of their own."""
        other = copy.copy(self)
        other._is_group = is_group or self._is_group
        other.params, other.keys = self.params[index], self.keys[index]
        other.buffers = {name: buffer[index] for name, buffer in self.buffers.items()}
        other._initial = None if self._initial is None else self._initial[index]
        other._sets = {}
        other._take_on(batches)
        other._begin()
        return other

    def _take_on(self, batches: Sequence[Batch]) -> None:
        """Take the examples, widened.

        Raises:
            ValueError: There are none, or not of every model.
            RequestError: They are on another device than the weights.
        """
        batches = list(batches)
        self._of_examples: dict[Any, Any] = {}
        self.n_examples = sum(batch.y.shape[1] for batch in batches)
        if self.n_examples == 0:
            raise ValueError("there are no examples to measure on")
        if any(len(batch.y) != len(self.params) for batch in batches):
            raise ValueError(f"every batch must hold labels of all {len(self.params)} models")
        for tensor in [tensor for batch in batches for tensor in (batch.x, batch.y)]:
            if tensor.device != self.device:
                raise RequestError(
                    f"examples are on the device '{tensor.device}' and the weights on '{self.device}'; move one of them"
                )
        self.batches = [Batch(_widen(batch.x), batch.y, batch.shared) for batch in batches]

    def _begin(self) -> None:
        """Start with nothing made yet."""
        self._shared: dict[Any, Any] = {}


def _parts_of(count: int) -> int:
    """Return into how many parts a subset of so many examples is cut."""
    return max(_FEWEST_PARTS, min(_MOST_PARTS, count // _EXAMPLES_PER_PART))


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
