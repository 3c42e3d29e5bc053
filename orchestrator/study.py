"""Studies: a YAML file, checked against the signatures of the plug-ins it names."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from flatmin.errors import RequestError, StudyError, nearest
from flatmin.labels import parse_label, split_list
from flatmin.orchestrator.document import Document, Place, load
from flatmin.orchestrator.grid import Where, expand
from flatmin.orchestrator.study_file import Case, Resources, Small, StudyFile, with_value
from flatmin.settings import Argument
from flatmin.trial import Model


@dataclass(frozen=True)
class Study:
    """A checked study.

    Attributes:
        file: The study as written, overrides applied.
        models: Every model of the grid, each once, in grid order.
        arguments: The declaration of every setting that some model takes.
        measures: Canonical measure labels.
    """

    file: StudyFile
    models: tuple[Model, ...]
    arguments: Mapping[str, Argument]
    measures: tuple[str, ...]

    @property
    def name(self) -> str:
        """The study's name."""
        return self.file.study

    def to_yaml(self) -> str:
        """Return the resolved study as YAML."""
        return yaml.safe_dump(self.file.model_dump(mode="json", exclude_none=True), sort_keys=False)


def builtin_names() -> list[str]:
    """Return the names of the built-in studies."""
    folder = resources.files("flatmin.orchestrator.studies")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def builtin_studies() -> list[dict[str, Any]]:
    """Return name, number of models, source and purpose of every built-in study."""
    return [
        {"name": name, "models": len(study.models), "source": study.file.source, "about": study.file.about}
        for name, study in ((name, read_study(name)) for name in builtin_names())
    ]


def find(name: str) -> tuple[Path, str]:
    """Return the path of a study and how messages name it.

    Raises:
        RequestError: Neither a built-in study nor a file.
    """
    if name in builtin_names():
        return Path(str(resources.files("flatmin.orchestrator.studies") / f"{name}.yaml")), f"{name}.yaml"
    path = Path(name)
    if path.is_file():
        return path, name
    if path.suffix in {".yaml", ".yml"} or "/" in name:
        raise RequestError(f"there is no study file '{name}'")
    raise RequestError(f"there is no built-in study '{name}'.{nearest(name, builtin_names())}")


def read_study(name: str, overrides: Sequence[str] = (), *, small: bool = False) -> Study:
    """Read, override and check a study.

    Args:
        name: A built-in name or the path of a YAML file.
        overrides: `setting=value` or `setting=value,value`; also `seeds=...`, `measures=...` and `measure_every=...`.
        small: Take the study's small twin; `overrides` come after.

    Raises:
        StudyError: All that is wrong with it, a line each.
        RequestError: There is no such study, or it has no small twin.
    """
    if isinstance(overrides, str):
        raise RequestError(f"overrides: {overrides!r} should be a list: [{overrides!r}]")
    path, source = find(name)
    document = load(path, source)
    for place in (("measures",), ("small", "measures")):
        document = _with_whole_labels(document, place)
    problems: list[str] = []
    file = _parse(document, problems)
    if file is None:
        raise StudyError(problems)
    where = _Where(document, small=small)
    file = _override(file.twin() if small else file, overrides, where, problems)
    expansion = expand(file, where, problems)
    labels = _labels(file.measures, where, problems)
    if problems:
        raise StudyError(list(dict.fromkeys(problems)))
    return Study(file, tuple(expansion.models.values()), expansion.arguments, labels)


def _with_whole_labels(document: Document, place: Place) -> Document:
    """Return a study in which measures such as `lpf(data=test, sigma=0.1)`, listed at `place`, are whole.

    YAML cuts a list in brackets at every comma, those inside a label too.
    """
    data = copy.deepcopy(document.data)
    owner = data
    for part in place[:-1]:
        owner = owner.get(part) if isinstance(owner, dict) else None
    pieces = owner.get(place[-1]) if isinstance(owner, dict) else None
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        return document
    labels: list[str] = []
    lines = {at: line for at, line in document.lines.items() if at[: len(place)] != place or at == place}
    first = 0
    while first < len(pieces):
        last = _end_of_label(pieces, first)
        lines[*place, len(labels)] = document.lines[*place, first]
        labels.append(", ".join(pieces[first : last + 1]))
        first = last + 1
    owner[place[-1]] = labels
    return replace(document, data=data, lines=lines)


