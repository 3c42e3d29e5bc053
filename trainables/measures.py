"""Measures of a trained stack: one that cannot be taken of a network is a row without a value, and costs no other.

What is refused (a `RequestError`: a path norm of a tanh network, say) would be refused again, so it counts as done: its
row has no value, has not converged, and says why in its `settings`, `{"refused": "..."}`. What fails in another way is
left out, so that it is taken again from the saved weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flatmin import plugins
from flatmin.errors import FlatminError, RequestError
from flatmin.labels import MeasureLabel, parse_label
from flatmin.sharpness import Engine, Measured, measure_all


@dataclass(frozen=True)
class Taken:
    """What became of measures.

    Attributes:
        measured: What was found, and what was refused.
        failed: Why one of those that are not among it is not, or None.
    """

    measured: Measured
    failed: FlatminError | None = None


def take(make: Callable[[], Engine], models: int, labels: Sequence[str]) -> Taken:
    """Measure every model of a stack, whatever becomes of single measures.

    Args:
        make: Makes their engine.
        models: How many there are.
        labels: Measures as a person writes them.
    """
    parsed = [parse_label(text) for text in labels]
    try:
        engine = make()
    except RequestError as error:
        return Taken(Measured([_refused(label, error, models) for label in parsed], [[[]] * models for _ in parsed]))
    whole, failed = Measured([], []), None
    for group in _groups(parsed):
        for label, found in _one_by_one(engine, group):
            if isinstance(found, Measured):
                whole = Measured([*whole.rows, *found.rows], [*whole.points, *found.points])
            elif isinstance(found, RequestError):
                whole = Measured([*whole.rows, _refused(label, found, models)], [*whole.points, [[]] * models])
            else:
                failed = found
    return Taken(whole, failed)


def _groups(labels: Sequence[MeasureLabel]) -> Iterator[list[MeasureLabel]]:
    """Yield measures that share work only when they are taken together; those of the engine itself share it anyway."""
    declared = plugins.get("subject", "subject").arguments
    defaults = {name: argument.default for name, argument in declared.items()}
    others: dict[str, list[MeasureLabel]] = {}
    for label in labels:
        if label.common == defaults:
            yield [label]
        else:
            others.setdefault(json.dumps(label.common, sort_keys=True), []).append(label)
    yield from others.values()


def _one_by_one(
    engine: Engine, group: Sequence[MeasureLabel]
) -> Iterator[tuple[MeasureLabel, Measured | FlatminError]]:
    """Yield what is found of a group at once, or, where that fails, of each of its measures."""
    try:
        found: Measured | FlatminError = measure_all(engine, [label.label for label in group])
    except FlatminError as error:
        found = error
    if isinstance(found, Measured) or len(group) == 1:
        yield group[0], found
    else:
        for label in group:
            yield from _one_by_one(engine, [label])


def _refused(label: MeasureLabel, error: RequestError, models: int) -> list[dict[str, Any]]:
    """Return the rows of a measure that cannot be taken."""
    declared = plugins.get("subject", "subject").arguments
    changed = {name: value for name, value in label.common.items() if value != declared[name].default}
    reason = str(error).removeprefix(f"measure {label.label} failed: ")
    row = {
        "measure": label.measure,
        "label": label.label,
        "metric": label.arguments.get("metric"),
        "seconds": 0.0,
        "settings": json.dumps({**label.arguments, **changed, "refused": reason}, sort_keys=True),
        "value": None,
        "stderr": None,
        "samples": 0,
        "passes": 0.0,
        "converged": False,
    }
    return [dict(row) for _ in range(models)]
