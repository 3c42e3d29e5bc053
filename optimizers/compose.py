"""Optimizers by name: a gradient rule over a base update, with each model's own settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatmin.optimizers.interface import Base, LossAndGrad, Rule, State
from flatmin.plugins import optimizer_parts


class Optimizer:
    """The optimizer of K models, such as `sgd` or `sam-sgd`.

    Args:
        name: A base update, or `rule-base`.
        settings: The settings of each model; those that are not `per_model` are the first one's.
        like: A tensor of the type and device of the weights.
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
        self._make()

    def _make(self) -> None:
        *rules, base = [part.load()(**{key: self._values[key] for key in part.arguments}) for part in self._parts]
        self._base: Base = base
        self._rule: Rule = rules[0] if rules else _plain

    def init(self, params: Tensor) -> State:
        """Return the state before the first step for weights `[K, d]`."""
        return self._base.init(params)

    def select(self, index: Tensor) -> Optimizer:
        """Return the optimizer of some of the models."""
        chosen = object.__new__(Optimizer)
        chosen._parts = self._parts
        chosen._values = {
            key: value[index] if isinstance(value, Tensor) else value for key, value in self._values.items()
        }
        chosen._make()
        return chosen

    def step(
        self, params: Tensor, state: State, lr_factor: Tensor, loss_and_grad: LossAndGrad
    ) -> tuple[Tensor, Tensor, State]:
        """Return the losses `[K]` at `params`, and the weights and state after one step.

        Args:
            params: Weights `[K, d]`; left as they are.
            state: The state from `init` or from the step before; left as it is.
            lr_factor: The schedule's factor of the learning rate, `[K, 1]`.
            loss_and_grad: Losses and gradients of the step's batch at given weights.
        """
        losses, grad = self._rule(params, loss_and_grad)
        params, state = self._base.update(params, grad, state, lr_factor)
        return losses, params, state


def _plain(params: Tensor, loss_and_grad: LossAndGrad) -> tuple[Tensor, Tensor]:
    return loss_and_grad(params)
