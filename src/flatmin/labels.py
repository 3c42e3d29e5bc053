"""Measure labels: `lpf` or `lpf(sigma=0.002, metric=identity)`, the same string everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flatmin import plugins
from flatmin.errors import RequestError, closest, nearest
from flatmin.settings import REQUIRED

_SHAPE = re.compile(r"^\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*$", re.DOTALL)


@dataclass(frozen=True)
class MeasureLabel:
    """A measure with its arguments, canonical.

    Attributes:
        measure: The plug-in's name.
        arguments: Every argument of the measure's own, defaults filled in.
        common: Every argument that all measures take (`data`, `subset`, ...), defaults filled in.
        label: The canonical text: arguments at their defaults left out, the rest sorted.
    """

    measure: str
    arguments: Mapping[str, Any]
    common: Mapping[str, Any]
    label: str

    def __hash__(self) -> int:
        return hash(self.label)


def parse_label(text: str) -> MeasureLabel:
    """Parse a measure as a person writes it.

    Raises:
        RequestError: No such measure, no such argument, or a value it cannot take.

    >>> parse_label("lpf( metric = identity, sigma=2e-3)").label
    'lpf(metric=identity, sigma=0.002)'
    >>> parse_label("lpf(sigma=0.01)").label
    'lpf'
    >>> parse_label("lpf(subset=2000, data=test)").label
    'lpf(data=test, subset=2000)'
    """
    match = _SHAPE.match(text)
    if match is None:
        raise RequestError(f"'{text}' is not a measure; write `lpf` or `lpf(sigma=0.002)`{_meant(text)}")
    name, inside = match.group(1), match.group(2)
    plugin = plugins.get("measure", name)
    common = plugins.get("subject", "subject").arguments
    twice = sorted(set(plugin.arguments) & set(common))
    if twice:
        raise RequestError(f"the measure '{name}' declares '{twice[0]}', which every measure takes already; rename it")
    arguments, refuses = {**plugin.arguments, **common}, _refused(plugin.refuses, common)
    given = {}
    for part in split_list(inside or ""):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise RequestError(f"in '{text}': '{part}' should read argument=value")
        if key in refuses:
            raise RequestError(f"{name} does not take '{key}': {refuses[key]}")
        if key not in arguments:
            accepted = arguments.keys() - refuses.keys()
            raise RequestError(f"{name} does not take '{key}'.{nearest(key, accepted) or ' It takes no arguments.'}")
        if key in given:
            raise RequestError(f"in '{text}': '{key}' is given twice")
        try:
            given[key] = arguments[key].canonical(value)
        except ValueError as error:
            raise RequestError(f"in '{text}': {key} = {value}: {error}") from None
    missing = [key for key, argument in arguments.items() if argument.default is REQUIRED and key not in given]
    if missing:
        raise RequestError(f"'{text}' needs {', '.join(missing)}")
    defaults = {key: argument.default for key, argument in arguments.items()}
    changed = sorted(key for key, value in given.items() if value != defaults[key])
    inner = ", ".join(f"{key}={format_value(given[key])}" for key in changed)
    values = {**defaults, **given}
    own, shared = ({key: values[key] for key in keys} for keys in (plugin.arguments, common))
    return MeasureLabel(name, own, shared, f"{name}({inner})" if inner else name)


def _refused(refuses: Mapping[str, str], common: Iterable[str]) -> dict[str, str]:
    """Return what a measure refuses, and why: with `subset` also what says more of it, `subset_stratified`."""
    further = {key: why for key in common for first, why in refuses.items() if key.startswith(f"{first}_")}
    return {**further, **refuses}


def _meant(text: str) -> str:
    """Return what is said of the measure that a text without a label's shape comes near to, if it names none.

    >>> _meant("lambda-max"), _meant("lpf(sigma=1")
    (". Did you mean 'lambda_max'?", '')
    """
    name, measures = text.partition("(")[0].strip(), plugins.listing("measure")
    close = None if name in measures else closest(name, measures)
    return f". Did you mean '{close}'?" if close else ""


def split_list(text: str, separator: str = ",") -> list[str]:
    """Split at separators outside brackets; empty text gives an empty list.

    >>> split_list("lpf(sigma=1, metric=filter),[1,2], x")
    ['lpf(sigma=1, metric=filter)', '[1,2]', 'x']
    """
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part.strip() for part in parts] if text.strip() else []


def format_value(value: Any) -> str:
    """Write a setting's value as a person would type it.

    >>> format_value((150, 200)), format_value(1e-4), format_value(True)
    ('[150,200]', '0.0001', 'true')
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e6 else repr(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return f"[{','.join(format_value(item) for item in value)}]"
    return str(value)
