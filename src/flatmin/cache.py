"""What was read of a table's files, kept in one file beside them, so that only new files are opened again.

A trial's file costs a millisecond or more to open, whatever its size, and a table may have thousands. A file is known
again by its name, size and time of change: files are renamed into place whole, and never changed there. The kept file
may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from flatmin.bucket import Place, local_copy
from flatmin.files import write_atomically

Stamp = tuple[str, int, int]
"""Name, size in bytes and time of change in ns of a file."""

WORTH = 64
"""So many files that had to be opened are worth writing what was read anew: about 0.1 s."""

_FORMAT = "1"


@dataclass(frozen=True)
class Kept:
    """What was read of a table's files.

    Attributes:
        rows: The rows of all of them, one file after the other.
        spans: Where the rows of each file are: the first, and how many.
    """

    rows: pa.Table
    spans: Mapping[Stamp, tuple[int, int]] = field(default_factory=dict)


def load(file: Place, expected: pa.Schema) -> Kept:
    """Return what is kept in a file: nothing where it is missing, damaged, or of a version with other columns."""
    nothing = Kept(expected.empty_table())
    try:
        # mapped, so that columns which nobody asks for are never read; a file is replaced, not changed, while it is
        with local_copy(file) as copy, pa.memory_map(str(copy)) as source:
            rows = pa.ipc.open_file(source).read_all()
        notes = rows.schema.metadata
        if notes[b"format"] != _FORMAT.encode() or any(column not in rows.schema for column in expected):
            return nothing
        spans, start = {}, 0
        for name, size, changed, count in json.loads(notes[b"files"]):
            spans[name, size, changed] = (start, count)
            start += count
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return nothing
    return Kept(rows.replace_schema_metadata(None), spans) if start == len(rows) else nothing


def save(file: Place, parts: Mapping[Stamp, int], rows: pa.Table) -> None:
    """Keep rows, where the disk can be written.

    Args:
        file: Where to keep them.
        parts: How many rows each file has, in the order of the rows.
        rows: The rows of all of them.
    """
    files = json.dumps([[*known, count] for known, count in parts.items()])
    rows = rows.combine_chunks().replace_schema_metadata({"format": _FORMAT, "files": files})

    def write(place: Path) -> None:
        with pa.OSFile(str(place), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            writer.write_table(rows)

    with contextlib.suppress(OSError):  # somebody else's directory: reading it again takes longer, that is all
        write_atomically(file, write)
