"""From labels to rows: measure a stack and write down what was found."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flatmin import plugins
from flatmin.errors import FlatminError, RequestError
from flatmin.labels import MeasureLabel, parse_label
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Curve, Estimate, exact
from flatmin.sharpness.subject import subject
from flatmin.sharpness.subsets import measure_of_subset


@dataclass(frozen=True)
class Measured:
    """What was found of K models.

    Attributes:
        rows: For each label, in their order, one row per model with the columns measure, label, value, stderr,
            samples, passes, converged, metric, seconds (of this measure, divided by K) and settings (JSON) of the
            table `sharpness/`. What is undefined is None. A label that failed has none.
        points: For each of the same labels, for each model, the points of its curves with the columns kind, settings
            (JSON), x, y and value of the table `spectra/`.
        failed: The labels that failed, and why.
    """

    rows: list[list[dict[str, Any]]]
    points: list[list[list[dict[str, Any]]]]
    failed: Mapping[str, FlatminError] = field(default_factory=dict)


def measure_stack(engine: Engine, labels: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Measure every model of a stack and return the rows; see `measure_all`, which returns curves too."""
    return measure_all(engine, labels).rows


def measure_all(engine: Engine, labels: Sequence[str], *, keep_going: bool = False) -> Measured:
    """Measure every model of a stack.

    A value depends on the model, its key and the label alone, not on the other labels or their order; only
    `seconds` does, because measures share work.

    Args:
        engine: The models.
        labels: Measures as a person writes them, `lpf` or `lpf(sigma=0.002, data=test)`.
        keep_going: Whether a measure that cannot be taken costs no other. What is refused would be refused again, so
            it has rows without a value, with the reason in their `settings` under `refused`; what fails in another
            way is in `failed`.

    Raises:
        RequestError: A label names no measure, or gives it what it cannot take; nothing was measured then.
        FlatminError: A measure failed; the message names it. Running out of memory is raised as it is, with
            the label as a note, so that a caller can try again with fewer models.
    """
    parsed = [parse_label(text) for text in labels]
    found: dict[str, _Found] = {}
    for common in {json.dumps(label.common, sort_keys=True): label.common for label in parsed}.values():
        own = [label for label in parsed if label.common == common]
        for label, result in _of_subject(engine, common, own):
            if isinstance(result, FlatminError) and not keep_going:
                raise result
            found[label.label] = result
    whole, failed = Measured([], []), dict[str, FlatminError]()
    for label in parsed:
        result = found[label.label]
        if isinstance(result, RequestError):
            whole.rows.append([row_without_value(label, refused=str(result)) for _ in range(len(engine))])
            whole.points.append([[] for _ in range(len(engine))])
        elif isinstance(result, FlatminError):
            failed[label.label] = result
        else:
            estimate, seconds = result
            whole.rows.append([_row(label, estimate, seconds / len(engine), k) for k in range(len(engine))])
            whole.points.append([_points(label, estimate.curves, k) for k in range(len(engine))])
    return replace(whole, failed=failed)


def refused(labels: Sequence[str], models: int, error: RequestError) -> Measured:
    """Return what `measure_all` finds of so many models whose network no measure can be taken of."""
    rows = [[row_without_value(parse_label(text), refused=str(error)) for _ in range(models)] for text in labels]
    return Measured(rows, [[[] for _ in range(models)] for _ in labels])


def row_without_value(label: MeasureLabel, **why: str) -> dict[str, Any]:
    """Return the row of a measure that was not taken, with the reason in its settings under its kind."""
    reasons = {kind: reason.removeprefix(_failed(label, "")) for kind, reason in why.items()}
    row = _row(label, exact(torch.full((1,), torch.nan), passes=0.0, samples=0), 0.0, 0)
    return {**row, "settings": json.dumps({**_settings(label), **reasons}, sort_keys=True)}


_Found = tuple[Estimate, float] | FlatminError
"""An estimate and its seconds, or why there is none."""


def _of_subject(
    engine: Engine, common: Mapping[str, Any], labels: Sequence[MeasureLabel]
) -> Iterator[tuple[MeasureLabel, _Found]]:
    """Yield what is found of measures of the same examples and loss; their engine goes when they are done."""
    try:
        chosen = subject(engine, **common)
    except FlatminError as error:
        for label in labels:
            yield label, type(error)(_failed(label, error))
        return
    for label in labels:
        try:
            yield label, _timed(chosen, label)
        except FlatminError as error:
            yield label, error


def _timed(engine: Engine, label: MeasureLabel) -> tuple[Estimate, float]:
    start = time.perf_counter()
    try:
        estimate = measure_of_subset(engine, label, _taken) if engine.is_subset else _taken(engine, label)
    except (MemoryError, torch.OutOfMemoryError) as error:
        error.add_note(f"while measuring {label.label}")
        raise
    except FlatminError as error:
        raise type(error)(_failed(label, error)) from error
    except Exception as error:
        raise FlatminError(_failed(label, f"{type(error).__name__}: {error}")) from error
    return estimate, time.perf_counter() - start


def _taken(engine: Engine, label: MeasureLabel) -> Estimate:
    estimate: Estimate = plugins.get("measure", label.measure).load()(engine, **label.arguments)
    return replace(estimate, **{name: getattr(estimate, name).detach().cpu() for name in _COLUMNS})


_COLUMNS = ("value", "stderr", "samples", "passes", "converged")


def _failed(label: MeasureLabel, why: object) -> str:
    return f"measure {label.label} failed: {why}"


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
            if math.isfinite(x)
        ]
    return points


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
