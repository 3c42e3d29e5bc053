"""From labels to rows: measure a stack and write down what was found."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from flatmin import plugins
from flatmin.errors import FlatminError
from flatmin.labels import MeasureLabel, parse_label
from flatmin.sharpness.engine import Engine
from flatmin.sharpness.estimate import Estimate


def measure_stack(engine: Engine, labels: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Measure every model of a stack.

    A value depends on the model, its key and the label alone, not on the other labels or their order; only
    `seconds` does, because measures share work.

    Args:
        engine: The models.
        labels: Measures as a person writes them, `lpf` or `lpf(sigma=0.002)`.

    Returns:
        For each label, in their order, one row per model with the columns measure, label, value, stderr,
        samples, passes, converged, metric, seconds (of this measure, divided by K) and settings (JSON) of the
        table `sharpness/`. What is undefined is None.

    Raises:
        RequestError: A label names no measure, or gives it what it cannot take; nothing was measured then.
        FlatminError: A measure failed; the message names it. Running out of memory is raised as it is, with
            the label as a note, so that a caller can try again with fewer models.
    """
    return [_measure(engine, label) for label in [parse_label(text) for text in labels]]


def _measure(engine: Engine, label: MeasureLabel) -> list[dict[str, Any]]:
    function = plugins.get("measure", label.measure).load()
    start = time.perf_counter()
    try:
        estimate: Estimate = function(engine, **label.arguments)
    except (MemoryError, torch.OutOfMemoryError) as error:
        error.add_note(f"while measuring {label.label}")
        raise
    except Exception as error:
        raise FlatminError(f"measure {label.label} failed: {type(error).__name__}: {error}") from error
    seconds = (time.perf_counter() - start) / len(engine)
    common = {
        "measure": label.measure,
        "label": label.label,
        "metric": label.arguments.get("metric"),
        "seconds": seconds,
        "settings": json.dumps(dict(label.arguments), sort_keys=True),
    }
    return [{**common, **_row(estimate, k)} for k in range(len(engine))]


def _row(estimate: Estimate, k: int) -> dict[str, Any]:
    value = _finite(estimate.value[k].item())
    return {
        "value": value,
        "stderr": None if value is None else _finite(estimate.stderr[k].item()),
        "samples": int(estimate.samples[k].item()),
        "passes": _finite(estimate.passes[k].item()),
        "converged": value is not None and bool(estimate.converged[k].item()),
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
