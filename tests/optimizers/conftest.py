"""Convex problems in float64 whose gradients and Hessians are written out, and what takes K models over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flatmin.optimizers.compose import StackOptimizer
from flatmin.optimizers.interface import Ask, Evaluation, Rule, State, Step, answered, averaged
from flatmin.plugins import Plugin, get, optimizer_parts
from flatmin.stack import Streams, stream_key

FLOAT = torch.float64

SHAPES = [(2, 3, 2), (3, 2), (4,), ()]
"""Filters of six, rows of two, a bias of four, a lone number."""

SIZES = [math.prod(shape) for shape in SHAPES]
D = sum(SIZES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small gain nothing from threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=FLOAT)[:, None]


class Problem(Protocol):
    """Losses of K models on some batches; batch b has `sizes[b]` examples."""

    @property
    def sizes(self) -> Sequence[float]: ...

    def evaluate(self, params: Tensor, batch: int = 0) -> Evaluation: ...

    def select(self, index: Tensor) -> Problem: ...


@dataclass(frozen=True)
class Quadratics:
    """(w - c).H (w - c) / 2, with H `[B, K, d, d]` and c `[B, K, d]`."""

    hessians: Tensor
    centres: Tensor
    sizes: Sequence[float]

    def evaluate(self, params: Tensor, batch: int = 0) -> Evaluation:
        hessian, away = self.hessians[batch], params - self.centres[batch]
        grad = times(hessian, away)
        return Evaluation((away * grad).sum(dim=1) / 2, grad, lambda v: times(hessian, v))

    def select(self, index: Tensor) -> Quadratics:
        return replace(self, hessians=self.hessians[:, index], centres=self.centres[:, index])


@dataclass(frozen=True)
class Logistic:
    """Logistic regression with a ridge; x `[B, K, n, d]` are examples times their labels, which are -1 or 1."""

    x: Tensor
    sizes: Sequence[float]
    ridge: float = 0.1

    def evaluate(self, params: Tensor, batch: int = 0) -> Evaluation:
        x = self.x[batch]
        margin, n = times(x, params), x.shape[1]
        wrong = torch.sigmoid(-margin)
        losses = functional.softplus(-margin).mean(dim=1) + self.ridge / 2 * params.square().sum(dim=1)

        def hvp(v: Tensor) -> Tensor:
            return times(x.mT, wrong * (1 - wrong) * times(x, v)) / n + self.ridge * v

        return Evaluation(losses, -times(x.mT, wrong) / n + self.ridge * params, hvp)

    def select(self, index: Tensor) -> Logistic:
        return replace(self, x=self.x[:, index])


def times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the products of matrices `[K, n, d]` and vectors `[K, d]`."""
    product: Tensor = (matrices @ vectors[..., None])[..., 0]
    return product


def quadratics(models: int, d: int, batches: int = 1, *, seed: int = 0, sizes: Sequence[float] = ()) -> Quadratics:
    """Return random quadratics with eigenvalues from 0.1 to about 4, other ones for each model and batch."""
    factor = randn(batches, models, d, d, seed=seed)
    hessians = factor @ factor.mT / d + 0.1 * torch.eye(d, dtype=FLOAT)
    return Quadratics(hessians, randn(batches, models, d, seed=seed + 1), sizes or [1.0] * batches)


def same_for_all(problem: Quadratics, models: int) -> Quadratics:
    """Return a problem of one model as that of many."""
    return problem.select(torch.zeros(models, dtype=torch.int64))


def answers(problem: Problem) -> Callable[[Ask], Evaluation]:
    """Return what answers a rule's questions, with Hessian-vector products only where it asks for them."""

    def answer(ask: Ask) -> Evaluation:
        def evaluate(batch: int) -> Evaluation:
            found = problem.evaluate(ask.at(batch), batch)
            return found if ask.hessian else Evaluation(found.losses, found.grad)

        return averaged(ask, problem.sizes, evaluate)

    return answer


class Noted(Streams):
    """Streams that note what is drawn from them."""

    def __init__(self, keys: Tensor, step: int, drawn: list[tuple[str, int]]) -> None:
        super().__init__(keys, step)
        self.drawn = drawn

    def keys_of(self, stream: str, number: int) -> Tensor:
        self.drawn.append((stream, number))
        return super().keys_of(stream, number)


