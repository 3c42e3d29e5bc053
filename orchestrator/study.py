"""Studies: a YAML file, checked against the signatures of the plug-ins it names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from flatmin import plugins
from flatmin.errors import RequestError, StudyError, nearest
from flatmin.labels import parse_label, split_list
from flatmin.orchestrator.document import Document, load
from flatmin.settings import REQUIRED, Argument, model_id
from flatmin.trial import Model

NAMES = ("dataset", "network", "optimizer")
"""The settings that name a plug-in."""

SEEDS = ("init_seed", "order_seed", "noise_seed")
"""Seeds of single streams; each is `seed` unless given."""


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a whole number or a list of them")
    return value


Seeds = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)],
    BeforeValidator(_no_bool),
]


class Resources(BaseModel):
    """What one trial is given while it runs; none of it is part of a model's identity."""

    model_config = ConfigDict(extra="forbid")

    cpus_per_trial: float = Field(default=1, gt=0)
    gpus_per_trial: float | Literal["auto"] = Field(default="auto")
    models_per_trial: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"


class Case(BaseModel):
    """One grid of a study: its settings and axes, over those of the whole study."""

    model_config = ConfigDict(extra="forbid")

    settings: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)


class StudyFile(Case):
    """A study as it is written."""

    study: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    about: str = ""
    source: str = ""
    seeds: Seeds = 1
    measures: list[str] = Field(default_factory=list)
    cases: list[Case] = Field(default_factory=list)
    resources: Resources = Field(default_factory=Resources)


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
        return yaml.safe_dump(self.file.model_dump(mode="json"), sort_keys=False)


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


def read_study(name: str, overrides: Sequence[str] = ()) -> Study:
    """Read, override and check a study.

    Args:
        name: A built-in name or the path of a YAML file.
        overrides: `setting=value` or `setting=value,value`; also `seeds=...` and `measures=...`.

    Raises:
        StudyError: All that is wrong with it, a line each.
        RequestError: There is no such study.
    """
    if isinstance(overrides, str):
        raise RequestError(f"overrides: {overrides!r} should be a list: [{overrides!r}]")
    path, source = find(name)
    document = _with_whole_labels(load(path, source))
    problems: list[str] = []
    file = _parse(document, problems)
    if file is None:
        raise StudyError(problems)
    where = _Where(document)
    file = _override(file, overrides, where, problems)
    expansion = _expand(file, where, problems)
    labels = _labels(file.measures, where, problems)
    if problems:
        raise StudyError(list(dict.fromkeys(problems)))
    return Study(file, tuple(expansion.models.values()), expansion.arguments, labels)


def _with_whole_labels(document: Document) -> Document:
    """Return a study in which measures such as `lpf(data=test, sigma=0.1)` are whole.

    YAML cuts a list in brackets at every comma, those inside a label too.
    """
    pieces = document.data.get("measures") if isinstance(document.data, dict) else None
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        return document
    labels: list[str] = []
    lines = {place: line for place, line in document.lines.items() if place[:1] != ("measures",) or len(place) < 2}
    first = 0
    while first < len(pieces):
        last = _end_of_label(pieces, first)
        lines["measures", len(labels)] = document.lines["measures", first]
        labels.append(", ".join(pieces[first : last + 1]))
        first = last + 1
    return replace(document, data={**document.data, "measures": labels}, lines=lines)


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
    overridden: set[str] = field(default_factory=set)

    def __call__(self, place: Sequence[str | int]) -> str:
        name = next((str(part) for part in reversed(place) if isinstance(part, str)), "")
        return f"command line: {name}" if name in self.overridden else self.document.where(place)


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
        parts: dict[str, type[BaseModel]] = {"resources": Resources, "cases": Case}
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
    """Return a study in which one setting has these values in every grid."""
    if name == "measures":
        study[name] = [value for value in values if value != "none"]
        return study
    one = values[0] if len(values) == 1 else values
    if name == "seeds":
        study[name] = one
        return study
    for grid in (study, *study["cases"]):
        grid["settings"].pop(name, None)
        grid["axes"].pop(name, None)
    study["settings" if len(values) == 1 else "axes"][name] = one
    if name == "seed":
        study["seeds"] = 1
    return study


def _labels(measures: Sequence[str], where: _Where, problems: list[str]) -> tuple[str, ...]:
    labels = []
    for index, text in enumerate(measures):
        try:
            labels.append(parse_label(text).label)
        except RequestError as error:
            problems.append(f"{where(('measures', index))}: {error}")
    return tuple(dict.fromkeys(labels))


@dataclass
class _Expansion:
    models: dict[str, Model] = field(default_factory=dict)
    arguments: dict[str, Argument] = field(default_factory=dict)


@dataclass(frozen=True)
class _Grid:
    """One grid of a study, and where each of its fields stands."""

    settings: Mapping[str, Any]
    axes: Mapping[str, Sequence[Any]]
    places: Mapping[str, tuple[str | int, ...]]

    def points(self) -> Iterator[dict[str, Any]]:
        for values in product(*self.axes.values()):
            yield {**self.settings, **dict(zip(self.axes, values, strict=True))}


