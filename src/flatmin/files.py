"""Files: where data sets lie, where a path or a URI of results leads, and writing that is whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flatmin.bucket import PATIENCE, BucketPath, Place
from flatmin.errors import ResultsError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
"""What a file system without locks says, such as Lustre mounted with `noflock`."""

_RETRY_SECONDS = 1.0
_LEAST_FREE = 1 << 20


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


def data_root() -> Path:
    """Return where data sets lie: `FLATMIN_DATA`, or a folder of the user's cache."""
    return Path(os.environ.get("FLATMIN_DATA") or Path.home() / ".cache" / "flatmin").expanduser()


def plain_name(name: str) -> str:
    """Return a name, which may come from somebody else's table, if it leads to no other folder.

    Raises:
        ResultsError: It may.
    """
    if not re.fullmatch(r"[0-9A-Za-z_-]+", name):
        raise ResultsError(f"'{name}' is no name of a trial or of a file of results: letters, digits, - and _")
    return name


def is_temporary(file: Place) -> bool:
    """Whether a file's name is one that `write_atomically` gives before it renames it."""
    return file.name.startswith(".") and file.suffix == ".tmp"


def write_atomically(file: Place, content: bytes | Callable[[Path], None]) -> None:
    """Write a file whole or not at all: in a file system under a temporary name, flushed to the disk, and renamed."""
    if isinstance(file, BucketPath):
        _put(file, content)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except Exception as error:
        if isinstance(error, OSError) or not _is_full(file.parent):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from error
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[bool]:
    """Keep others who ask for the same lock away while the context lasts; False where the file system has no locks."""
    with open(file, "w") as handle:  # the lock ends with the process that holds it
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            yield False
            return
        yield True


def _is_full(folder: Path) -> bool:
    """Return whether a disk is full: torch and safetensors say so each in an error of its own."""
    return shutil.disk_usage(folder).free < _LEAST_FREE


def patiently(write: Callable[[], None]) -> None:
    """Write, and where the disk is full try again for as long as for a bucket that does not answer.

    Raises:
        OSError: It was full all that time, or there is another fault.
    """
    until, told = time.monotonic() + PATIENCE.total_seconds(), False
    while True:
        try:
            write()
        except OSError as error:
            if error.errno not in _FULL or time.monotonic() >= until:
                raise
            if not told:
                print(f"{error}; tried again until some is freed", file=sys.stderr)
            told = True
            time.sleep(_RETRY_SECONDS)
        else:
            return


def _put(file: BucketPath, content: bytes | Callable[[Path], None]) -> None:
    if not callable(content):
        file.write_bytes(content)
        return
    with tempfile.TemporaryDirectory(prefix="flatmin-") as folder:
        written = Path(folder) / file.name
        content(written)
        file.write_bytes(written)
