"""The files of data sets: found, or downloaded once on a machine, checked and unpacked; and kept decoded.

What is not there is downloaded only inside `downloads_allowed()`, which the training of a trial enters: planning, and
looking at what works, never start a transfer. A transfer goes to `NAME.part`, is taken up where it was cut off (HTTP
Range), and gets its name when its checksum is right. One process does it, behind a lock of the system; others wait.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import ssl
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor

from flatmin.errors import DataError, MissingData

_FRUITLESS = 3
"""Tries in a row that bring no byte, after which an address is given up."""

_WAIT = 1.0
"""Seconds before another try."""

_SILENCE = 60.0
"""Seconds without a byte after which a transfer counts as cut off."""

_CUT_OFF = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError)

_allowed: ContextVar[bool] = ContextVar("downloads_allowed", default=False)


@dataclass(frozen=True)
class Download:
    """A file that can be downloaded.

    Attributes:
        path: Where it goes, below the folder of the data set.
        urls: Where it comes from; the next is tried where one fails.
        md5: Its checksum, or empty where none is published.
        size: Its bytes, or None where they are not known.
        into: Where an archive is unpacked, below the folder of the data set, or None for what is read as it is.
    """

    path: str
    urls: tuple[str, ...]
    md5: str = ""
    size: int | None = None
    into: str | None = None


@dataclass(frozen=True)
class Source:
    """What a data set is read from.

    Attributes:
        name: The data set's name.
        files: The files that must be there, below the folder of the data set.
        downloads: What they come from.
        page: The official page.
    """

    name: str
    files: tuple[str, ...]
    downloads: tuple[Download, ...]
    page: str

    def lacking(self, folder: Path) -> str:
        """Return the first of the files that is not there, or nothing."""
        return next((file for file in self.files if not (folder / file).exists()), "")

    def mend(self, folder: Path, otherwise: str) -> str:
        """Return what to do where files are not there, on the first line; then each download and where it goes."""
        lines = [f"{otherwise}; or put there what {self.page} has (FLATMIN_DATA says where data sets lie)"]
        for download in self.downloads:
            facts = [f"{download.size:,} bytes"] if download.size else []
            facts += [f"md5 {download.md5}"] if download.md5 else []
            lines.append(f"{folder / download.path} ({', '.join([*facts, f'from {download.urls[0]}'])})")
        return "\n  ".join(lines)


@contextmanager
def downloads_allowed() -> Iterator[None]:
    """Let data sets that are loaded in this context download what they lack."""
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def downloads_are_allowed() -> bool:
    """Whether this is inside `downloads_allowed()`."""
    return _allowed.get()


def provide(source: Source, folder: Path) -> None:
    """See to it that the files of a data set are in its folder: downloaded, checked and unpacked.

    Raises:
        MissingData: They are not there, and may not or cannot be downloaded.
        DataError: A download is damaged, or lacks some of them.
    """
    lacking = source.lacking(folder)
    if not lacking:
        return
    if not downloads_are_allowed() and any(not (folder / download.path).exists() for download in source.downloads):
        raise MissingData(
            f"{source.name} is not at {folder}, which has no {lacking}",
            source.mend(folder, "`flatmin-sweep launch` downloads it"),
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{source.name}.lock"):
            if source.lacking(folder):
                for download in source.downloads:
                    _obtain(source, download, folder)
    except OSError as error:
        raise DataError(
            f"{source.name} cannot be put at {folder}: {error}", "make room, or change FLATMIN_DATA"
        ) from None
    if source.lacking(folder):
        raise DataError(
            f"{folder} has no {source.lacking(folder)}, with all downloads there",
            source.mend(folder, "remove what is there, and launch again"),
        )


def md5_of(path: Path) -> str:
    """Return a file's md5, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def check_md5(path: Path, md5: str, mend: str) -> None:
    """Check a file's md5.

    Raises:
        DataError: It is another.
    """
    found = md5_of(path)
    if found != md5:
        raise DataError(f"{path} is damaged: its md5 is {found} and should be {md5}", mend)


def _obtain(source: Source, download: Download, folder: Path) -> None:
    """Download a file that is not there, and unpack it.

    Raises:
        MissingData: It cannot be downloaded.
        DataError: It is damaged.
    """
    path = folder / download.path
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _download(source, download, folder)
    elif download.md5:
        check_md5(path, download.md5, "remove it, and `flatmin-sweep launch` downloads it again")
    if download.into is not None:
        _unpack(path, folder / download.into)


