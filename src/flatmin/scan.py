"""Reading a table: which of its files count, their rows in the order of the files' names, and which cannot be read.

Rows of merged files (`flatmin.merged`) take the places of the files they came from, so a table that was merged reads
as it did before.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flatmin import cache, merged
from flatmin.bucket import Place
from flatmin.cache import Stamp
from flatmin.errors import ResultsError
from flatmin.tables import ADDED, schema

_REQUESTS = 16
"""Files of a bucket that are read at a time."""

_TRIES = 100
"""How often files may vanish while a table is read before that is an error."""

Bad = list[tuple[Place, Exception]]


@dataclass(frozen=True)
class Files:
    """The files of a table that count.

    Attributes:
        merged: Merged files, a later one over an earlier one.
        notes: Whose rows each of them holds.
        parts: All other files, by name.
        bad: Merged files that cannot be read, and why not.
    """

    merged: list[Stamp]
    notes: list[pa.Table]
    parts: list[Stamp]
    bad: Bad

    @property
    def all(self) -> list[Stamp]:
        """Merged files first."""
        return [*self.merged, *self.parts]

    def live(self, counts: Sequence[int]) -> pa.Table:
        """Return what counts, by name: `name`, `file` (its number in `all`), `start` and `rows` within that file.

        Args:
            counts: How many rows each of `parts` has.
        """
        pieces = [
            {
                "name": noted["name"].combine_chunks(),
                "file": pa.array(np.full(len(noted), number)),
                "start": pa.array(_starts(noted["rows"].to_numpy())),
                "rows": noted["rows"].combine_chunks(),
            }
            for number, noted in enumerate(self.notes)
        ]
        own = {
            "name": pa.array([name for name, _, _ in self.parts], pa.string()),
            "file": pa.array(np.arange(len(self.parts)) + len(self.merged)),
            "start": pa.array(np.zeros(len(self.parts), np.int64)),
            "rows": pa.array(np.asarray(counts, np.int64)),
        }
        every = pa.concat_tables([pa.table(piece) for piece in (*pieces, own)])
        every = every.take(pc.sort_indices(every, [("name", "ascending"), ("file", "ascending")]))
        if len(every) < 2:
            return every
        names = every["name"].combine_chunks()
        last = pc.not_equal(names.slice(0, len(names) - 1), names.slice(1))
        return every.filter(pa.concat_arrays([last, pa.array([True])]))


def _starts(counts: np.ndarray) -> np.ndarray:
    starts: np.ndarray = np.cumsum(counts) - counts
    return starts


def holds(root: Place, table: str, name: str) -> bool:
    """Whether a table has a file of that name, of its own or merged with others."""
    if (root / table / f"{name}.parquet").exists():
        return True
    return bool(merged.read(root).of(table)) and name in names(root, table)


def names(root: Place, table: str) -> set[str]:
    """Return the names, without their ending, of all files of a table, those that were merged among them."""
    files = listed(root, table)
    merged_ones = (name for noted in files.notes for name in noted["name"].to_pylist())
    return {Path(name).stem for name in (*merged_ones, *(part[0] for part in files.parts))}


def listed(root: Place, table: str) -> Files:
    """Return the files of a table that count.

    Raises:
        ResultsError: They change faster than they can be listed.
    """
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            before = merged.read(root)
            there = listing(root / table)
            if merged.read(root).version == before.version:
                return _counting(root / table, before.of(table), there)
    raise ResultsError(f"the files of '{root / table}' change faster than they can be listed")


def listing(folder: Place) -> list[Stamp]:
    """Return the Parquet files of a folder, by name; none where there is no folder.

    Raises:
        FileNotFoundError: One of them vanished meanwhile.
    """
    found = []
    if isinstance(folder, Path):
        if not folder.is_dir():
            return []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(".parquet") and not entry.name.startswith("."):
                    status = entry.stat()
                    if stat.S_ISREG(status.st_mode):
                        found.append((entry.name, status.st_size, status.st_mtime_ns))
    else:
        found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.glob("*.parquet")]
    return sorted(found)


def _counting(folder: Place, names: Sequence[str], there: Sequence[Stamp]) -> Files:
    by_name = {stamp[0]: stamp for stamp in there if stamp[0].startswith(merged.PREFIX)}
    files, noted, bad = [], [], Bad()
    for name in names:
        try:
            if name not in by_name:
                raise ValueError("it is not there")
            noted.append(merged.notes(folder / name))
            files.append(by_name[name])
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            bad.append((folder / name, error))
    parts = [stamp for stamp in there if not stamp[0].startswith(merged.PREFIX)]
    gone = merged.stale(parts, noted)
    return Files(files, noted, [stamp for stamp in parts if stamp[0] not in gone], bad)


def scan(root: Place, table: str) -> tuple[list[pa.Table], Bad]:
    """Return the rows of a table's readable files, and which are not and why.

    Args:
        root: The results directory.
        table: The table.

    Raises:
        ResultsError: Its files change faster than they can be read.
    """
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):
            return _read(root, table, listed(root, table))
    raise ResultsError(f"the files of '{root / table}' change faster than they can be read")


def _read(root: Place, table: str, files: Files) -> tuple[list[pa.Table], Bad]:
    file_of_cache, expected = root / "cache" / f"{table}.arrow", schema(table)
    kept = cache.load(file_of_cache, expected)
    good: dict[Stamp, tuple[int, int] | pa.Table] = {}
    bad = list(files.bad)
    for known, found in _each(root / table, files.all, kept.spans, lambda file: rows_of(file, table, expected)):
        if isinstance(found, Exception):
            bad.append((root / table / known[0], found))
        else:
            good[known] = found
    counts = {known: len(found) if isinstance(found, pa.Table) else found[1] for known, found in good.items()}
    parts = _parts(kept.rows, good.values(), whole=table != "spectra" or bool(files.merged))
    opened = [known for known, found in good.items() if isinstance(found, pa.Table)]
    if len(opened) >= cache.WORTH or any(known in files.merged for known in opened):
        cache.save(file_of_cache, counts, joined(parts, table))
    if files.merged:
        parts = _in_order(joined(parts, table), files, counts, whole=table != "spectra")
    return parts, bad


def _in_order(rows: pa.Table, files: Files, counts: Mapping[Stamp, int], *, whole: bool) -> list[pa.Table]:
    """Return what counts of the rows of all files, one after the other, in the order of the files' names."""
    live = files.live([counts.get(part, 0) for part in files.parts])
    lengths = np.array([counts.get(known, 0) for known in files.all])
    owner, own = live["file"].to_numpy(), live["rows"].to_numpy()
    readable = np.array([known in counts for known in files.all])[owner]
    starts = (_starts(lengths)[owner] + live["start"].to_numpy())[readable]
    own = own[readable]
    if not whole:
        return [rows.slice(start, count) for start, count in zip(starts.tolist(), own.tolist(), strict=True) if count]
    if np.array_equal(starts, _starts(own)) and own.sum() == len(rows):
        return [rows]
    return [rows.combine_chunks().take(pa.array(np.repeat(starts - _starts(own), own) + np.arange(own.sum())))]


