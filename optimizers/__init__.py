"""Optimizers = gradient rule x base update, one file each, in two doors.

A base (`sgd`, `adam`) says what is done with a gradient; a rule (`sam`, `lpf`) says at which weights and on which
batches the gradient is taken. `sgd` alone takes the plain gradient; `sam-sgd` composes the two. A study's
stacked trainer drives them for K models at once, each `per_model` setting a `[K, 1]` tensor that broadcasts against
the stacked weights `[K, d]`; `TorchOptimizer` is the same for one model in anybody's loop.
"""

from flatmin.optimizers.torch_optimizer import TorchOptimizer

__all__ = ["TorchOptimizer"]
