"""Stand-ins: small generated files in a data set's own format, which its own loading code reads in place of it.

A data set has one where its module has a function `write_stand_in(root)` beside the entry function. It puts files below
a folder as the data set lies below the data root; one that writes nothing says that the data set needs no files.

They are in `<data root>/stand-in/<data set>/`, written once on a machine, behind a lock of the system and whole or not
at all, by whoever may download. Others, as a plan, write them to a temporary folder of their process.
"""

from __future__ import annotations

import atexit
import importlib
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from flatmin.annotations import source
from flatmin.errors import DataError, RequestError
from flatmin.plugins import Plugin, listing
from flatmin.trainables.downloads import downloads_are_allowed, md5_of

_WRITER = "write_stand_in"

_VERSION = 1
"""To be raised whenever what is written changes; what an older version wrote is written anew."""

_LIST = "stand-in.json"
"""The version, and the md5 of each file."""


def stand_in_root(plugin: Plugin, root: Path) -> Path:
    """Return the folder in which a data set's stand-in lies, as the data set itself in the data root.

    Args:
        plugin: The data set.
        root: Where data sets lie.

    Raises:
        RequestError: The data set has none.
        DataError: It cannot be written there.
    """
    if not _has_one(plugin):
        names = [other.name for other in listing("dataset").values() if _has_one(other)]
        raise RequestError(
            f"stand_in = true: the data set '{plugin.name}' has no stand-in: {plugin.module} has no function "
            f"{_WRITER}(root). There are some of: {', '.join(names)}"
        )
    folder = root / "stand-in" / plugin.name
    if _whole(folder):
        return folder
    if not downloads_are_allowed():
        return _temporary(plugin.name, plugin.module)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{plugin.name}.lock")):
            if not _whole(folder):
                _write(folder, plugin.module)
    except OSError as error:
        raise DataError(
            f"the stand-in of {plugin.name} cannot be put at {folder}: {error}", "make room, or change FLATMIN_DATA"
        ) from None
    return folder


def stand_in_checksums(root: Path) -> dict[str, str]:
    """Return the md5 of each file, by its path from the root, where that holds a stand-in; else nothing."""
    checksums: dict[str, str] = _listed(root).get("md5", {})
    return checksums


def _has_one(plugin: Plugin) -> bool:
    module = source(plugin.module)
    return module is not None and module.function(_WRITER) is not None


def _listed(folder: Path) -> dict[str, Any]:
    try:
        listed: dict[str, Any] = json.loads((folder / _LIST).read_text("utf-8"))
        return listed
    except (FileNotFoundError, NotADirectoryError, ValueError):  # not written yet, or cut off by a crash
        return {}


def _whole(folder: Path) -> bool:
    """Whether a stand-in of this version is in a folder, with all its files."""
    listed = _listed(folder)
    return listed.get("version") == _VERSION and all((folder / file).exists() for file in listed["md5"])


def _write(folder: Path, module: str) -> None:
    part = folder.with_name(f".{folder.name}.part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    write: Callable[[Path], None] = getattr(importlib.import_module(module), _WRITER)
    write(part)
    files = sorted(file for file in part.rglob("*") if file.is_file())
    checksums = {file.relative_to(part).as_posix(): md5_of(file) for file in files}
    (part / _LIST).write_text(json.dumps({"version": _VERSION, "md5": checksums}, indent=1), "utf-8")
    part.replace(folder)


@cache
def _temporary(name: str, module: str) -> Path:
    """Return a folder with a data set's stand-in that goes when the process ends."""
    place = Path(tempfile.mkdtemp(prefix="flatmin-stand-in-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    _write(place / name, module)
    return place / name
