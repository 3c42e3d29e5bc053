"""Measures that are taken on random batches of the examples, one by one, and averaged.

value = E_B[measure on batch B], B of m examples drawn without replacement. For measures that are no mean over examples
it is another number than that of the whole set, and often the published one. It costs m / n of it per batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Estimate, exact, sample_mean
from flatmin.sharpness.sampling import pieces
from flatmin.stack import Streams, stream_key

_VECTORS_PER_COPY = 16

OnExamples = Callable[[Engine], tuple[Tensor, Tensor]]
"""A measure on all examples of an engine: its value and a bound of its error, `[K]`."""


def by_batch(
    engine: Engine,
    size: int | None,
    measure: OnExamples,
    *,
    passes: float,
    evaluations: int,
    tolerance: float,
    max_samples: int,
) -> Estimate:
    """Take a measure that is not random once on the whole set, or its mean over random batches where there are any.

    On the whole set `stderr` is the bound alone. Arguments as `batch_mean` has them.

    Args:
        engine: The models.
        size: Examples in a batch; None for the whole set.
        measure: What is taken.
        passes: What it costs once, in passes over the examples it is taken on.
        evaluations: `samples` of the whole set.
        tolerance: Uncertainty up to which a value has converged, as a fraction of it.
        max_samples: The most batches per model.
    """
    if _has_batches(engine, size):
        return batch_mean(engine, size, measure, passes=passes, tolerance=tolerance, max_samples=max_samples)
    value, bound = (found.cpu() for found in measure(engine))
    once = exact(value, passes=passes, samples=evaluations)
    stderr = torch.where(once.converged, bound, torch.nan)
    return replace(once, stderr=stderr, converged=once.converged & (stderr <= tolerance * once.value.abs()))


def batch_mean(
    engine: Engine,
    size: int | None,
    measure: OnExamples,
    *,
    passes: float,
    tolerance: float,
    max_samples: int,
) -> Estimate:
    """Average a measure over random batches until each model's value is known well enough.

    `stderr` is that of the mean over batches, with the mean bound of the batches' own errors added in quadrature.
    Every batch has random vectors of its own. Without batches the measure is repeated on the whole set, each time
    with other random vectors. Batches do not overlap until the set is used up; then it is shuffled anew.

    Args:
        engine: The models.
        size: Examples in a batch; None for the whole set.
        measure: What is averaged.
        passes: What it costs once, in passes over the examples it is taken on.
        tolerance: Standard error at which a model's sampling stops, as a fraction of its value.
        max_samples: The most batches per model.
    """
    split = _has_batches(engine, size)
    m = engine.n_examples if size is None else min(size, engine.n_examples)
    bounds = torch.full((max_samples, len(engine)), torch.nan, dtype=torch.float64)

    def draw(first: int, number: int, active: Tensor) -> Tensor:
        rows = torch.nonzero(active).flatten().to(engine.device)
        some = engine.select(rows)
        values = torch.full((number, len(engine)), torch.nan, dtype=torch.float64)
        start = 0
        for part in one_first(some, first, number):
            value, bound = (found.cpu().double().reshape(-1, len(rows)) for found in measure(part))
            here = slice(start, start + len(value))
            values[here, active], bounds[first : first + number][here, active] = value, bound
            start = here.stop
            if not bool(value.isfinite().all(dim=0).any()):
                break  # all models are undefined, whatever the other batches say
        return values

    def one_first(some: Engine, first: int, number: int) -> Iterator[Engine]:
        """Yield batches, the very first one alone: it often tells that there is no value."""
        alone = 1 if first == 0 else 0
        for wanted in (range(first, first + alone), range(first + alone, first + number)):
            yield from _batches(some, m, wanted) if split else _copies(some, wanted)

    mean = sample_mean(draw, len(engine), tolerance=tolerance, max_samples=max_samples)
    bound = bounds.nanmean(dim=0)
    stderr = (mean.stderr.square() + bound.square()).sqrt()
    converged = mean.converged & (stderr <= tolerance * mean.value.abs())
    return Estimate(mean.value, stderr, mean.samples, passes * m / engine.n_examples * mean.samples.double(), converged)


def _has_batches(engine: Engine, size: int | None) -> bool:
    """Return whether the examples are more than one batch."""
    return size is not None and size < engine.n_examples


def _batches(engine: Engine, size: int, wanted: range) -> Iterator[Engine]:
    """Yield engines on batches of a size, by number."""
    count = max(1, (engine.n_examples - 1) // size)  # never all examples: a sample of fewer comes in random order
    start = wanted.start
    while start < wanted.stop:
        shuffle, first = divmod(start, count)
        for part in _shuffled(engine, shuffle, count * size).groups(
            count, range(first, min(count, first + wanted.stop - start))
        ):
            number = len(part) // len(engine)
            part.keys = _keys(engine, range(start, start + number))
            start += number
            yield part


def _shuffled(engine: Engine, shuffle: int, count: int) -> Engine:
    """Return an engine on so many of the examples, in the random order of a shuffle by its number."""
    if shuffle == 0:
        return engine.sample(count)
    other = engine.select(torch.arange(len(engine), device=engine.device))
    other.keys = Streams(engine.keys ^ stream_key("shuffle"), shuffle).keys
    return other.sample(count)


def _copies(engine: Engine, wanted: range) -> Iterator[Engine]:
    every = torch.arange(len(engine), device=engine.device)
    for first, number in pieces(len(wanted), engine.memory // (8 * len(engine) * engine.n_params * _VECTORS_PER_COPY)):
        part = engine.select(every.repeat(number))
        part.keys = _keys(engine, wanted[first : first + number])
        yield part


def _keys(engine: Engine, numbers: range) -> Tensor:
    return torch.cat([Streams(engine.keys, number).keys for number in numbers])
