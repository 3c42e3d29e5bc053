"""Files of results: where a path or a URI leads, and writing that is whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from flatmin.bucket import BucketPath, Place
from flatmin.errors import ResultsError


def place(path: str | Place) -> Place:
    """Return where a path or a URI leads.

    Raises:
        ResultsError: It is a URI of a kind that this version cannot use.
    """
    if isinstance(path, BucketPath):
        return path
    if "://" in str(path):
        return BucketPath.parse(str(path))
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise ResultsError(f"'{path}': {error}") from None


def write_atomically(file: Place, content: bytes | Callable[[Path], None]) -> None:
    """Write a file whole or not at all: in a file system under a temporary name, flushed to the disk, and renamed."""
    if isinstance(file, BucketPath):
        _put(file, content)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _put(file: BucketPath, content: bytes | Callable[[Path], None]) -> None:
    if not callable(content):
        file.write_bytes(content)
        return
    with tempfile.TemporaryDirectory(prefix="flatmin-") as folder:
        written = Path(folder) / file.name
        content(written)
        file.write_bytes(written)
