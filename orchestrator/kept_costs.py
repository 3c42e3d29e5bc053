"""Costs of programs that earlier commands have counted, so that the next one need not load torch for them.

A file for each, in `costs/` where data sets lie. Its name tells what a count depends on: the program, the files of this
package and of plug-ins from elsewhere, the versions of torch and torchvision, and the data sets that are there.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import flatmin
from flatmin.files import data_root, write_atomically
from flatmin.labels import parse_label
from flatmin.plugins import Plugin, get, optimizer_parts
from flatmin.settings import digest

_DAYS = 30
"""For so long what nobody asked for again is kept."""

_DEEP = 3
"""Folders of a data set that are looked into, one within the other."""


class KeptCosts:
    """The costs that are kept, as things stand now."""

    def __init__(self) -> None:
        self._folder, self._state = Path(), ""
        with contextlib.suppress(OSError, RuntimeError, metadata.PackageNotFoundError):  # then all is counted
            self._folder = data_root() / "costs"
            versions = [metadata.version(name) for name in ("torch", "torchvision")]
            here = _stamps(Path(flatmin.__file__).parent, ".py")
            self._state = digest([versions, here, _data_sets(self._folder)])

    def read(self, program: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the cost of a program, or None where it has to be counted."""
        file = self._file(program)
        try:
            found = None if file is None else json.loads(file.read_bytes())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write(self, programs: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]]) -> None:
        """Keep what was counted, where the disk can be written; never why something could not be."""
        files = [
            self._file(program) if "n_params" in cost else None for program, cost in zip(programs, costs, strict=True)
        ]
        with contextlib.suppress(OSError):
            for file, cost in zip(files, costs, strict=True):
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(file, json.dumps(cost).encode())
            for file in self._folder.glob("*-*.json") if self._state else ():
                if file.stat().st_mtime < time.time() - _DAYS * 86400:
                    file.unlink(missing_ok=True)

    def _file(self, program: Mapping[str, Any]) -> Path | None:
        """Return where the cost of a program is kept; None where it may change with files that nobody knows of."""
        dataset = get("dataset", str(program["dataset"]))
        if not self._state or _foreign(dataset):
            return None
        measures = [get("measure", parse_label(text).measure) for text in program.get("measures", ())]
        parts = [get("network", str(program["network"])), *optimizer_parts(str(program["optimizer"])), *measures]
        foreign = sorted({plugin.module.partition(".")[0] for plugin in parts if _foreign(plugin)})
        stamps = [stamp for name in foreign for place in _places(name) for stamp in _stamps(place, ".py")]
        return self._folder / f"{self._state}-{digest([program, stamps])}.json"


def _foreign(plugin: Plugin) -> bool:
    return not plugin.module.startswith("flatmin.")


def _places(package: str) -> Iterator[Path]:
    """Return the file of a module, or the folders of a package, without importing it."""
    spec = util.find_spec(package)
    if spec is not None:
        yield from map(Path, spec.submodule_search_locations or filter(None, [spec.origin]))


def _stamps(place: Path, ending: str, deep: int | None = None) -> list[tuple[str, int, int]]:
    """Return path, time and size of the files of a folder, or of a file itself; nothing is followed out of it.

    Args:
        place: The folder or file.
        ending: How the names of files end that count.
        deep: How many folders are looked into, one within the other; all when None.
    """
    if not place.is_dir():
        return [_stamp(place)]
    found = []
    for folder, folders, files in os.walk(place, followlinks=deep is None):
        if deep is not None and len(Path(folder).relative_to(place).parts) >= deep - 1:
            found += [_stamp(Path(folder, name)) for name in folders]
            folders.clear()
        found += [_stamp(Path(folder, name)) for name in files if name.endswith(ending)]
    return sorted(found)


def _data_sets(costs: Path) -> list[tuple[str, int, int]]:
    root = costs.parent
    places = [place for place in sorted(root.iterdir()) if place != costs] if root.is_dir() else []
    return [stamp for place in places for stamp in [_stamp(place), *_stamps(place, "", _DEEP)]]


def _stamp(place: Path) -> tuple[str, int, int]:
    try:
        found = place.stat()
    except OSError:  # a link that leads nowhere, a file that has just gone
        return str(place), 0, 0
    return str(place), found.st_mtime_ns, found.st_size
