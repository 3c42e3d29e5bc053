"""From a study to its models: grids multiplied out, every point checked against the signatures of its plug-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from flatmin import plugins
from flatmin.errors import RequestError, nearest
from flatmin.orchestrator.document import Place
from flatmin.orchestrator.study_file import StudyFile
from flatmin.settings import REQUIRED, Argument, model_id
from flatmin.trial import Model

NAMES = ("dataset", "network", "optimizer")
"""The settings that name a plug-in."""

SEEDS = ("init_seed", "order_seed", "noise_seed")
"""Seeds of single streams; each is `seed` unless given."""

Where = Callable[[Sequence[str | int]], str]
"""Names the place of a field for messages."""


@dataclass
class Expansion:
    """The models of a study by id, in grid order, and the declaration of every setting that some of them take."""

    models: dict[str, Model] = field(default_factory=dict)
    arguments: dict[str, Argument] = field(default_factory=dict)


@dataclass(frozen=True)
class _Grid:
    """One grid of a study, and where each of its fields stands."""

    settings: Mapping[str, Any]
    axes: Mapping[str, Sequence[Any]]
    places: Mapping[str, Place]

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


def expand(file: StudyFile, where: Where, problems: list[str]) -> Expansion:
    """Multiply a study out.

    Args:
        file: The study, overrides applied.
        where: Names the places of its fields.
        problems: What is wrong with it is added here, a line each.
    """
    expansion = Expansion()
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


def _programs(grid: _Grid, where: Where, problems: list[str]) -> dict[tuple[Any, ...], dict[str, Argument]]:
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
    where: Where
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
