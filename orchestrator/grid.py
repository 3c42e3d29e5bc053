"""From a study to its models: grids multiplied out, every point checked against the signatures of its plug-ins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

from flatmin import plugins
from flatmin.errors import RequestError, nearest
from flatmin.orchestrator.document import Place, shown
from flatmin.orchestrator.study_file import StudyFile
from flatmin.point import Point, Shared
from flatmin.settings import REQUIRED, Argument, model_id
from flatmin.trial import Model

NAMES = ("dataset", "network", "optimizer")
"""The settings that name a plug-in."""

SEEDS = ("init_seed", "order_seed", "noise_seed")
"""Seeds of single streams; each is `seed` unless given."""

MOST_MODELS = 1_000_000
"""A study of more models is refused unless it is said that it is meant: a slip in an axis makes billions."""

Where = Callable[[Sequence[str | int]], str]
"""Names the place of a field for messages."""


@dataclass
class Expansion:
    """The models of a study, in grid order, and the declaration of every setting that some of them take.

    Attributes:
        models: Each once, by id.
        measures: By the same ids, what is measured of each, as written.
        arguments: The declarations, by name.
    """

    models: dict[str, Model] = field(default_factory=dict)
    measures: dict[str, tuple[str, ...]] = field(default_factory=dict)
    arguments: dict[str, Argument] = field(default_factory=dict)


@dataclass(frozen=True)
class _Grid:
    """One grid of a study, what is measured of its models, and where each of its fields stands."""

    settings: Mapping[str, Any]
    axes: Mapping[str, Sequence[Any]]
    measures: Sequence[str]
    places: Mapping[str, Place]

    @property
    def size(self) -> int:
        """The number of points, known before they are made."""
        return prod(len(values) for values in self.axes.values())

    def points(self) -> Iterator[dict[str, Any]]:
        for values in product(*self.axes.values()):
            yield {**self.settings, **dict(zip(self.axes, values, strict=True))}


def _grids(file: StudyFile) -> Iterator[_Grid]:
    seeds: Sequence[int] = range(file.seeds) if isinstance(file.seeds, int) else file.seeds
    cases = [((), file)] if not file.cases else [(("cases", index), case) for index, case in enumerate(file.cases)]
    for prefix, case in cases:
        settings, places = dict(file.settings), {}
        axes: dict[str, Sequence[Any]] = dict(file.axes)
        own = case.measures
        for owner, grid in (((), file), (prefix, case)):
            for name, value in grid.settings.items():
                axes.pop(name, None) if owner else None
                settings[name], places[name] = value, (*owner, "settings", name)
            for name, values in grid.axes.items():
                settings.pop(name, None) if owner else None
                axes[name], places[name] = values, (*owner, "axes", name)
        if "seed" not in axes and "seed" not in settings:
            axes["seed"] = seeds
            places["seed"] = ("seeds",)
        yield _Grid(settings, axes, file.measures if own is None else own, places)


def _contradictions(file: StudyFile, where: Where) -> Iterator[str]:
    """Yield what is said twice in one place, and what a case says against an axis that all cases have.

    A case may narrow such an axis, to one of its values or to some; a value outside of it is a slip.
    """
    for prefix, grid in ((), file), *((("cases", index), case) for index, case in enumerate(file.cases)):
        for name in sorted(set(grid.settings) & set(grid.axes)):
            yield f"{where((*prefix, 'axes', name))}: is both a setting and an axis here; leave one of them out"
    for index, case in enumerate(file.cases):
        for part, given in ("settings", {name: [value] for name, value in case.settings.items()}), ("axes", case.axes):
            for name, values in given.items():
                outside = [value for value in values if value not in file.axes.get(name, values)]
                if outside:
                    yield (
                        f"{where(('cases', index, part, name))}: {shown(outside[0])} is not on the axis that all cases "
                        f"have, {name}: {shown(file.axes[name])}; add it there, or move the axis into the cases"
                    )
    own = "settings" if "seed" in file.settings else "axes"
    if "seed" in {*file.settings, *file.axes} and file.seeds not in (1, [0]):
        yield f"{where((own, 'seed'))}: there is also seeds: {shown(file.seeds)}; leave one of them out"


def _too_many(grids: Sequence[_Grid], where: Where, at_most: int | None) -> Iterator[str]:
    """Yield what there is to say of a study with more than `at_most` models, before they are multiplied out."""
    models = sum(grid.size for grid in grids)
    if at_most is not None and models > at_most:
        largest = max(grids, key=lambda grid: grid.size)
        product_of = " x ".join(f"{len(values):,} {name}" for name, values in largest.axes.items() if len(values) > 1)
        longest = largest.places[max(largest.axes, key=lambda name: len(largest.axes[name]))]
        which = ", most in the case of " if len(grids) > 1 else ": "
        yield (
            f"{where(longest)}: {models:,} models{which}{product_of}; more than {at_most:,} are taken for a slip. "
            "If you mean it: --yes, or at_most=None in Python"
        )


def expand(file: StudyFile, where: Where, problems: list[str], at_most: int | None = MOST_MODELS) -> Expansion:
    """Multiply a study out.

    Args:
        file: The study, overrides applied.
        where: Names the places of its fields.
        problems: What is wrong with it is added here, a line each.
        at_most: More models are refused, before the first is made; None: any number.
    """
    expansion = Expansion()
    problems.extend(_contradictions(file, where))
    grids = list(_grids(file))
    too_many = list(_too_many(grids, where, at_most))
    if too_many:
        problems.extend(too_many)
        return expansion
    everywhere = _known(grids)
    alike: dict[tuple[str, ...], tuple[str, ...]] = {}  # one list of measures for the thousands of models that share it
    for grid in grids:
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
                asked = tuple(dict.fromkeys((*expansion.measures.get(identity, ()), *grid.measures)))
                expansion.measures[identity] = alike.setdefault(asked, asked)
        for checker in checkers.values():
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
                problems.append(f"{where(grid.places[name])}: {shown(value)}: {error}")
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

    @cached_property
    def _axes(self) -> list[str]:
        return [name for name in self.grid.axes if name in NAMES or name in self.arguments]

    @cached_property
    def _shared(self) -> Shared | None:
        """What is the same at every point; None where some of it is wrong."""
        given = self.grid.settings
        fixed: dict[str, Any] = {name: str(given[name]) for name in NAMES if name in given}
        for name, argument in self.arguments.items():
            if name in given:
                fixed[name] = self._canonical(name, argument, given[name])
            elif name not in self._axes:
                fixed[name] = argument.default
                if argument.default is REQUIRED:
                    self.problems.append(f"{self.where(('settings',))}: missing '{name}' ({argument.type_name})")
        own = [*self._axes]
        for name in SEEDS:
            if name not in own and fixed.get(name) is None:
                if "seed" in own:
                    own.append(name)
                fixed[name] = fixed.get("seed")
        wrong = any(value is REQUIRED for value in fixed.values())
        return None if wrong else Shared({name: fixed[name] for name in fixed if name not in own}, own)

    def resolve(self, point: Mapping[str, Any]) -> Point | None:
        """Return the settings of a point; None where some of them are wrong."""
        own = {
            name: str(point[name]) if name in NAMES else self._canonical(name, self.arguments[name], point[name])
            for name in self._axes
        }
        shared = self._shared
        if shared is None or any(value is REQUIRED for value in own.values()):
            return None
        seed = own.get("seed", shared.fixed.get("seed"))
        own |= {name: seed for name in SEEDS if name in shared.varying and own.get(name) is None}
        return Point(shared, tuple(own[name] for name in shared.varying))

    def _canonical(self, name: str, argument: Argument, value: Any) -> Any:
        key = (name, repr(value))
        if key not in self.seen:
            try:
                self.seen[key] = argument.canonical(value)
            except ValueError as error:
                self.seen[key] = REQUIRED
                several = isinstance(value, list) and not argument.type_name.startswith("list")
                hint = f"; a list of values is an axis: axes: {{{name}: {shown(value)}}}" if several else ""
                self.problems.append(
                    f"{self.where(self.grid.places[name])}: {shown(value)}: {error} ({argument.type_name}){hint}"
                )
        return self.seen[key]
