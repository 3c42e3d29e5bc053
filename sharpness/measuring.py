"""From labels to rows: measure a stack and write down what was found.

A measure of a subset of m of n examples (`lpf(subset=2000)`) is taken again on G = 16 disjoint groups of m / G of them,
with the first of the same random vectors and no more than a rough tolerance asks for, so that all groups together cost
no more than the subset. With V the variance of the groups' values,

    sampling error^2 = V / G (1 - m / n) + b^2,    b = (mean of the groups - value) / (G - 1) (1 - m / n),

is added to the measure's own variance. The first term is exact for a mean over examples, and for any measure that is
close to one in the neighbourhood of a group's size; b is the bias of a value that changes like 1 / m, as the largest
eigenvalue or a norm of a gradient does. Source: the method of random groups with a finite-population correction
(Wolter, Introduction to Variance Estimation, 2007, chapter 2), and the jackknife's bias (Quenouille 1956).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flatmin import plugins
from flatmin.errors import FlatminError
from flatmin.labels import MeasureLabel, parse_label
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Curve, Estimate
from flatmin.sharpness.subject import subject

GROUPS = 16

_ROUGH = 0.2
"""The tolerance of a group's value: groups are compared among themselves, and share the noise of their vectors."""


@dataclass(frozen=True)
class Measured:
    """What was found of K models.

    Attributes:
        rows: For each label, in their order, one row per model with the columns measure, label, value, stderr,
            samples, passes, converged, metric, seconds (of this measure, divided by K) and settings (JSON) of the
            table `sharpness/`. What is undefined is None.
        points: For each label, for each model, the points of its curves with the columns kind, settings (JSON), x, y
            and value of the table `spectra/`.
    """

    rows: list[list[dict[str, Any]]]
    points: list[list[list[dict[str, Any]]]]