def keys_of(seeds: Sequence[int]) -> Tensor:
    return torch.tensor([stream_key("optimizer", seed) for seed in seeds])


def step_of(
    models: int,
    shapes: Sequence[tuple[int, ...]],
    *,
    count: int = 0,
    total: Tensor | float | None = None,
    batches: int = 1,
    first_seed: int = 0,
) -> Step:
    """Return a step whose models have the seeds from `first_seed` on."""
    streams = Streams(keys_of(range(first_seed, first_seed + models)), count)
    return Step(count, total, 1.0, batches, False, streams, shapes, FLOAT)


def part(name: str, **settings: Any) -> Any:
    """Return a rule or a base with settings that may be tensors `[K, 1]`, the others at their defaults."""
    plugin = get("optimizer", name)
    return plugin.load()(**_changed([plugin], settings))


def settings_of(name: str, **changes: Any) -> dict[str, Any]:
    """Return an optimizer's defaults, with changes."""
    return _changed(optimizer_parts(name), changes)


def _changed(plugins: Sequence[Plugin], changes: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {key: argument.default for plugin in plugins for key, argument in plugin.arguments.items()}
    assert changes.keys() <= defaults.keys()
    return {**defaults, **changes}


def asked(rule: Rule, problem: Problem, params: Tensor, step: Step, state: State | None = None) -> Asked:
    """Return what a rule returns in one step, and the weights that it asked about on the way."""
    points: list[Tensor] = []
    answer = answers(problem)

    def noting(ask: Ask) -> Evaluation:
        points.extend(ask.at(batch).clone() for batch in ask.batches)
        return answer(ask)

    found, state = answered(rule.gradient(params, rule.init(params) if state is None else state, step), noting)
    return Asked(found, state, points)


@dataclass(frozen=True)
class Asked:
    """One step of a rule alone."""

    found: Evaluation
    state: State
    points: Sequence[Tensor]


class Run:
    """An optimizer on its way over a problem.

    Attributes:
        params: Weights `[K, d]`.
        state: The optimizer's state.
        count: Steps done.
        losses: What the last step returned.
        drawn: The random draws of the last step.
        answered: The answers that the last step was given.
    """

    def __init__(
        self,
        name: str,
        settings: Sequence[Mapping[str, Any]],
        problem: Problem,
        params: Tensor,
        *,
        seeds: Sequence[int] | None = None,
        shapes: Sequence[tuple[int, ...]] = (),
        total: float = 50.0,
    ) -> None:
        self.optimizer = StackOptimizer(name, settings, params)
        self.problem, self.params, self.state = problem, params, self.optimizer.composed.init(params)
        self.keys = keys_of(seeds or range(len(params)))
        self.total = torch.full((len(params), 1), total, dtype=FLOAT)
        self.shapes = shapes or [(params.shape[1],)]
        self.count = 0
        self.losses = torch.empty(0)
        self.drawn: list[tuple[str, int]] = []
        self.answered: list[Evaluation] = []

    def go(self, steps: int = 1) -> Run:
        """Take some steps."""
        composed = self.optimizer.composed
        for _ in range(steps):
            self.drawn, self.answered = [], []
            step = Step(
                self.count,
                self.total,
                1.0,
                composed.rule.batches,
                composed.needs_hessian(self.count),
                Noted(self.keys, self.count, self.drawn),
                self.shapes,
                FLOAT,
            )
            stepping = composed.steps(self.params, self.state, step)
            self.losses, self.params, self.state = answered(stepping, self._answer)
            self.count += 1
        return self

    def _answer(self, ask: Ask) -> Evaluation:
        found = answers(self.problem)(ask)
        self.answered.append(replace(found))
        return found

    def select(self, index: Tensor) -> None:
        """Go on with some of the models."""
        self.optimizer = self.optimizer.select(index)
        self.problem = self.problem.select(index)
        self.params, self.keys, self.total = self.params[index], self.keys[index], self.total[index]
        self.state = {key: value[index] for key, value in self.state.items()}
