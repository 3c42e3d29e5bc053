"""Results: the one place that knows what lies where in a results directory or bucket, and that writes it.

    plan/, models/, epochs/, sharpness/, spectra/, failures/    Parquet, one file per trial (or plan, or attempt)
    checkpoints/<trial_id>.safetensors                          weights of a committed trial
    checkpoints/<trial_id>-a.state, -b.state                    a trial under way
    logs/<trial_id>.log, logs/ray.log                           what workers and Tune have said
    study.yaml, results.json, lease.json                        the resolved study, the schema, the owner
    cache/                                                      what was read before (flatmin.cache)

A file is written under a temporary name and renamed; an object of a bucket is whole from the start (`flatmin.bucket`).
`models/` is written last: that is the commit, and a row elsewhere counts only if its (model_id, trial_id) is there.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flatmin import cache
from flatmin.bucket import BucketPath, Place
from flatmin.errors import CorruptFileWarning, ResultsError
from flatmin.files import is_temporary, place, plain_name, write_atomically
from flatmin.settings import Argument
from flatmin.tables import ADDED, LOST, SCHEMA_VERSION, TABLES, schema, to_arrow

if TYPE_CHECKING:  # it takes longer to import than a query to answer
    import pandas as pd

_REQUESTS = 16
"""Files of a bucket that are read at a time."""


@dataclass(frozen=True, init=False)
class Results:
    """One results directory, in a file system or in a bucket.

    Attributes:
        path: The directory; given as a path or as a URI.
    """

    path: Place

    def __init__(self, path: str | Place) -> None:
        object.__setattr__(self, "path", place(path))

    @classmethod
    def open(cls, path: str | Place) -> Results:
        """Open an existing results directory.

        Raises:
            ResultsError: It is missing, is not one, or has another schema.
        """
        results = cls(path)
        results.reach()
        if not results.path.is_dir():
            raise ResultsError(f"there is no results directory '{path}'")
        if not results.header_file.exists():
            raise ResultsError(f"'{path}' is not a results directory: it has no results.json")
        results.check_schema()
        return results

    @classmethod
    def create(cls, path: str | Place, study: str) -> Results:
        """Open the results directory of a study, or make it.

        Raises:
            ResultsError: It belongs to another study, has another schema, holds something else, or cannot
                be written.
        """
        results = cls(path)
        results.reach()
        if results.header_file.exists():
            header = results.check_schema()
            if header["study"] != study:
                raise ResultsError(
                    f"'{path}' holds the study '{header['study']}', not '{study}'; choose another --results directory"
                )
        try:
            results.path.mkdir(parents=True, exist_ok=True)
            if not results.header_file.exists():
                names = {entry.name for entry in results.path.iterdir() if not is_temporary(entry)}
                if names - {"lease.json"}:
                    raise ResultsError(f"'{path}' is not empty and is not a results directory; choose another")
                header = {"schema": SCHEMA_VERSION, "study": study, "created_at": now().isoformat()}
                write_atomically(results.header_file, json.dumps(header, indent=2).encode())
        except OSError as error:
            raise ResultsError(f"'{path}' cannot be written: {error.strerror or error}") from None
        return results

    @property
    def directory(self) -> Path:
        """The directory.

        Raises:
            ResultsError: The results are in a bucket.
        """
        if isinstance(self.path, BucketPath):
            raise ResultsError(f"'{self.path}' is in a bucket; copy it to a directory first")
        return self.path

    def reach(self) -> None:
        """Raise, after some seconds, when the results are in a bucket that does not answer.

        Raises:
            ResultsError: It does not.
        """
        if isinstance(self.path, BucketPath):
            self.path.reach()

    @property
    def header_file(self) -> Place:
        """Where the schema version and the study's name are kept."""
        return self.path / "results.json"

    @property
    def lease_file(self) -> Place:
        """Where the owner of the directory is kept."""
        return self.path / "lease.json"

    @property
    def study_file(self) -> Place:
        """Where the resolved study is kept."""
        return self.path / "study.yaml"

    def weights_file(self, trial_id: str) -> Place:
        """Where a committed trial's weights are."""
        return self.path / "checkpoints" / f"{plain_name(trial_id)}.safetensors"

    def state_files(self, trial_id: str) -> tuple[Place, Place]:
        """Where a trial under way keeps, twice, what it needs to go on."""
        folder = self.path / "checkpoints"
        return folder / f"{plain_name(trial_id)}-a.state", folder / f"{trial_id}-b.state"

    def log_file(self, trial_id: str) -> Place:
        """Where what a trial's worker has said is kept."""
        return self.path / "logs" / f"{plain_name(trial_id)}.log"

    def table_file(self, table: str, name: str) -> Place:
        """Where one file of a table is."""
        return self.path / table / f"{plain_name(name)}.parquet"

    def check_schema(self) -> dict[str, Any]:
        """Return the header.

        Raises:
            ResultsError: The header cannot be read, or its schema is another than this version's.
        """
        try:
            header: dict[str, Any] = json.loads(self.header_file.read_text())
            version, _ = int(header["schema"]), str(header["study"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(
                f"'{self.header_file}' cannot be read ({error}); it should hold "
                f'{{"schema": {SCHEMA_VERSION}, "study": NAME}}'
            ) from None
        if version != SCHEMA_VERSION:
            age = "an older" if version < SCHEMA_VERSION else "a newer"
            raise ResultsError(
                f"'{self.path}' was written with {age} schema ({version}; this version reads {SCHEMA_VERSION}); "
                "choose another --results directory, or the version that wrote it"
            )
        return header

    def write(
        self,
        table: str,
        name: str,
        rows: Iterable[Mapping[str, Any]],
        arguments: Mapping[str, Argument] | None = None,
    ) -> None:
        """Write one file of a table, whole or not at all; a file of that name is replaced."""
        content = to_arrow(rows, schema(table, arguments))
        sink = pa.BufferOutputStream()
        pq.write_table(content, sink)
        write_atomically(self.table_file(table, name), sink.getvalue().to_pybytes())

    def attempts(self, trial_id: str) -> tuple[int, int]:
        """Return how often a trial has failed, and how often its process was lost after it had got on."""
        both, lost = (sum(1 for _ in (self.path / "failures").glob(f"{trial_id}-{x}*.parquet")) for x in ("", LOST))
        return both - lost, lost

    def read(self, table: str) -> pa.Table:
        """Return every readable row of a table, committed or not, unreadable files left out with a warning.

        Of a curve that lies in several files of `spectra`, the first file's points are taken: points of two would mix.
        """
        parts, bad = self._scan(table)
        for file, error in bad:
            warnings.warn(f"{file} cannot be read and is left out: {error}", CorruptFileWarning, stacklevel=3)
        return _joined(_first_curves(parts) if table == "spectra" else parts, table)

    def table(self, table: str) -> pa.Table:
        """Return the rows of a table that count: those of committed models, each once."""
        rows = self.read(table)
        if table in {"plan", "models"}:
            return _first_of_each(rows, ["model_id"])
        if table == "failures":
            return rows
        rows = _committed(rows, self.read("models"))
        return _first_of_each(rows, ["model_id", "epoch", "label"]) if table == "sharpness" else rows

    def measured(self) -> set[tuple[str, str]]:
        """Return the model_id and label of every measure of a trained model, those taken under way left out."""
        models = self.table("models")
        ended = dict(zip(models["model_id"].to_pylist(), models["epochs_run"].to_pylist(), strict=True))
        rows = self.table("sharpness").select(["model_id", "label", "epoch"]).to_pydict()
        return {(model, label) for model, label, epoch in zip(*rows.values(), strict=True) if ended[model] == epoch}

    def models(self) -> pd.DataFrame:
        """Return the trained models, one row each."""
        return _frame(self.table("models"))

    def epochs(self) -> pd.DataFrame:
        """Return the evaluated epochs of the trained models."""
        return _frame(self.table("epochs"))

    def sharpness(self) -> pd.DataFrame:
        """Return the measures of the trained models."""
        return _frame(self.table("sharpness"))

    def spectra(self) -> pd.DataFrame:
        """Return the points of the curves and surfaces of the trained models."""
        return _frame(self.table("spectra"))

    def wide(self) -> pd.DataFrame:
        """Return the trained models joined to one column per measure label: the value at the end of training."""
        return _frame(self.wide_table())

    def wide_table(self) -> pa.Table:
        """Return what `wide` does, as an Arrow table; before the first model ended, the plan's settings are there."""
        models = self.table("models")
        if not len(models):
            return pa.unify_schemas([models.schema, self.table("plan").schema]).empty_table()
        rows = self.table("sharpness")
        labels = sorted(pc.unique(rows["label"]).to_pylist())
        ended = models["epochs_run"].take(pc.index_in(rows["model_id"], value_set=pc.unique(models["model_id"])))
        rows = rows.filter(pc.equal(rows["epoch"], ended))
        for label in labels:
            of_label = rows.filter(pc.equal(rows["label"], label))
            place = pc.index_in(models["model_id"], value_set=of_label["model_id"].combine_chunks())
            models = models.append_column(label, of_label["value"].take(place))
        return models

    def plan(self) -> pd.DataFrame:
        """Return the planned models, one row each."""
        return _frame(self.table("plan"))

    def failures(self) -> pd.DataFrame:
        """Return the failed attempts."""
        return _frame(self.table("failures"))

    def unreadable(self) -> list[tuple[str, Place]]:
        """Return the table and path of every file that cannot be read."""
        return [(table, file) for table in TABLES for file, _ in self._scan(table, anew=True)[1]]

    def remove(self, file: Place) -> None:
        """Remove a file if it is there."""
        file.unlink(missing_ok=True)

    def clear_temporary(self) -> None:
        """Remove what interrupted writes have left; in a bucket they leave nothing."""
        if isinstance(self.path, BucketPath):
            return
        for file in self.path.rglob("*"):
            if is_temporary(file):
                file.unlink(missing_ok=True)

    def _scan(self, table: str, *, anew: bool = False) -> tuple[list[pa.Table], list[tuple[Place, Exception]]]:
        """Return the rows of a table's readable files, and which are not and why; `anew`: open every file."""
        file_of_cache, expected = self.path / "cache" / f"{table}.arrow", schema(table)
        kept = cache.Kept(expected.empty_table()) if anew else cache.load(file_of_cache, expected)
        good: dict[cache.Stamp, tuple[int, int] | pa.Table] = {}
        bad: list[tuple[Place, Exception]] = []
        files = sorted(file for file in (self.path / table).glob("*.parquet") if file.is_file())
        for file, known, found in _each(files, kept.spans, lambda file: _rows_of(file, table, expected)):
            if known is None:
                bad.append((file, found))
            else:
                good[known] = found
        parts = _parts(kept.rows, good.values(), whole=table != "spectra")
        if not anew and sum(isinstance(found, pa.Table) for found in good.values()) >= cache.WORTH:
            counts = {known: len(found) if isinstance(found, pa.Table) else found[1] for known, found in good.items()}
            cache.save(file_of_cache, counts, _joined(parts, table))
        return parts, bad


def _each(
    files: Sequence[Place], spans: Mapping[cache.Stamp, tuple[int, int]], read: Callable[[Place], pa.Table]
) -> Iterator[tuple[Place, cache.Stamp | None, Any]]:
    """Yield each file in order, what it is known by, and its rows: where they are in the cache, read anew, or why not.

    A bucket answers a request in some tens of milliseconds, whatever its size, so several are under way at a time.
    """

    def one(file: Place) -> tuple[Place, cache.Stamp | None, Any]:
        try:
            known = cache.stamp(file)
            return file, known, spans[known] if known in spans else read(file)
        except (pa.ArrowException, OSError, ValueError) as error:
            return file, None, error

    if not files or isinstance(files[0], Path):
        yield from map(one, files)
        return
    with ThreadPoolExecutor(_REQUESTS) as threads:
        yield from threads.map(one, files)


def _rows_of(file: Place, table: str, expected: pa.Schema) -> pa.Table:
    """Return the rows of one file.

    Raises:
        ValueError: It is not one of this table.
    """
    rows = pq.ParquetFile(pa.BufferReader(file.read_bytes())).read(use_threads=False)
    rows = _with_added(rows, expected)
    own = rows.schema
    wrong = [field.name for field in expected if field not in own]
    if wrong:
        raise ValueError(f"not a file of {table}: it lacks the column {wrong[0]}, or has it in another type")
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


def _joined(parts: Sequence[pa.Table], table: str) -> pa.Table:
    if not parts:
        return schema(table).empty_table()
    return parts[0] if len(parts) == 1 else pa.concat_tables(parts, promote_options="permissive")


def _with_added(rows: pa.Table, expected: pa.Schema) -> pa.Table:
    """Return a file's rows with the columns that its version did not have yet."""
    lacking = set(ADDED).difference(rows.column_names)
    for field in expected:
        if field.name in lacking:
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows


def _frame(rows: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = rows.to_pandas()
    return frame


def _first_of_each(rows: pa.Table, keys: Sequence[str]) -> pa.Table:
    numbered = rows.select(list(keys)).append_column("row", pa.array(np.arange(len(rows))))
    first = numbered.group_by(list(keys), use_threads=False).aggregate([("row", "min")])["row_min"]
    return rows.take(first)


def _first_curves(files: Sequence[pa.Table]) -> list[pa.Table]:
    """Return the rows of files of `spectra`, less those of curves that an earlier file has."""
    kept, seen = [], set[str]()
    for rows in files:
        epochs = rows["epoch"].cast(pa.string()).fill_null("")
        names = [rows[name].fill_null("") for name in ("model_id", "trial_id", "kind", "settings")]
        key = pc.binary_join_element_wise(*names, epochs, "/")
        new = set(pc.unique(key).to_pylist()) - seen
        kept.append(rows.filter(pc.is_in(key, value_set=pa.array(sorted(new), pa.string()))))
        seen |= new
    return kept


def _committed(rows: pa.Table, models: pa.Table) -> pa.Table:
    """Return the rows whose model and trial are together in `models`."""
    codes = []
    for name in ("model_id", "trial_id"):
        distinct = pc.unique(models[name])
        codes.append([pc.index_in(of[name], value_set=distinct).cast(pa.int64()) for of in (models, rows)])
    (model, own_model), (trial, own_trial) = codes
    pairs = pc.add(pc.multiply(model, len(models)), trial)
    counts = pc.is_in(pc.add(pc.multiply(own_model, len(models)), own_trial), value_set=pc.drop_null(pairs))
    return rows if pc.all(counts).as_py() in (True, None) else rows.filter(counts)


def now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)
