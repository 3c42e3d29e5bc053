"""Merged files: Parquet files that hold the rows of many files of a table, and the one file that says which count.

    merged.json                    {"version": ..., "files": {"models": ["merged-0123456789abcdef.parquet"]}}
    models/merged-....parquet      rows of many files; its footer has their names, sizes, times of change and row counts

`merged.json` is replaced whole. A merged file counts while it is named there; a file whose rows it holds does not,
unless it was written again since, and is deleted some time later. So a reader that finds the same version before and
after it lists a table has seen every row once: what was deleted meanwhile is in the merged files of that version, and
what vanishes later, before it is opened, sends the reader back to the beginning.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flatmin.bucket import BucketPath, Changed, Place, Tag
from flatmin.cache import Stamp
from flatmin.errors import ResultsError
from flatmin.files import locked, write_atomically

NAME = "merged"
PREFIX = f"{NAME}-"

_NOTES = b"flatmin.merged"

_NOTED = pa.schema([("name", pa.string()), ("size", pa.int64()), ("changed", pa.int64()), ("rows", pa.int64())])


@dataclass(frozen=True)
class Manifest:
    """What `merged.json` says.

    Attributes:
        version: Another one whenever it was written anew; empty before the first time.
        files: By table, the names of the merged files, a later one over an earlier one.
        tag: In a bucket, which object was read.
    """

    version: str = ""
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tag: Tag | None = field(default=None, compare=False)

    def of(self, table: str) -> tuple[str, ...]:
        """Return the merged files of a table."""
        return self.files.get(table, ())

    def with_files(self, table: str, names: Sequence[str]) -> Manifest:
        """Return what to publish next: the same with other merged files of one table."""
        return Manifest(uuid.uuid4().hex, {**self.files, table: tuple(names)}, self.tag)


def read(root: Place) -> Manifest:
    """Return which merged files of a results directory count.

    Raises:
        ResultsError: The file that says so is damaged.
    """
    file, tag = root / f"{NAME}.json", None
    try:
        if isinstance(file, BucketPath):
            content, tag = file.read_tagged()
        else:
            content = file.read_bytes()
        found = json.loads(content)
        files = {str(table): tuple(map(str, names)) for table, names in found["files"].items()}
        return Manifest(str(found["version"]), files, tag)
    except FileNotFoundError:
        return Manifest()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultsError(
            f"'{file}' cannot be read ({error}); it says which merged files count: put back a copy of it"
        ) from None


def publish(root: Place, manifest: Manifest) -> None:
    """Let other merged files count from now on, in place of those of the version that `manifest` was made from.

    Raises:
        Changed: In a bucket: another writer was faster.
    """
    file = root / f"{NAME}.json"
    content = json.dumps({"version": manifest.version, "files": manifest.files}, indent=2).encode()
    if not isinstance(file, BucketPath):
        write_atomically(file, content)
        return
    try:
        file.write_if(content, manifest.tag)
    except Changed:  # by another writer; or by ourselves, and the first answer was lost on its way
        if read(root).version != manifest.version:
            raise


@contextlib.contextmanager
def alone(root: Place, *, merging: bool) -> Iterator[None]:
    """Keep other writers of merged files away, on this file system; in a bucket `publish` finds out instead.

    Args:
        root: The results directory.
        merging: Whether merged files are to be made, which needs a file system with locks.

    Raises:
        ResultsError: It has none.
    """
    if isinstance(root, BucketPath):
        yield
        return
    with locked(root / ".merging.lock") as is_alone:
        if merging and not is_alone:
            raise ResultsError(f"the file system of '{root}' has no locks (flock), without which nothing is merged")
        yield


def notes(file: Place) -> pa.Table:
    """Return whose rows a merged file holds, in their order: `name`, `size`, `changed` (ns) and `rows`.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is damaged, or no merged file.
    """
    source = file if isinstance(file, Path) else pa.BufferReader(file.read_bytes())
    found = (pq.read_schema(source).metadata or {}).get(_NOTES)
    if found is None:
        raise ValueError("it does not say whose rows it holds")
    return pa.Table.from_pydict(json.loads(found), schema=_NOTED)


def with_notes(rows: pa.Table, parts: Sequence[tuple[Stamp, int]]) -> pa.Table:
    """Return rows that know, once written, whose they are.

    Args:
        rows: The rows.
        parts: Name, size and time of change of each file, and how many rows are its.
    """
    names, sizes, changed = zip(*(stamp for stamp, _ in parts), strict=True)
    columns = (names, sizes, changed, [count for _, count in parts])
    text = json.dumps(dict(zip(_NOTED.names, columns, strict=True)))
    return rows.replace_schema_metadata({_NOTES: text.encode()})


def stale(parts: Sequence[Stamp], noted: Sequence[pa.Table]) -> set[str]:
    """Return the names of the files whose rows are in merged files, and which were not written again since.

    Args:
        parts: The files.
        noted: The notes of the merged files, a later one over an earlier one.
    """
    if not noted:
        return set()
    names, found = pa.array([name for name, _, _ in parts], pa.string()), set[str]()
    for notes_of in noted:
        places = pc.index_in(names, value_set=notes_of["name"].combine_chunks())
        for part, place in zip(parts, places.to_pylist(), strict=True):
            if place is not None:
                same = part[1:] == (notes_of["size"][place].as_py(), notes_of["changed"][place].as_py())
                found.add(part[0]) if same else found.discard(part[0])
    return found
