"""Results: the one place that knows what lies where in a results directory or bucket, and that writes it.

    plan/, models/, epochs/, sharpness/, spectra/, failures/    Parquet, one file per trial (or plan, or attempt)
    checkpoints/<trial_id>.safetensors                          weights of a committed trial
    checkpoints/<trial_id>-a.state, -b.state                    a trial under way
    logs/<trial_id>.log, logs/ray.log                           what workers and Tune have said
    study.yaml, results.json, lease.json                        the resolved study, the schema, the owner
    merged.json                                                 which merged files count (flatmin.merged)
    cache/                                                      what was read before; may be deleted (flatmin.cache)

A file is written under a temporary name and renamed; an object of a bucket is whole from the start (`flatmin.bucket`).
`models/` is written last: that is the commit, and a row elsewhere counts only if its (model_id, trial_id) is there.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flatmin import merged, scan
from flatmin.bucket import BucketPath, Place
from flatmin.errors import CorruptFileWarning, ResultsError
from flatmin.files import is_temporary, place, plain_name, write_atomically
from flatmin.settings import Argument
from flatmin.tables import LOST, SCHEMA_VERSION, TABLES, arrow_batches, schema

if TYPE_CHECKING:  # it takes longer to import than a query to answer
    import pandas as pd


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
        sink, columns = pa.BufferOutputStream(), schema(table, arguments)
        with pq.ParquetWriter(sink, columns) as writer:
            for batch in arrow_batches(rows, columns):
                writer.write_table(batch)
        write_atomically(self.table_file(table, name), sink.getvalue().to_pybytes())

    def holds(self, table: str, name: str) -> bool:
        """Whether a table has a file of that name, of its own or merged with others."""
        return scan.holds(self.path, table, name)

    def attempts(self, trial_id: str) -> tuple[int, int]:
        """Return how often a trial has failed, and how often its process was lost after it had got on."""
        both, lost = (sum(1 for _ in (self.path / "failures").glob(f"{trial_id}-{x}*.parquet")) for x in ("", LOST))
        return both - lost, lost

    def read(self, table: str) -> pa.Table:
        """Return every readable row of a table, committed or not, unreadable files left out with a warning.

        Of a curve that lies in several files of `spectra`, the first file's points are taken: points of two would mix.
        """
        parts, bad = scan.scan(self.path, table)
        for file, error in bad:
            warnings.warn(f"{file} cannot be read and is left out: {error}", CorruptFileWarning, stacklevel=3)
        return scan.joined(_first_curves(parts) if table == "spectra" else parts, table)

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

    def unreadable(self) -> list[tuple[str, Place, Exception]]:
        """Return the table and path of every file that cannot be read, and why; what was read and is as then, can."""
        return [(table, file, error) for table in TABLES for file, error in scan.scan(self.path, table)[1]]

    def remove(self, file: Place) -> None:
        """Remove a file if it is there."""
        file.unlink(missing_ok=True)

    def clear_temporary(self) -> None:
        """Remove what interrupted writes have left; in a bucket they leave nothing."""
        if isinstance(self.path, BucketPath):
            return
        for file in self.path.rglob("*"):
            if is_temporary(file) and not file.name.startswith(f".{merged.NAME}"):  # somebody may be merging
                file.unlink(missing_ok=True)


def _frame(rows: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = rows.to_pandas()
    return frame


def _first_of_each(rows: pa.Table, keys: Sequence[str]) -> pa.Table:
    numbered = rows.select(list(keys)).append_column("row", pa.array(np.arange(len(rows))))
    first = numbered.group_by(list(keys), use_threads=False).aggregate([("row", "min")])["row_min"]
    return rows.take(np.sort(first.to_numpy()))  # groups come in an order of their own


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
