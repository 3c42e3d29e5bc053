"""Studies: a YAML file, checked against the signatures of the plug-ins it names."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flatmin.errors import RequestError, RequestWarning, StudyError, nearest
from flatmin.labels import parse_label, split_list
from flatmin.orchestrator.document import Document, Place, load, parse
from flatmin.orchestrator.grid import MOST_MODELS, NAMES, Where, expand
from flatmin.orchestrator.selection import selected
from flatmin.orchestrator.study_file import StudyFile, with_measures, with_seeds, with_value
from flatmin.orchestrator.study_problems import study_file
from flatmin.settings import Argument
from flatmin.trial import Model

_FOLDER = resources.files("flatmin.orchestrator.studies")
_OUT_OF_SCOPE = "_out_of_scope.yaml"
"""Published experiments that are no studies here, and why."""


@dataclass(frozen=True)
class Study:
    """A checked study.

    Attributes:
        file: The study as written, overrides applied.
        models: Every model of the grid, each once, in grid order.
        arguments: The declaration of every setting that some model takes.
        measures_of: By model id, the canonical labels of what is measured of it.
    """

    file: StudyFile
    models: tuple[Model, ...]
    arguments: Mapping[str, Argument]
    measures_of: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """The study's name."""
        return self.file.study

    @property
    def measures(self) -> tuple[str, ...]:
        """The canonical labels of all that is measured, of whichever models."""
        return tuple(dict.fromkeys(label for labels in self.measures_of.values() for label in labels))

    def to_yaml(self) -> str:
        """Return the resolved study as YAML."""
        return yaml.safe_dump(self.file.model_dump(mode="json", exclude_none=True), sort_keys=False)


def builtin_names() -> list[str]:
    """Return the names of the built-in studies."""
    files = sorted(entry.name for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))
    return [name.removesuffix(".yaml") for name in files if name != _OUT_OF_SCOPE]


def builtin_studies(*, out_of_scope: bool = False) -> list[dict[str, Any]]:
    """Return name, number of models, source and purpose of every built-in study.

    Args:
        out_of_scope: Also those published experiments that are not here: their `models` are None, and `about` says why.
    """
    studies = [
        {"name": name, "models": len(study.models), "source": study.file.source, "about": study.file.about}
        for name, study in ((name, read_study(name)) for name in builtin_names())
    ]
    others = yaml.safe_load((_FOLDER / _OUT_OF_SCOPE).read_text(encoding="utf-8")) if out_of_scope else []
    return [*studies, *({**other, "models": None} for other in others)]


def find(name: str) -> tuple[Path, str]:
    """Return the path of a study and how messages name it.

    Raises:
        RequestError: Neither a built-in study nor a file.
    """
    if name in builtin_names():
        return Path(str(_FOLDER / f"{name}.yaml")), f"{name}.yaml"
    path = Path(os.path.expanduser(name))  # a shell does not, of what is quoted; `ray job submit` quotes
    try:
        if path.is_file():
            return path, name
        if path.is_dir():
            raise RequestError(f"'{name}' is a folder; a study is a YAML file")
    except OSError as error:
        raise RequestError(f"there is no study '{name}': {error.strerror}") from None
    if path.suffix in {".yaml", ".yml"} or "/" in name:
        raise RequestError(f"there is no study file '{name}'")
    raise RequestError(f"there is no built-in study '{name}'.{nearest(name, builtin_names())}")


def read_study(
    name: str,
    overrides: Sequence[str] = (),
    *,
    small: bool = False,
    only: Sequence[str] = (),
    at_most: int | None = MOST_MODELS,
) -> Study:
    """Read, override and check a study.

    Args:
        name: A built-in name or the path of a YAML file.
        overrides: `setting=value` or `setting=value,value`; also `seeds=...`, `measures=...` and `measure_every=...`.
        small: Take the study's small twin; `overrides` come after.
        only: Conditions on settings, `setting=value` or `setting=value,value`: the models that meet them all.
        at_most: More models are refused, as a slip in an axis; None: any number.

    Raises:
        StudyError: All that is wrong with it, a line each.
        RequestError: There is no such study, it has no small twin, or no model that meets the conditions.
    """
    if isinstance(overrides, str):
        raise RequestError(f"overrides: {overrides!r} should be a list: [{overrides!r}]")
    path, source = find(name)
    document = load(path, source)
    for place in _places_of_measures(document.data):
        document = _with_whole_labels(document, place)
    problems: list[str] = []
    file = study_file(document, problems)
    if file is None or (small and problems and file.small is None):
        raise StudyError(list(dict.fromkeys(problems)))
    where = _Where(document, small=small)
    file = file.twin() if small else file
    if not only:
        _warn_of_mixed_recipes(file, overrides)
    file = _override(file, overrides, where, problems)
    expansion = expand(file, where, problems, at_most)
    labels = _labels(file, where, problems)
    if file.small is not None:
        _check_twin(study_file(document, []), document, problems, at_most)
    if problems:
        raise StudyError(list(dict.fromkeys(problems)))
    models = selected(expansion.models, expansion.arguments, only)
    canonical = {
        asked: tuple(dict.fromkeys(labels[text] for text in asked)) for asked in set(expansion.measures.values())
    }
    measures_of = {identity: canonical[expansion.measures[identity]] for identity in models}
    return Study(file, tuple(models.values()), expansion.arguments, measures_of)