def _grids(file: StudyFile) -> Iterator[_Grid]:
    seeds = list(range(file.seeds)) if isinstance(file.seeds, int) else file.seeds
    cases = [((), file)] if not file.cases else [(("cases", index), case) for index, case in enumerate(file.cases)]
    for prefix, case in cases:
        settings, axes, places = dict(file.settings), dict(file.axes), {}
        for owner, grid in (((), file), (prefix, case)):
            for name, value in grid.settings.items():
                axes.pop(name, None) if owner else None
                settings[name], places[name] = value, (*owner, "settings", name)
            for name, values in grid.axes.items():
                settings.pop(name, None) if owner else None
                axes[name], places[name] = values, (*owner, "axes", name)
        if "seed" not in axes and ("seed" not in settings or len(seeds) > 1):
            settings.pop("seed", None)
            axes["seed"] = seeds
            places["seed"] = ("seeds",)
        yield _Grid(settings, axes, places)


def _expand(file: StudyFile, where: _Where, problems: list[str]) -> _Expansion:
    expansion = _Expansion()
    grids = list(_grids(file))
    everywhere = _known(grids)
    for grid in grids:
        both = sorted(set(grid.settings) & set(grid.axes))
        problems.extend(f"{where(grid.places[name])}: is both a setting and an axis" for name in both)
        before = len(problems)
        checkers = {
            key: _Checker(arguments, grid, where, problems)
            for key, arguments in _programs(grid, where, problems).items()
        }
        complete = len(problems) == before
        own = set(NAMES).union(*(checker.arguments for checker in checkers.values()))
        for name in (*grid.settings, *grid.axes):
            # What stands above all cases, or on the command line, may concern some of them alone.
            known = own if grid.places[name][0] == "cases" else everywhere
            hint = nearest(name, known)
            if name not in known and (complete or "Did you mean" in hint):
                problems.append(f"{where(grid.places[name])}: no plug-in of this study takes it.{hint}")
        for point in grid.points():
            checker = checkers.get(tuple(str(point[name]) for name in NAMES if name in point))
            settings = checker.resolve(point) if checker else None
            if checker and settings:
                identity = model_id(settings, checker.arguments)
                expansion.models.setdefault(identity, Model(identity, settings))
                expansion.arguments.update(checker.arguments)
    return expansion


def _known(grids: Sequence[_Grid]) -> set[str]:
    """Return every setting that some program of some grid takes; names that do not exist count for nothing."""
    known = set(NAMES)
    for grid in grids:
        known.update(*_programs(grid, lambda place: "", []).values())
    return known


def _programs(
    grid: _Grid, where: Callable[[Sequence[str | int]], str], problems: list[str]
) -> dict[tuple[Any, ...], dict[str, Argument]]:
    """Return the arguments of every combination of plug-ins that the grid names.

    A name that does not exist is reported, and the rest of its combination is still checked.
    """
    choices: list[list[Any]] = []
    valid: set[Any] = set()
    for name in NAMES:
        values = list(grid.axes.get(name, [grid.settings[name]] if name in grid.settings else []))
        if not values:
            problems.append(f"{where(('settings',))}: missing '{name}'; there are: {', '.join(plugins.listing(name))}")
            continue
        for value in values:
            try:
                if not isinstance(value, str):
                    raise RequestError(f"should be one name; a list of them is an axis: axes: {{{name}: [...]}}")
                plugins.program_arguments({name: value})
                valid.add((name, value))
            except RequestError as error:
                problems.append(f"{where(grid.places[name])}: {value!r}: {error}")
        values = [value for value in values if isinstance(value, str)]
        choices.append([(name, value) for value in values])
    return {
        tuple(value for _, value in choice): plugins.program_arguments(
            {name: str(value) for name, value in choice if (name, value) in valid}
        )
        for choice in product(*choices)
    }


@dataclass
class _Checker:
    """Fills in and checks the settings of the points of one grid that share their plug-ins."""

    arguments: Mapping[str, Argument]
    grid: _Grid
    where: _Where
    problems: list[str]
    seen: dict[tuple[str, str], Any] = field(default_factory=dict)

    def resolve(self, point: Mapping[str, Any]) -> dict[str, Any] | None:
        settings: dict[str, Any] = {name: str(point[name]) for name in NAMES if name in point}
        failed = False
        for name, argument in self.arguments.items():
            if name in point:
                value = self._canonical(name, argument, point[name])
                failed = failed or value is REQUIRED
                settings[name] = value
            elif argument.default is REQUIRED:
                self.problems.append(f"{self.where(('settings',))}: missing '{name}' ({argument.type_name})")
                failed = True
            else:
                settings[name] = argument.default
        for name in SEEDS:
            if settings.get(name) is None:
                settings[name] = settings.get("seed")
        return None if failed else dict(sorted(settings.items()))

    def _canonical(self, name: str, argument: Argument, value: Any) -> Any:
        key = (name, repr(value))
        if key not in self.seen:
            try:
                self.seen[key] = argument.canonical(value)
            except ValueError as error:
                self.seen[key] = REQUIRED
                self.problems.append(f"{self.where(self.grid.places[name])}: {value!r}: {error} ({argument.type_name})")
        return self.seen[key]
