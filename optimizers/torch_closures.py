"""The closures of a `TorchOptimizer`: how many a step takes, and what they do."""

from __future__ import annotations

from collections.abc import Sequence

from flatmin.errors import RequestError
from flatmin.optimizers.compose import Composed, Plain
from flatmin.optimizers.torch_step import Closure


def wanted(composed: Composed) -> str:
    """Return how a step of an optimizer is called."""
    takes = composed.rule.batches
    if takes > 1:
        kind = "micro-batches" if composed.rule.splits else "batches"
        return f"{takes} {kind} a step: step([closure_1, ..., closure_{takes}]), one closure per batch"
    if composed.second_order:
        return "step(closure), whose closure returns the loss without calling backward"
    return "step(closure)" if not isinstance(composed.rule, Plain) else "step() or step(closure)"


def closures_of(name: str, composed: Composed, closure: Closure | Sequence[Closure] | None) -> list[Closure]:
    """Return the closures that a step was given, one per batch.

    Raises:
        RequestError: They are none, or not as many as the optimizer takes.
    """
    takes = composed.rule.batches
    if closure is None:
        more = "" if takes > 1 or composed.second_order else ", or first_step and second_step"
        raise RequestError(f"'{name}' takes {wanted(composed)}{more}; step() has nothing to evaluate")
    if callable(closure):
        if takes > 1:
            raise RequestError(f"'{name}' takes {wanted(composed)}; it was given a single closure")
        return [closure]
    if not isinstance(closure, Sequence):
        raise RequestError(f"'{name}' takes {wanted(composed)}; it was given a {type(closure).__name__}")
    if not 1 <= len(closure) <= takes:
        raise RequestError(f"'{name}' takes {wanted(composed)}; it was given {len(closure)} closures")
    return list(closure)
