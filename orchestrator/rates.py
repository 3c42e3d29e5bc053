"""What a trial is made of, and how long each part takes: steps, evaluations, measures.

With n models still training, a step and a pass over the training set take a + b n seconds each, so a trial takes

    sum over epochs of (steps * step(n) + passes * evaluation(n)) + measures * (models measured),

n falling as models end. Uncalibrated rates follow from counts of operations and from the constants below, which stand
for one CPU core; how far off they are has not been measured.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from flatmin.labels import parse_label
from flatmin.trial import Trial

STEP_SECONDS, PASS_SECONDS, LAYER_SECONDS = 1.2e-3, 3e-4, 2e-5
"""Time that no arithmetic explains: of a gradient, whose batch is gathered and which updates; of a measure's pass; and
of a pass through a layer."""

FLOPS = 8e9
"""Floating-point operations per second of one core on small matrices."""

_PASSES: Mapping[str, float] = {
    **dict.fromkeys(("lpf", "local_entropy"), 20.0),
    **dict.fromkeys(("lpf_gap", "lpf_relative", "average_sharpness"), 200.0),
    "eps_sharpness": 16.0,
    "pac_bayes": 100.0,
    **dict.fromkeys(("shannon_entropy", "margin", "fourier"), 1.0),
    "fisher_rao": 3.0,
    "gradient_norm": 2.0,
    **dict.fromkeys(("l2_norm", "distance_from_initialisation", "path_norm", "spectral_norms", "random"), 0.0),
}
"""Passes over its examples that a measure takes; where it samples, as many as MLPs on the digits needed."""

_PRODUCTS: Mapping[str, int] = {
    **dict.fromkeys(("hessian_trace", "hessian_frobenius"), 48),
    "lambda_max": 18,
    "effective_dimension": 256,
    "hessian_density": 400,
}
"""Hessian-vector products, of four passes each; as many as there are weights give the exact value."""

_SIGMAS = 12
"""Deviations of the noise at which pac_bayes takes each of its draws."""

_BATCHES = 32
"""Batches that a measure of batches takes: it stops at 16 to 64."""

_OTHERS = 100.0
"""Passes of a measure that nothing is known of."""


@dataclass(frozen=True)
class Line:
    """Seconds for a stack of n models, `fixed + each * n`."""

    fixed: float
    each: float

    def of(self, models: float) -> float:
        """Return the seconds for so many models."""
        return self.fixed + self.each * models

    def scaled(self, factor: float) -> Line:
        """Return the line of what takes `factor` times as long."""
        return Line(factor * self.fixed, factor * self.each)


@dataclass(frozen=True)
class Rates:
    """Seconds of the parts of a trial on a device.

    Attributes:
        step: Of a training step.
        evaluation: Of a pass over the training set that evaluates.
        measures: Of all measures of one model.
        setup: Of loading the data set and building the stack; part of the wall-clock time alone.
    """

    step: Line
    evaluation: Line
    measures: float
    setup: float = 0.0


def predicted_rates(trial: Trial, cost: Mapping[str, Any]) -> Rates:
    """Return rates that follow from counts alone.

    Args:
        trial: The trial.
        cost: What `flatmin.trainables.cost.cost` says of its program.
    """
    layers, arithmetic = LAYER_SECONDS * cost["layers"], cost["flops"] / FLOPS
    examples = trial.program["batch_size"] * cost["batches"]
    gradients = cost["gradients"]
    passing = Line(0.0, layers) if cost["loops"] else Line(layers, 0.0)
    return Rates(
        step=Line(
            gradients * (STEP_SECONDS + 3 * passing.fixed), 3 * gradients * (passing.each + examples * arithmetic)
        ),
        evaluation=Line(passing.fixed, passing.each + cost["train_size"] * arithmetic),
        measures=trial_passes(trial, cost) * (PASS_SECONDS + layers + cost["train_size"] * arithmetic),
    )


def trial_passes(trial: Trial, cost: Mapping[str, Any]) -> float:
    """Return the passes over the training set that the measures of one model take at one epoch."""
    sizes = cost["n_params"], cost["train_size"], cost["chain_outputs"]
    return sum(measure_passes(text, *sizes) for text in trial.measures)


def measure_passes(text: str, n_params: int, examples: int, chain_outputs: int = 0) -> float:
    """Return about how many passes over a set, in forward passes, a measure takes (see docs/measures.md).

    Args:
        text: Its label.
        n_params: Weights of the network.
        examples: How many the set has.
        chain_outputs: The outputs of a chain of linear layers, whose trace is exact; 0 of any other network.
    """
    label = _parsed(text)
    name, given = label.measure, label.arguments
    subset = label.common["subset"]
    share = 1.0 if subset is None else min(1.0, subset / examples)
    most = float(given.get("max_samples") or given.get("max_steps") or math.inf)
    if "max_draws" in given:
        most = float(_SIGMAS * given["max_draws"])
    if given.get("published") and name in {"hessian_trace", "effective_dimension"}:
        return share * 800.0
    if name == "hessian_trace" and chain_outputs and 1 + chain_outputs <= 2 * most:
        return share * 2.0 * (1 + chain_outputs)
    if name in _PRODUCTS:
        return share * 4 * min(n_params, _PRODUCTS[name], most)
    if name == "fisher_rao" and given["fisher"] == "hessian":
        return share * 4.0
    if name == "loss_surface":
        losses = float(given["points_per_axis"] ** given["dimensions"])
        return share * (losses + (256.0 if given["directions"] == "hessian" else 0.0))
    if name in {"sam_sharpness", "worst_sharpness", "local_entropy_gradient"}:
        climb = 2.0 * float(given["steps"])
        of_kind = {"first_order": 2.0, "true": climb + 3}.get(str(given.get("kind")), 3.0)
        each = {"worst_sharpness": climb + 3, "local_entropy_gradient": climb}.get(name, of_kind)
        batch = given["batch"]
        return each * (share if batch is None else min(_BATCHES, most) * min(batch, examples) / examples)
    return share * min(_PASSES.get(name, _OTHERS), most)


_parsed = cache(parse_label)
"""A study has a few labels and thousands of models."""


def trial_seconds(trial: Trial, cost: Mapping[str, Any], rates: Rates, ends: Sequence[float]) -> float:
    """Return the device seconds of a trial, its measures included.

    Args:
        trial: The trial.
        cost: What its program costs.
        rates: How long its parts take.
        ends: The epoch after which each of its models ends.
    """
    every = trial.measure_every
    times = len(ends) if every is None else sum(math.ceil(end / every) for end in ends)
    return training_seconds(trial, cost, rates, ends) + rates.measures * times


def training_seconds(trial: Trial, cost: Mapping[str, Any], rates: Rates, ends: Sequence[float]) -> float:
    """Return the device seconds of training a trial's models to their ends, evaluations included."""
    program = trial.program
    steps = cost["train_size"] / (program["batch_size"] * cost["batches"])
    others = (cost["test_size"] + cost["val_size"]) / cost["train_size"]
    stopping = any(model.settings["stop_loss"] > 0 for model in trial.models)
    passes = (1 if stopping else 1 / program["eval_every"]) + others / program["eval_every"]
    seconds = begin = 0.0
    left = sorted(ends)
    for place, end in enumerate(left):
        alive = len(left) - place
        seconds += (end - begin) * (steps * rates.step.of(alive) + passes * rates.evaluation.of(alive))
        begin = end
    return seconds


def longest_first(seconds: Sequence[float | None]) -> list[int]:
    """Return in which order trials are started: those that take longest first, which makes for a short tail.

    >>> longest_first([2.0, None, 3.0, 3.0])
    [2, 3, 0, 1]
    """
    return sorted(range(len(seconds)), key=lambda number: -(seconds[number] or 0.0))


def list_schedule(seconds: Sequence[float], at_a_time: int) -> list[float]:
    """Return when each trial ends if they are started in this order, each as soon as one of so many places is free.

    >>> list_schedule([3.0, 1.0, 2.0], 2)
    [3.0, 1.0, 3.0]
    """
    free, ends = [0.0] * at_a_time, []
    for duration in seconds:
        ends.append(free[0] + duration)
        heapq.heapreplace(free, ends[-1])
    return ends


def makespan(seconds: Sequence[float], concurrency: int) -> float:
    """Return when the last trial is done if `concurrency` run at a time, the longest first, as a launch starts them.

    >>> makespan([3.0, 3.0, 2.0, 2.0, 2.0], 2)
    7.0
    """
    return max(list_schedule([seconds[number] for number in longest_first(seconds)], concurrency), default=0.0)
