"""Costs of programs that earlier commands have counted, so that the next one need not load torch for them.

A file for each, in `costs/` where data sets lie. Its name tells all that a count depends on: the program, the files of
this package and of plug-ins from elsewhere, the versions of torch and torchvision, and what lies beside it. Files of
another such state are removed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import flatmin
from flatmin.annotations import source
from flatmin.files import data_root, write_atomically
from flatmin.plugins import Plugin, get, optimizer_parts
from flatmin.settings import digest


class KeptCosts:
    """The costs that are kept, as things stand now."""

    def __init__(self) -> None:
        self._folder = data_root() / "costs"
        self._state = _state(self._folder)

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
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            for program, cost in zip(programs, costs, strict=True):
                file = self._file(program)
                if file is not None and "n_params" in cost:
                    write_atomically(file, json.dumps(cost).encode())
            for file in self._folder.glob("*.json"):
                if not file.name.startswith(self._state):
                    file.unlink(missing_ok=True)

    def _file(self, program: Mapping[str, Any]) -> Path | None:
        """Return where the cost of a program is kept; None where it may change with files that nobody knows of."""
        parts = [get("network", str(program["network"])), *optimizer_parts(str(program["optimizer"]))]
        files = [source(plugin.module) for plugin in parts if _foreign(plugin)]
        if _foreign(get("dataset", str(program["dataset"]))) or None in files:
            return None
        stamps = [(str(found.file), *_stamp(found.file)) for found in files if found is not None]
        return self._folder / f"{self._state}-{digest([program, stamps])}.json"


def _foreign(plugin: Plugin) -> bool:
    return not plugin.module.startswith("flatmin.")


def _state(folder: Path) -> str:
    walk = os.walk(Path(flatmin.__file__).parent, followlinks=True)
    files = [Path(place, name) for place, _, names in walk for name in names]
    code = sorted((str(file), *_stamp(file)) for file in files if file.suffix == ".py")
    beside = sorted(folder.parent.iterdir()) if folder.parent.is_dir() else []
    data = [(str(place), *_stamp(place)) for place in beside if place != folder]
    versions = [metadata.version(name) for name in ("torch", "torchvision")]
    return digest([code, data, versions])


def _stamp(place: Path) -> tuple[int, int]:
    found = place.stat()
    return found.st_mtime_ns, found.st_size
