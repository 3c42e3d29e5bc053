"""Compaction: the rows of many small files in few large ones, while others write and read.

1. Rows of committed trials are written into a merged file, which nobody looks at yet.
2. `merged.json` is replaced: from here on the merged file counts, and the files whose rows it holds do not.
3. These are deleted, if they were not written again meanwhile.

A compaction that is killed leaves, before 2, a file that does not count, and after 2 files that do not count; the next
one deletes them. `flatmin.merged` says why a reader sees every row once all the while.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flatmin import merged, scan
from flatmin.bucket import Changed, Place
from flatmin.cache import Stamp
from flatmin.errors import ResultsError
from flatmin.files import write_atomically
from flatmin.results import Results
from flatmin.tables import schema

TABLES = ("models", "epochs", "sharpness", "spectra")
"""What a launch writes a file of per trial. Of failures there are few, of the plan one per study."""

TARGET_BYTES = 128 * 2**20
"""Bytes in memory after which a merged file is full."""

SMALL_BYTES = 16 * 2**20
"""A merged file below this, on disk, is merged again with what came later."""

MANY = 1000
"""Small files of a table after which a launch compacts at its end: opening them takes a millisecond or more each."""

_BATCH = 512
"""Files that are read before their rows are put together: a table of few rows takes more memory than the rows."""

_TRIES = 5


@dataclass(frozen=True)
class Compacted:
    """What was done to a table.

    Attributes:
        table: Its name.
        before: Files that counted before.
        after: Files that count now.
    """

    table: str
    before: int
    after: int


def compact(results: Results) -> list[Compacted]:
    """Merge the small files of committed trials; a launch may go on meanwhile.

    Raises:
        ResultsError: Others change the same files all the time.
    """
    return [_repeated(lambda table=table: _compact(results.path, table), results.path) for table in TABLES]


def compact_many(results: Results) -> None:
    """Merge the small files of committed trials where there are very many, and where that can be done at all.

    What was trained is no less there for a disk that is full, or a file system without locks.
    """
    with contextlib.suppress(OSError, ResultsError):
        if len(scan.listed(results.path, "models").parts) >= MANY:
            compact(results)


def forget(results: Results, table: str, names: Collection[str]) -> None:
    """Take files out of a table, and their rows out of merged files, for what they held is to be made again.

    Args:
        results: The results; this process owns their lease.
        table: The table.
        names: The files' names, without their ending; of a merged file that cannot be read, its own.
    """
    files = {f"{name}.parquet" for name in names}
    _repeated(lambda: _forget(results.path, table, files), results.path, merging=False)


def _repeated(work: Any, root: Place, *, merging: bool = True) -> Any:
    """Return what some work does in one go, if in a bucket another writer of merged files is not faster each time."""
    for _ in range(_TRIES):
        try:
            with merged.alone(root, merging=merging):
                return work()
        except Changed:
            continue
    raise ResultsError(f"'{root}' is being compacted by others; wait for them")


def _compact(root: Place, table: str) -> Compacted:
    committed = scan.names(root, "models")
    before, there = merged.read(root), scan.listing(root / table)
    files = scan.listed(root, table)
    parts = {name for name, _, _ in files.parts if _trial(name) in committed}
    small = {name for name, size, _ in files.merged if size < SMALL_BYTES}
    published = before
    if parts and len(parts) + len(small) > 1:
        written = list(_write(root, table, files, parts | small))
        published = before.with_files(table, [*(name for name in before.of(table) if name not in small), *written])
        merged.publish(root, published)
    _sweep(root, table, published, there, again=published is before)
    return Compacted(table, len(files.all), len(scan.listed(root, table).all))


def _trial(name: str) -> str:
    """Return the trial that a file's name begins with: `<trial>.parquet`, or `<trial>-<what was measured>.parquet`."""
    return Path(name).stem.partition("-")[0]