def measure_stack(engine: Engine, labels: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Measure every model of a stack and return the rows; see `measure_all`, which returns curves too."""
    return measure_all(engine, labels).rows


def measure_all(engine: Engine, labels: Sequence[str]) -> Measured:
    """Measure every model of a stack.

    A value depends on the model, its key and the label alone, not on the other labels or their order; only
    `seconds` does, because measures share work.

    Args:
        engine: The models.
        labels: Measures as a person writes them, `lpf` or `lpf(sigma=0.002, data=test)`.

    Raises:
        RequestError: A label names no measure, or gives it what it cannot take; nothing was measured then.
        FlatminError: A measure failed; the message names it. Running out of memory is raised as it is, with
            the label as a note, so that a caller can try again with fewer models.
    """
    parsed = [parse_label(text) for text in labels]
    found: dict[str, tuple[Estimate, float]] = {}
    for common in {json.dumps(label.common, sort_keys=True): label.common for label in parsed}.values():
        found.update(_measure_subject(engine, common, [label for label in parsed if label.common == common]))
    rows, points = [], []
    for label in parsed:
        estimate, seconds = found[label.label]
        rows.append([_row(label, estimate, seconds / len(engine), k) for k in range(len(engine))])
        points.append([_points(label, estimate.curves, k) for k in range(len(engine))])
    return Measured(rows, points)


def _measure_subject(
    engine: Engine, common: Mapping[str, Any], labels: Sequence[MeasureLabel]
) -> dict[str, tuple[Estimate, float]]:
    """Take measures of the same examples and loss; their engine goes when they are done."""
    try:
        chosen = subject(engine, **common)
    except FlatminError as error:
        raise type(error)(f"measure {labels[0].label} failed: {error}") from error
    found = {label.label: _timed(chosen, label) for label in labels}
    return _with_sampling_error(chosen, labels, found) if chosen.is_subset else found


def _timed(engine: Engine, label: MeasureLabel) -> tuple[Estimate, float]:
    function = plugins.get("measure", label.measure).load()
    start = time.perf_counter()
    try:
        estimate: Estimate = function(engine, **label.arguments)
    except (MemoryError, torch.OutOfMemoryError) as error:
        error.add_note(f"while measuring {label.label}")
        raise
    except FlatminError as error:
        raise type(error)(f"measure {label.label} failed: {error}") from error
    except Exception as error:
        raise FlatminError(f"measure {label.label} failed: {type(error).__name__}: {error}") from error
    tensors = {name: getattr(estimate, name).detach().cpu() for name in _COLUMNS}
    return replace(estimate, **tensors), time.perf_counter() - start


_COLUMNS = ("value", "stderr", "samples", "passes", "converged")


def _with_sampling_error(
    sample: Engine, labels: Sequence[MeasureLabel], found: Mapping[str, tuple[Estimate, float]]
) -> dict[str, tuple[Estimate, float]]:
    """Return the measures of a subset with what drawing it adds to their stderr, passes and seconds."""
    size = sample.n_examples // GROUPS
    parts: dict[str, list[tuple[Estimate, float]]] = {label.label: [] for label in labels}
    for engine in sample.groups(GROUPS):
        for label in labels:
            parts[label.label].append(_timed(engine, _roughly(label)))
    share, group_share = sample.n_examples / sample.population, size / sample.population
    together = {}
    for name, of_groups in parts.items():
        estimate, seconds = found[name]
        values, passes = (
            torch.cat([getattr(part, column) for part, _ in of_groups]).double().reshape(GROUPS, len(sample))
            for column in ("value", "passes")
        )
        error = (estimate.stderr.square() + _sampling_variance(estimate.value, values, size, sample)).sqrt()
        widened = replace(
            estimate,
            stderr=error,
            passes=estimate.passes * share + passes.sum(dim=0) * group_share,
            converged=estimate.converged & (error <= _tolerance(name) * estimate.value.abs()),
        )
        together[name] = widened, seconds + sum(taken for _, taken in of_groups)
    return together


def _roughly(label: MeasureLabel) -> MeasureLabel:
    """Return a measure with its tolerance widened, if it has one."""
    rough = max(_ROUGH, label.arguments.get("tolerance", 0.0))
    return replace(label, arguments={name: rough if name == "tolerance" else v for name, v in label.arguments.items()})


def _tolerance(label: str) -> float:
    """Return the tolerance of a measure, relative to its value; one that has none only needs a finite stderr."""
    return float(parse_label(label).arguments.get("tolerance", math.inf))


def _sampling_variance(value: Tensor, of_groups: Tensor, size: int, sample: Engine) -> Tensor:
    """Return the mean squared error of values `[K]` of a sample, from those of its groups `[G, K]`."""
    left_out = 1 - sample.n_examples / sample.population
    bias = (of_groups.mean(dim=0) - value) / (len(of_groups) - 1) * left_out
    return of_groups.var(dim=0) * (size / sample.n_examples) * left_out + bias.square()


def _row(label: MeasureLabel, estimate: Estimate, seconds: float, k: int) -> dict[str, Any]:
    value = _finite(estimate.value[k].item())
    return {
        "measure": label.measure,
        "label": label.label,
        "metric": label.arguments.get("metric"),
        "seconds": seconds,
        "settings": json.dumps(_settings(label), sort_keys=True),
        "value": value,
        "stderr": None if value is None else _finite(estimate.stderr[k].item()),
        "samples": int(estimate.samples[k].item()),
        "passes": _finite(estimate.passes[k].item()),
        "converged": value is not None and bool(estimate.converged[k].item()),
    }


def _settings(label: MeasureLabel) -> dict[str, Any]:
    """Return a measure's own arguments, and those common ones that are not at their defaults."""
    declared = plugins.get("subject", "subject").arguments
    changed = {name: value for name, value in label.common.items() if value != declared[name].default}
    return {**label.arguments, **changed}


def _points(label: MeasureLabel, curves: Sequence[Curve], k: int) -> list[dict[str, Any]]:
    points = []
    for curve in curves:
        settings = json.dumps({"label": label.label, **_settings(label), **curve.settings}, sort_keys=True)
        xs, values = curve.x[k].tolist(), curve.value[k].tolist()
        ys = [None] * len(xs) if curve.y is None else curve.y[k].tolist()
        points += [
            {"kind": curve.kind, "settings": settings, "x": x, "y": y, "value": _finite(value)}
            for x, y, value in zip(xs, ys, values, strict=True)
        ]
    return points


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
