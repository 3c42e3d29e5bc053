"""A YAML document that remembers the line of every field, for messages that can be acted on.

Values without quotes are read as YAML 1.2 reads them (https://yaml.org/spec/1.2.2, section 10.3.2): `1e-3` is a
number; `no`, `1:30` and `2024-01-01` are text, which a setting then takes or refuses by its own type. Tags are refused,
so a document holds plain data alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import Repr
from typing import Any

import yaml

from flatmin.errors import StudyError

_DEEPEST = 20
"""Levels of nesting; a YAML alias that holds itself has no end."""

_MOST = 100_000
"""Fields and values of a study; aliases of aliases can write down billions in ten lines."""

_MOST_DIGITS = 40
"""Digits of a whole number; no setting takes more than 64 bits."""

Place = tuple[str | int, ...]
"""A path into the document, such as `("axes", "lr", 0)`."""

_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(?:0|[1-9][0-9]*)",
    "float": r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "merge": r"<<",
}
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+\Z")


class _Loader(yaml.SafeLoader):
    """Values without quotes as YAML 1.2 has them; everything else, and `<<`, as PyYAML has it."""

    yaml_implicit_resolvers: dict[Any, Any] = {  # noqa: RUF012 (as the base class declares it)
        None: [(f"{_TAG}{kind}", re.compile(rf"(?:{pattern})\Z")) for kind, pattern in _PLAIN.items()]
    }


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
        StudyError: The file cannot be read, or is not plain YAML.
    """
    return parse(text_of(path, source), source)


def text_of(path: Path, source: str) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark.

    Raises:
        StudyError: The file cannot be read, or is not such text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise StudyError(
            [f"{source}: is not text in UTF-8: byte {error.start} is {byte:#04x}; a study is a YAML file"]
        ) from None
    except OSError as error:
        raise StudyError([f"{source}: cannot be read: {error.strerror or error}"]) from None


def parse(text: str, source: str) -> Document:
    """Read YAML.

    Args:
        text: The YAML.
        source: Its name in messages.

    Raises:
        StudyError: It is not YAML, or has what a study does not take.

    >>> parse("a: [1e-3, no, 2024-01-01]", "x.yaml").data
    {'a': [0.001, 'no', '2024-01-01']}
    """
    walk = _Walk(source)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Document(source, None, {})
        walk.visit(node, (), loader)
        if walk.problems:
            raise StudyError(walk.problems)
        return Document(source, loader.construct_document(node), walk.lines)
    except yaml.YAMLError as error:
        line, reason = _reason(error, text)
        raise StudyError([f"{source}:{line}: not YAML: {reason}"]) from None
    except RecursionError:
        raise StudyError([f"{source}: nested too deeply for a study"]) from None
    except (ValueError, OverflowError):
        raise StudyError([f"{source}: not YAML: an escape such as \\U names a character that does not exist"]) from None


def shown(value: Any) -> str:
    """Return a value as messages have it: as YAML writes it, cut where it is long.

    >>> shown(None), shown(True), shown([1, "a"])
    ('null', 'true', "[1, 'a']")
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    short = Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def _reason(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """Return the line (from 1) of a mistake in YAML, and what is wrong in words that help."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return line, f"the character {error.character:#04x}, which YAML does not allow"
    problem, mark = getattr(error, "problem", None) or str(error), getattr(error, "problem_mark", None)
    if mark is None:
        return 1, problem
    written = text.split("\n")[mark.line] if mark.line < text.count("\n") + 1 else ""
    if "\t" in written[: len(written) - len(written.lstrip())] or r"'\t'" in problem:
        return mark.line + 1, "a tab; YAML indents by spaces"
    if "mapping values are not allowed" in problem:
        return mark.line + 1, f"a second ': ' in {written.strip()!r}; a text with ': ' in it wants quotes around it"
    if "cannot start any token" in problem:
        problem += "; a text that begins with it wants quotes around it"
    if "found another document" in problem:
        problem = "a second document begins here, and a study is one"
    return mark.line + 1, problem


@dataclass
class _Walk:
    """Goes over all nodes: notes their lines, and what a study cannot hold."""

    source: str
    lines: dict[Place, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def visit(self, node: yaml.Node, place: Place, loader: _Loader) -> None:
        self.lines.setdefault(place, node.start_mark.line + 1)
        if len(place) > _DEEPEST or len(self.lines) > _MOST:
            reason = (
                "nested too deeply for a study" if len(place) > _DEEPEST else f"more than {_MOST:,} fields and values"
            )
            raise StudyError([f"{self.source}:{node.start_mark.line + 1}: {reason}"])
        if isinstance(node, yaml.MappingNode):
            self._tag(node, place, f"{_TAG}map")
            for key, value in node.value:
                self._key(key, value, place, loader)
        elif isinstance(node, yaml.SequenceNode):
            self._tag(node, place, f"{_TAG}seq")
            for index, item in enumerate(node.value):
                self.visit(item, (*place, index), loader)
        elif isinstance(node, yaml.ScalarNode):
            self._scalar(node, place, loader)

    def _key(self, key: yaml.Node, value: yaml.Node, place: Place, loader: _Loader) -> None:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
            shown = f"{key.value!r}" if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            self._problem(key, place, f"{shown} in the place of a field's name, which is text")
            return
        child = (*place, key.value)
        if child in self.lines:
            self._problem(key, child, f"given twice (first on line {self.lines[child]})")
            return
        self.lines[child] = key.start_mark.line + 1
        self.visit(value, child, loader)

    def _scalar(self, node: yaml.ScalarNode, place: Place, loader: _Loader) -> None:
        plain = node.style is None
        if node.tag != f"{_TAG}str":
            resolve: Any = loader.resolve
            self._tag(node, place, resolve(yaml.ScalarNode, node.value, (plain, not plain)))
        if plain and _LEADING_ZERO.match(node.value):
            decimal = node.value.replace("_", "").lstrip("+-0") or "0"
            self._problem(
                node,
                place,
                f"{node.value}: YAML 1.1 reads a leading 0 as octal; write {decimal}, or quotes around a text",
            )
        if node.tag == f"{_TAG}int" and len(node.value) > _MOST_DIGITS:
            self._problem(node, place, f"a number of {len(node.value)} digits; a whole number should fit in 64 bits")
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            self._problem(node, place, f"{node.value!r}: half of a surrogate pair, which is not a character")

    def _tag(self, node: yaml.Node, place: Place, implied: str) -> None:
        if node.tag != implied:
            given = node.tag.replace(_TAG, "!!")
            self._problem(node, place, f"the tag {given}; a study has no tags, write the value alone")

    def _problem(self, node: yaml.Node, place: Place, reason: str) -> None:
        where = ".".join(map(str, place))
        self.problems.append(f"{self.source}:{node.start_mark.line + 1}: {f'{where}: ' if where else ''}{reason}")
