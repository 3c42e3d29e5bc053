"""Optimizers by name: a gradient rule over a base update, for K models with settings of their own."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from flatmin.optimizers.interface import (
    Ask,
    Base,
    Evaluation,
    Gradient,
    Rule,
    SecondOrderBase,
    State,
    Step,
    at,
)
from flatmin.plugins import Plugin, optimizer_parts


class Plain(Rule):
    """The rule of an optimizer that names none: the gradient at the weights."""

    def gradient(self, params: Tensor, state: State, step: Step) -> Gradient:
        """Ask for the gradient at the weights and return it."""
        found = yield at(params, hessian=step.hessian)
        return found, state


class Composed:
    """A rule and a base, whose states are kept in one mapping under the names of their parts.

    Args:
        parts: The plug-ins, as `flatmin.plugins.optimizer_parts` returns them.
        values: The settings: numbers, or tensors `[K, 1]` (or `[1, d]`) that broadcast against weights `[K, d]`.
    """

    def __init__(self, parts: Sequence[Plugin], values: Mapping[str, Any]) -> None:
        *rules, base = [part.load()(**{key: values[key] for key in part.arguments}) for part in parts]
        self.rule: Rule = rules[0] if rules else Plain()
        self.base: Base | SecondOrderBase = base
        self._names = [part.name for part in parts]

    def init(self, params: Tensor) -> State:
        """Return the state before the first step for weights `[K, d]`."""
        of_rule = {f"{self._names[0]}/{key}": value for key, value in self.rule.init(params).items()}
        return {**of_rule, **{f"{self._names[-1]}/{key}": value for key, value in self.base.init(params).items()}}

    @property
    def products(self) -> float:
        """Hessian-vector products of a step, on average over steps."""
        return cast(SecondOrderBase, self.base).products if self.second_order else 0.0

    def needs_hessian(self, count: int) -> bool:
        """Return whether the step after `count` others takes Hessian-vector products."""
        return self.second_order and cast(SecondOrderBase, self.base).needs_hessian(count)

    @property
    def second_order(self) -> bool:
        """Whether the base ever takes Hessian-vector products."""
        return hasattr(self.base, "needs_hessian")

    def steps(
        self, params: Tensor, state: State, step: Step
    ) -> Generator[Ask, Evaluation, tuple[Tensor, Tensor, State]]:
        """Take one step: yield the rule's questions; return losses `[K]`, new weights `[K, d]` and new state."""
        of_rule, of_base = (_own(state, name) for name in (self._names[0], self._names[-1]))
        found, ruled = yield from self.rule.gradient(params, of_rule, step)
        params, based = self.base.update(params, found, of_base, step)
        named = {f"{self._names[0]}/{key}": value for key, value in ruled.items()} if len(self._names) > 1 else {}
        return found.losses, params, {**named, **{f"{self._names[-1]}/{key}": value for key, value in based.items()}}


class StackOptimizer:
    """The optimizer of K models, such as `sgd` or `sam-sgd`.

    Args:
        name: A base update, or `rule-base`.
        settings: The settings of each model; those that are not `per_model` are the first one's.
        like: A tensor of the type and device of the weights.

    Attributes:
        composed: The rule and the base.
    """

    def __init__(self, name: str, settings: Sequence[Mapping[str, Any]], like: Tensor) -> None:
        self._parts = optimizer_parts(name)
        self._values: dict[str, Any] = {}
        for part in self._parts:
            for key, argument in part.arguments.items():
                own = [model[key] for model in settings]
                self._values[key] = (
                    torch.tensor(own, dtype=like.dtype, device=like.device)[:, None]
                    if argument.setting.per_model
                    else own[0]
                )
        self.composed = Composed(self._parts, self._values)

    def select(self, index: Tensor) -> StackOptimizer:
        """Return the optimizer of some of the models."""
        chosen = object.__new__(StackOptimizer)
        chosen._parts = self._parts
        chosen._values = {
            key: value[index] if isinstance(value, Tensor) else value for key, value in self._values.items()
        }
        chosen.composed = Composed(chosen._parts, chosen._values)
        return chosen


def _own(state: State, name: str) -> State:
    return {key.partition("/")[2]: value for key, value in state.items() if key.partition("/")[0] == name}