def _end_of_label(pieces: Sequence[str], first: int) -> int:
    """Return the number of the piece that closes the brackets of piece `first`; its own where none does."""
    depth = 0
    for number, piece in enumerate(pieces[first:], start=first):
        depth += piece.count("(") - piece.count(")")
        if depth <= 0:
            return number
    return first


@dataclass
class _Where:
    """Names the place of a field in messages: in the file, or on the command line once overridden."""

    document: Document
    small: bool = False
    overridden: set[str] = field(default_factory=set)

    def __call__(self, place: Sequence[str | int]) -> str:
        name = next((str(part) for part in reversed(place) if isinstance(part, str)), "")
        if name in self.overridden:
            return f"command line: {name}"
        of_twin = ("small", *place)
        return self.document.where(of_twin if self.small and of_twin in self.document.lines else place)


def _parse(document: Document, problems: list[str]) -> StudyFile | None:
    if not isinstance(document.data, dict):
        problems.append(f"{document.source}: a study is a mapping of fields: {', '.join(StudyFile.model_fields)}")
        return None
    data = copy.deepcopy(document.data)
    for _ in range(2):
        try:
            return StudyFile.model_validate(data)
        except ValidationError as error:
            for item in error.errors():
                place = document.known(item["loc"])
                problems.append(_pydantic_line(document, place or item["loc"], item))
                _drop(data, place)
            data.setdefault("study", "unnamed")
    return None


def _drop(data: Any, place: Sequence[str | int]) -> None:
    """Take a faulty field out, so that the rest of the study can be checked too."""
    for part in place[:-1]:
        data = data[part]
    if place:
        data.pop(place[-1], None) if isinstance(data, dict) else data.__setitem__(place[-1], {})


def _pydantic_line(document: Document, place: Sequence[str | int], item: Any) -> str:
    where = document.where(place)
    if item["type"] == "extra_forbidden":
        parts: dict[str, type[BaseModel]] = {"resources": Resources, "cases": Case, "small": Small}
        fields = parts.get(str(place[0]), StudyFile).model_fields
        return f"{where}: there is no such field.{nearest(str(place[-1]), fields)}"
    if item["type"] == "missing":
        return f"{where}: missing"
    if item["type"] == "too_short":
        return f"{where}: []: an axis needs at least one value"
    message = item["msg"].replace("Input should", "should").replace("Value error, ", "")
    return f"{where}: {item['input']!r}: {message[0].lower()}{message[1:]}"


def _override(file: StudyFile, overrides: Sequence[str], where: _Where, problems: list[str]) -> StudyFile:
    for text in overrides:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name:
            problems.append(f"command line: '{text}' should read setting=value or setting=value,value")
            continue
        try:
            values = [yaml.safe_load(part) for part in split_list(value)]
            if not values and name != "measures":
                raise ValueError("an axis needs at least one value")
            file = StudyFile.model_validate(_changed(file.model_dump(), name, values))
            where.overridden.add(name)
        except (yaml.YAMLError, ValueError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            problems.append(f"command line: {text}: {reason.replace('Input should', 'should').splitlines()[0]}")
    return file


def _changed(study: dict[str, Any], name: str, values: list[Any]) -> dict[str, Any]:
    """Return a study in which one setting has these values in every grid, or one field has them."""
    if name == "measures":
        study[name] = [value for value in values if value != "none"]
    elif name in ("seeds", "measure_every"):
        study[name] = values[0] if len(values) == 1 else values
    else:
        with_value(study, name, values)
    if name == "seed":
        study["seeds"] = 1
    return study


def _labels(measures: Sequence[str], where: Where, problems: list[str]) -> tuple[str, ...]:
    labels = []
    for index, text in enumerate(measures):
        try:
            labels.append(parse_label(text).label)
        except RequestError as error:
            problems.append(f"{where(('measures', index))}: {error}")
    return tuple(dict.fromkeys(labels))