def _check_twin(file: StudyFile | None, document: Document, problems: list[str], at_most: int | None) -> None:
    """Add what is wrong with a study's small twin: it is found when the study is read, not when the twin is wanted."""
    if file is None or file.small is None:
        return
    twin, where = file.twin(), _Where(document, small=True)
    expand(twin, where, problems, at_most)
    _labels(twin, where, problems)


def _places_of_measures(data: Any) -> Iterator[Place]:
    """Yield where a study as written has lists of measures: itself, its twin, and the cases of both."""
    if not isinstance(data, dict):
        return
    for prefix, owner in ((), data), (("small",), data.get("small")):
        cases = owner.get("cases") if isinstance(owner, dict) else None
        own = [(("cases", number), case) for number, case in enumerate(cases if isinstance(cases, list) else [])]
        for place, grid in [((), owner), *own]:
            if isinstance(grid, dict) and "measures" in grid:
                yield (*prefix, *place, "measures")


def _with_whole_labels(document: Document, place: Place) -> Document:
    """Return a study in which measures such as `lpf(data=test, sigma=0.1)`, listed at `place`, are whole.

    YAML cuts a list in brackets at every comma, those inside a label too.
    """
    data = copy.deepcopy(document.data)
    owner = data
    for part in place[:-1]:
        owner = owner[part]
    pieces = owner[place[-1]]
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        return document
    labels: list[str] = []
    lines = {at: line for at, line in document.lines.items() if at[: len(place)] != place or at == place}
    first = 0
    while first < len(pieces):
        last = _end_of_label(pieces, first)
        lines[*place, len(labels)] = document.lines[document.known((*place, first))]
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


def _warn_of_mixed_recipes(file: StudyFile, overrides: Sequence[str]) -> None:
    """Warn where one data set, network or optimizer is asked of cases that are recipes for several."""
    for name in (text.partition("=")[0].strip() for text in overrides):
        if name not in NAMES:
            continue
        own = {str(case.settings.get(name) or case.axes.get(name)) for case in file.cases}
        if len(own - {"None"}) > 1:
            warnings.warn(
                f"command line: {name}: the cases of this study are recipes for different ones, and all of them get "
                f"this one; to run a part of the study as it is, say --only {name}=...",
                RequestWarning,
                stacklevel=3,
            )


def _override(file: StudyFile, overrides: Sequence[str], where: _Where, problems: list[str]) -> StudyFile:
    for text in overrides:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name:
            problems.append(f"command line: '{text}' should read setting=value or setting=value,value")
            continue
        try:
            values = [_value(part) for part in split_list(value)]
            if not values and name != "measures":
                raise ValueError("an axis needs at least one value")
            file = StudyFile.model_validate(_changed(file.model_dump(), name, values))
            where.overridden.add(name)
        except ValueError as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            problems.append(f"command line: {text}: {reason.replace('Input should', 'should').splitlines()[0]}")
    return file


def _value(text: str) -> Any:
    """Return a value as the YAML of a study would have it."""
    try:
        return parse(text, "").data
    except StudyError as error:
        raise ValueError(error.problems[0].partition(": ")[2]) from None


def _changed(study: dict[str, Any], name: str, values: list[Any]) -> dict[str, Any]:
    """Return a study in which one setting has these values in every grid, or one field has them."""
    if name == "measures":
        with_measures(study, [value for value in values if value != "none"])
    elif name == "seeds":
        with_seeds(study, values[0] if len(values) == 1 else values)
    elif name == "measure_every":
        study[name] = values[0] if len(values) == 1 else values
    else:
        with_value(study, name, values)
    return study


def _labels(file: StudyFile, where: Where, problems: list[str]) -> dict[str, str]:
    """Return the canonical label of every measure as written."""
    labels = {}
    cases = [(("cases", number, "measures"), case.measures or []) for number, case in enumerate(file.cases)]
    for place, measures in [(("measures",), file.measures), *cases]:
        for index, text in enumerate(measures):
            try:
                labels[text] = parse_label(text).label
            except RequestError as error:
                problems.append(f"{where((*place, index))}: {error}")
    return labels