def _write(
    root: Place, table: str, files: scan.Files, names: Collection[str], without: Collection[str] = ()
) -> Iterator[str]:
    """Write what counts of some files, in the order of their names; yield the merged files' names."""
    rows, parts, size = list[pa.Table](), list[tuple[Stamp, int]](), 0
    pieces = _pieces(root, table, files, names)
    for batch in _batches(piece for piece in pieces if piece[0][0] not in without):
        rows.append(scan.joined([piece for _, piece in batch], table).combine_chunks())
        parts += [(stamp, len(piece)) for stamp, piece in batch]
        size += rows[-1].nbytes
        if size >= TARGET_BYTES:
            yield _written(root, table, rows, parts)
            rows, parts, size = [], [], 0
    if parts:
        yield _written(root, table, rows, parts)


def _batches(pieces: Iterator[tuple[Stamp, pa.Table]]) -> Iterator[list[tuple[Stamp, pa.Table]]]:
    batch = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _pieces(root: Place, table: str, files: scan.Files, names: Collection[str]) -> Iterator[tuple[Stamp, pa.Table]]:
    """Yield what counts of some files: name, size and time of each file that was not merged once, and its rows."""
    live, expected = files.live([0] * len(files.parts)).to_pydict(), schema(table)
    loaded = {
        number: (scan.rows_of(root / table / stamp[0], table, expected), _stamps(files.notes[number]))
        for number, stamp in enumerate(files.merged)
        if stamp[0] in names
    }
    for name, number, start, count in zip(*live.values(), strict=True):
        if number in loaded:
            rows, stamps = loaded[number]
            yield stamps[name], rows.slice(start, count)
        elif name in names:
            try:
                yield files.all[number], scan.rows_of(root / table / name, table, expected)
            except (pa.ArrowException, OSError, ValueError):
                continue  # damaged, or taken away meanwhile: it stays what it is


def _stamps(noted: pa.Table) -> dict[str, Stamp]:
    return {name: (name, size, changed) for name, size, changed, _ in zip(*noted.to_pydict().values(), strict=True)}


def _written(root: Place, table: str, rows: Sequence[pa.Table], parts: Sequence[tuple[Stamp, int]]) -> str:
    name = f"{merged.PREFIX}{uuid4().hex[:16]}.parquet"
    content = merged.with_notes(scan.joined(rows, table), parts)
    write_atomically(root / table / name, lambda file: pq.write_table(content, file))
    return name


def _sweep(root: Place, table: str, counting: merged.Manifest, there: Sequence[Stamp], *, again: bool) -> None:
    """Delete what counts no more: merged files of old, and files whose rows are merged.

    A merged file that nobody knows may be another writer's, in a bucket, who has yet to publish it. It was there before
    this version was published, so that writer will not succeed; `again` says that this has yet to be made so.
    """
    unknown = [stamp[0] for stamp in there if stamp[0].startswith(merged.PREFIX) and stamp[0] not in counting.of(table)]
    if unknown and again:
        merged.publish(root, counting.with_files(table, counting.of(table)))
    if isinstance(root, Path):
        for left in [*root.glob(f".{merged.NAME}*.tmp"), *(root / table).glob(f".{merged.NAME}*.tmp")]:
            left.unlink(missing_ok=True)
    noted = scan.listed(root, table).notes
    parts = [stamp for stamp in scan.listing(root / table) if not stamp[0].startswith(merged.PREFIX)]
    gone = sorted(merged.stale(parts, noted))
    with ThreadPoolExecutor(1 if isinstance(root, Path) else 16) as threads:
        list(threads.map(lambda name: (root / table / name).unlink(missing_ok=True), [*unknown, *gone]))


def _forget(root: Place, table: str, names: Collection[str]) -> None:
    before = merged.read(root)
    for name in names:
        (root / table / name).unlink(missing_ok=True)
    if not before.version and isinstance(root, Path):
        return
    files, wanted = scan.listed(root, table), pa.array(sorted(names), pa.string())
    concerned = {
        stamp[0]
        for stamp, noted in zip(files.merged, files.notes, strict=True)
        if pc.any(pc.is_in(noted["name"], value_set=wanted)).as_py()
    }
    written = list(_write(root, table, files, concerned, without=names))
    left = [name for name in before.of(table) if name not in concerned | set(names)]
    # published in a bucket even where it changes nothing: one who has read those files meanwhile must not succeed
    merged.publish(root, before.with_files(table, [*left, *written]))
    for name in concerned:
        (root / table / name).unlink(missing_ok=True)