def _download(source: Source, download: Download, folder: Path) -> None:
    path, problems = folder / download.path, []
    part = path.with_name(path.name + ".part")
    for url in download.urls:
        print(f"{source.name}: downloading {url} to {path}", file=sys.stderr)
        for old in (part.exists(), False):  # what an older transfer left may be of another file: then all anew
            problem = _transfer(url, part)
            if not problem and download.md5:
                try:
                    check_md5(part, download.md5, "")
                except DataError as error:
                    problem = error.found
                    part.unlink()
            if not problem:
                part.replace(path)
                return
            if not old or part.exists():
                break
        problems.append(f"{url}: {problem}")
    raise MissingData(
        f"{source.name} is not at {folder} and could not be downloaded ({'; '.join(problems)})",
        source.mend(folder, "launch again, which goes on where the transfer was cut off"),
    )


def _transfer(url: str, part: Path) -> str:
    """Download the rest of a file; return why that failed, or nothing."""
    fruitless, problem = 0, ""
    while fruitless < _FRUITLESS:
        before = _size(part)
        try:
            if _receive(url, part):
                return ""
            problem = f"cut off after {_size(part):,} bytes"
        except urllib.error.HTTPError as error:
            with error:
                problem = f"HTTP {error.code} {error.reason}"
            if error.code == 416 and error.headers.get("Content-Range", "").endswith(f"/{before}"):
                return ""  # nothing is left to send
            if error.code == 416:
                part.unlink(missing_ok=True)
            elif error.code < 500:
                return problem
        except _CUT_OFF as error:
            problem = str(error) or type(error).__name__
        fruitless = 0 if _size(part) > before else fruitless + 1
        time.sleep(_WAIT)
    return problem


def _receive(url: str, part: Path) -> bool:
    """Append what is left of a file to a part of it; return whether all came that was announced."""
    have = _size(part)
    headers = {"User-Agent": "flatmin-sweep", **({"Range": f"bytes={have}-"} if have else {})}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_SILENCE) as response:
        start = have if response.status == 206 else 0
        announced = response.length
        with part.open("ab" if start else "wb") as file:
            shutil.copyfileobj(response, file, 2**20)
    return announced is None or _size(part) == start + announced


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _unpack(archive: Path, target: Path) -> None:
    """Unpack an archive beside where it goes, so that what is there is whole, and move it there.

    Raises:
        DataError: The archive is damaged.
    """
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".unpacking-") as place:
        try:
            if archive.suffix == ".zip":
                shutil.unpack_archive(archive, place)
            elif archive.name.endswith(".tar.gz"):
                shutil.unpack_archive(archive, place, filter="data")
            else:
                with gzip.open(archive) as packed, (Path(place) / archive.stem).open("wb") as file:
                    shutil.copyfileobj(packed, file, 2**20)
        except (
            zipfile.BadZipFile,
            tarfile.TarError,
            zlib.error,
            EOFError,
            shutil.ReadError,
            gzip.BadGzipFile,
        ) as error:
            raise DataError(
                f"{archive} cannot be unpacked: {error}", "remove it, and `flatmin-sweep launch` downloads it again"
            ) from None
        for found in Path(place).iterdir():
            _move(found, target / found.name)


def _move(found: Path, to: Path) -> None:
    if found.is_dir() and to.is_dir():
        for inner in found.iterdir():
            _move(inner, to / inner.name)
    else:
        found.replace(to)


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors that take long to make: from a file, or made once and kept in it where the folder can be written.

    Args:
        path: The file. Whoever changes what it was made from removes it.
        make: What makes the tensors.
    """
    found = _read(path)
    if found is not None:
        return found
    if not os.access(path.parent, os.W_OK):
        return make()
    with FileLock(path.with_name(f".{path.name}.lock")):
        found = _read(path)
        if found is None:
            found = make()
            part = path.with_name(f".{path.name}.part")
            safetensors.torch.save_file(found, part)
            part.replace(path)
    return found


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        return safetensors.torch.load_file(path)
    except (FileNotFoundError, SafetensorError):  # never made, or cut off by an older version's crash
        return None
