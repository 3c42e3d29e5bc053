"""A point of a grid: the settings of one model, of which it holds only those that differ between the grid's models.

A study of 100,000 models with 50 settings each would be five million entries of dictionaries; nearly all of them are
the same in every model.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shared:
    """What the points of a grid have in common.

    Attributes:
        fixed: The settings that are the same at every point.
        varying: The names of the others, in the order in which a point gives their values.
        names: All names, in alphabetical order, with their values where these are fixed.
        places: Where a point has the values of the others.
    """

    fixed: Mapping[str, Any]
    varying: Sequence[str]
    names: Mapping[str, Any] = field(init=False)
    places: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        """Sort the names: settings are in alphabetical order everywhere."""
        object.__setattr__(self, "names", dict.fromkeys(sorted({*self.fixed, *self.varying})) | dict(self.fixed))
        object.__setattr__(self, "places", {name: number for number, name in enumerate(self.varying)})


class Point(Mapping[str, Any]):
    """Settings by name, in alphabetical order.

    >>> dict(Point(Shared({"width": 2, "dataset": "digits"}, ["lr"]), (0.1,)))
    {'dataset': 'digits', 'lr': 0.1, 'width': 2}
    """

    __slots__ = ("_own", "_shared")

    def __init__(self, shared: Shared, own: tuple[Any, ...]) -> None:
        self._shared, self._own = shared, own

    def __getitem__(self, name: str) -> Any:
        place = self._shared.places.get(name)
        return self._shared.names[name] if place is None else self._own[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shared.names)

    def __len__(self) -> int:
        return len(self._shared.names)

    def items(self) -> ItemsView[str, Any]:
        """Return names and values; made at once, which is many times as fast as one by one."""
        return {**self._shared.names, **dict(zip(self._shared.varying, self._own, strict=True))}.items()

    def __repr__(self) -> str:
        return repr(dict(self))
