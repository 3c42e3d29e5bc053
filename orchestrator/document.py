"""A YAML document that remembers the line of every field, for messages that can be acted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flatmin.errors import StudyError

_DEEPEST = 20
"""Levels of nesting; a YAML alias that holds itself has no end."""

Place = tuple[str | int, ...]
"""A path into the document, such as `("axes", "lr", 0)`."""


@dataclass(frozen=True)
class Document:
    """Plain data and where each part of it stands.

    Attributes:
        source: The file as it is named in messages.
        data: The document as plain Python data.
        lines: The line (from 1) of each place.
    """

    source: str
    data: Any
    lines: Mapping[Place, int]

    def where(self, place: Sequence[str | int]) -> str:
        """Return `file:line: field` for a place, or for the nearest enclosing one that is there."""
        known = self.known(place)
        line = f":{self.lines[known]}" if known in self.lines else ""
        field = ".".join(str(part) for part in place)
        return f"{self.source}{line}: {field}" if field else f"{self.source}{line}"

    def known(self, place: Sequence[str | int]) -> Place:
        """Return the longest leading part of a place that stands in the document."""
        known = tuple(place)
        while known and known not in self.lines:
            known = known[:-1]
        return known


def load(path: Path, source: str) -> Document:
    """Read a YAML file.

    Raises:
        StudyError: The file cannot be read or is not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError([f"{source}: cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise StudyError([f"{source}{line}: not YAML: {getattr(error, 'problem', error)}"]) from None
    problems: list[str] = []
    lines: dict[Place, int] = {}
    if node is not None:
        _mark(node, (), lines, problems, source)
    if problems:
        raise StudyError(problems)
    return Document(source, yaml.safe_load(text), lines)


def _mark(node: yaml.Node, place: Place, lines: dict[Place, int], problems: list[str], source: str) -> None:
    lines[place] = node.start_mark.line + 1
    if len(place) > _DEEPEST:
        raise StudyError([f"{source}:{node.start_mark.line + 1}: nested too deeply for a study"])
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*place, str(key.value))
            if child in lines:
                field = ".".join(map(str, child))
                problems.append(
                    f"{source}:{key.start_mark.line + 1}: {field}: given twice (first on line {lines[child]})"
                )
            _mark(value, child, lines, problems, source)
            lines[child] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _mark(item, (*place, index), lines, problems, source)