def _each(
    folder: Place,
    files: Sequence[Stamp],
    spans: Mapping[Stamp, tuple[int, int]],
    read: Callable[[Place], pa.Table],
) -> Iterator[tuple[Stamp, Any]]:
    """Yield what each file is known by and its rows: where they are in the cache, read anew, or why not.

    A bucket answers a request in some tens of milliseconds, whatever its size, so several are under way at a time.

    Raises:
        FileNotFoundError: It was taken away since it was listed.
    """

    def one(known: Stamp) -> tuple[Stamp, Any]:
        try:
            return known, spans[known] if known in spans else read(folder / known[0])
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError) as error:
            return known, error

    if isinstance(folder, Path):
        yield from map(one, files)
        return
    with ThreadPoolExecutor(_REQUESTS) as threads:
        yield from threads.map(one, files)


def rows_of(file: Place, table: str, expected: pa.Schema) -> pa.Table:
    """Return the rows of one file.

    Raises:
        ValueError: It is not one of this table.
    """
    rows = pq.ParquetFile(pa.BufferReader(file.read_bytes())).read(use_threads=False).replace_schema_metadata(None)
    rows = _with_added(rows, expected)
    own = rows.schema
    at = [own.get_field_index(field.name) for field in expected]  # -1: none. `in` takes a third of a small file's time
    wrong = [field.name for i, field in zip(at, expected, strict=True) if i < 0 or not own.field(i).equals(field)]
    if wrong:
        raise ValueError(f"not a file of {table}: it lacks the column {wrong[0]}, or has it in another type")
    return rows


def _with_added(rows: pa.Table, expected: pa.Schema) -> pa.Table:
    """Return a file's rows with the columns that its version did not have yet."""
    lacking = set(ADDED).difference(rows.column_names)
    for field in expected:
        if field.name in lacking:
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows


def _parts(kept: pa.Table, found: Iterable[tuple[int, int] | pa.Table], *, whole: bool) -> list[pa.Table]:
    """Return the rows of files in order; of files that follow each other in `kept`, in one part if `whole`."""
    parts: list[tuple[int, int] | pa.Table] = []
    for part in found:
        last = parts[-1] if parts else None
        if whole and isinstance(part, tuple) and isinstance(last, tuple) and sum(last) == part[0]:
            parts[-1] = (last[0], last[1] + part[1])
        else:
            parts.append(part)
    return [kept.slice(*part) if isinstance(part, tuple) else part for part in parts]


def joined(parts: Sequence[pa.Table], table: str) -> pa.Table:
    """Return several pieces of a table as one."""
    if not parts:
        return schema(table).empty_table()
    return parts[0] if len(parts) == 1 else pa.concat_tables(parts, promote_options="permissive")
