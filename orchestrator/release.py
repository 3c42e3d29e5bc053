"""A study's results as one archive for a paper's supplement: `export` packs it, `import` reads it back.

    README.md              what it is and how to read it, without this package too
    manifest.json          study, format, what the results' own header and lease say, versions
    columns.csv            every column: type, unit, meaning
    study.yaml             the resolved study, which `launch` takes
    tables/<table>.parquet the rows that count, one file per table
    checkpoints/           weights, where they are asked for
    SHA256SUMS             of every other file, for `sha256sum -c`

Nothing in it is compressed but the columns of the Parquet files themselves, and no time but the results' own is in it:
the same results give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from flatmin import lease
from flatmin.bucket import BucketPath, Place, local_copy
from flatmin.errors import RequestError, ResultsError
from flatmin.files import place, write_atomically
from flatmin.orchestrator.columns import as_table, dictionary
from flatmin.orchestrator.inspect import opened
from flatmin.results import Results
from flatmin.settings import digest
from flatmin.tables import SCHEMA_VERSION, TABLES, schema

FORMAT = 1
"""Counts up when an archive's layout changes."""

SUMS, MANIFEST = "SHA256SUMS", "manifest.json"
_TABLE_FILES = {f"tables/{table}.parquet": table for table in TABLES}
_TEXTS = ("README.md", MANIFEST, "columns.csv", "study.yaml")
_WEIGHTS = re.compile(r"checkpoints/([0-9A-Za-z_-]+)\.safetensors")
_IDENTITY = r"^[0-9A-Za-z_-]+$"
"""What a trial's and a model's name must look like before it may name a file."""

_SUM = re.compile(r"([0-9a-f]{64})  (.+)")
_CHUNK = 1 << 20
_CHANGED = 0x01 | 0x20 | 0x40
"""Flags of a file in an archive: encrypted, a patch, strongly encrypted."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time that every packed file carries: the earliest that an archive can hold."""

_README = """\
# {study}

{about}
{source}
Results of flatmin-sweep {version}: {models} trained models of {planned} planned.

- `tables/*.parquet`: the rows. `plan`: planned models; `models`: trained models with settings and scores; `epochs`;
  `sharpness`: a row per model and measure; `spectra`: curves; `failures`. Tables are joined by `model_id`.
- `columns.csv`: every column with its type, unit and meaning. Accuracies are fractions, losses nats, seconds
  wall-clock; undefined is null.
- `study.yaml`: the study as run. `manifest.json`: versions of what it was run with. The columns `host`, `execution` and
  `traceback` name the machines it was run on.
- {weights}
- `sha256sum -c SHA256SUMS` says whether a file is damaged.

With pandas: `pandas.read_parquet("tables/models.parquet")`.
In SQL: `duckdb -c "SELECT * FROM 'tables/models.parquet'"`.
With flatmin-sweep: `flatmin-sweep import FILE.zip --results DIR`, and then query, correlate, report or go on with it.
"""


def export(results: Results | str | Place, path: str | Path, *, weights: bool = False) -> Path:
    """Pack a results directory into one archive; return its path.

    Args:
        results: A results directory.
        path: The zip file to write.
        weights: Pack the weights too.

    Raises:
        RequestError: There is no such directory, the file is there already or cannot be written, or weights that are
            asked for are missing.
    """
    results, path = opened(results), Path(path)
    if path.exists():
        raise RequestError(f"'{path}' is there already; export to another file, or remove it")
    members = _members(results, weights=weights)
    try:
        write_atomically(path, lambda there: _pack(there, members))
    except OSError as error:
        raise RequestError(f"'{path}' cannot be written: {error.strerror or error}") from None
    return path


def _members(results: Results, *, weights: bool) -> dict[str, bytes | Place]:
    """Return what an archive holds, by name; files that may be large as paths."""
    tables = {table: results.table(table) for table in TABLES}
    manifest = _manifest(results, tables, weights=weights)
    columns = pa.BufferOutputStream()
    pyarrow.csv.write_csv(as_table(dictionary(results)), columns)
    members: dict[str, bytes | Place] = {
        "README.md": _readme(results, tables, manifest).encode(),
        MANIFEST: (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode(),
        "columns.csv": columns.getvalue().to_pybytes(),
        **{name: _parquet(tables[table]) for name, table in _TABLE_FILES.items()},
    }
    if results.study_file.is_file():
        members["study.yaml"] = results.study_file.read_bytes()
    if weights:
        for trial_id in sorted(set(tables["models"]["trial_id"].to_pylist())):
            file = results.weights_file(trial_id)
            if not file.is_file():
                raise ResultsError(f"'{file}' is missing: launch the study again, or export without weights")
            members[f"checkpoints/{file.name}"] = file
    return members


def _manifest(results: Results, tables: Mapping[str, pa.Table], *, weights: bool) -> dict[str, Any]:
    held = lease.read(results)
    runs: dict[str, int] = {}
    for text in tables["models"]["execution"].to_pylist():
        execution = json.loads(text or "{}")
        run = json.dumps({name: execution.get(name) for name in ("versions", "commit")}, sort_keys=True)
        runs[run] = runs.get(run, 0) + 1
    return {
        "format": FORMAT,
        "flatmin-sweep": metadata.version("flatmin-sweep"),
        "results": results.check_schema(),
        "weights": weights,
        "rows": {table: len(rows) for table, rows in tables.items()},
        "trained_with": [{**json.loads(run), "models": runs[run]} for run in sorted(runs)],
        # what `status` tells of the newest launch, without who ran it
        "lease": held and {**held, "token": "", "host": "", "pid": 0, "released": True},
    }


def _readme(results: Results, tables: Mapping[str, pa.Table], manifest: Mapping[str, Any]) -> str:
    import yaml

    try:
        study = yaml.safe_load(results.study_file.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        study = {}
    source = study.get("source", "")
    kept = "`checkpoints/*.safetensors`: the weights, a file per trial, tensors `<model_id>/<name>`."
    return _README.format(
        study=manifest["results"]["study"],
        about=study.get("about", ""),
        source=f"\nSource: {source}\n" if source else "",
        version=manifest["flatmin-sweep"],
        models=len(tables["models"]),
        planned=len(tables["plan"]),
        weights=kept if manifest["weights"] else "The weights are not in it.",
    )


def _parquet(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows.combine_chunks(), sink, compression="zstd")
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _pack(archive_file: Path, members: Mapping[str, bytes | Place]) -> None:
    sums = {}
    with zipfile.ZipFile(archive_file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(members.items()):
            found = hashlib.sha256()
            with archive.open(_info(name), "w", force_zip64=True) as packed:
                for chunk in [content] if isinstance(content, bytes) else _chunks_of(content):
                    found.update(chunk)
                    packed.write(chunk)
            sums[name] = found.hexdigest()
        archive.writestr(_info(SUMS), "".join(f"{value}  {name}\n" for name, value in sums.items()))


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system, info.external_attr = 3, 0o644 << 16
    return info


def _chunks_of(file: Place) -> Iterator[bytes]:
    with local_copy(file) as copy, copy.open("rb") as opened_file:
        yield from _chunks(opened_file)


def _chunks(source: IO[bytes]) -> Iterator[bytes]:
    while chunk := source.read(_CHUNK):
        yield chunk


def import_study(path: str | Path, results: str | Path) -> Results:
    """Make a results directory of an archive that `export` wrote; return it.

    Every file is checked against its SHA-256 first. Where weights are left out, `launch` trains again the models that a
    new measure needs.

    Args:
        path: The archive.
        results: The results directory to make.

    Raises:
        RequestError: There is no such archive, the directory holds something, or a file in the archive is missing,
            damaged, compressed or does not belong there; it is named.
    """
    path, target = Path(path), place(results)
    if isinstance(target, BucketPath):
        raise RequestError(f"'{results}': an archive is unpacked into a directory; copy that to the bucket")
    if not path.is_file():
        raise RequestError(f"there is no archive '{path}'")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ResultsError(f"'{results}' is there already; import into another --results directory")
    staging = target.with_name(f".{target.name}.import.tmp")
    try:
        staging.mkdir(parents=True)
    except FileExistsError:
        raise ResultsError(f"'{staging}' is there: another import is running, or was killed; remove it") from None
    except OSError as error:
        raise ResultsError(f"'{results}' cannot be written: {error.strerror or error}") from None
    try:
        _unpack(path, Results(staging))
        staging.replace(target)
    except (zipfile.BadZipFile, EOFError) as error:
        raise RequestError(f"'{path}' is damaged, or not a zip archive: {error}") from None
    except OSError as error:
        raise ResultsError(f"'{results}' cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Results.open(target)


@dataclass(frozen=True)
class _Archive:
    """An archive whose every file has been checked."""

    path: Path
    archive: zipfile.ZipFile

    def wrong(self, name: str, what: str) -> RequestError:
        return RequestError(f"'{self.path}': '{name}' {what}")

    def read(self, name: str) -> bytes:
        return self.archive.read(name)

    def check(self) -> list[str]:
        """Return the names of its files.

        Raises:
            RequestError: One is missing, damaged or does not belong there.
        """
        names = self._check_names()
        listed = [_SUM.fullmatch(line) for line in self.read(SUMS).decode("utf-8", "replace").splitlines()]
        if None in listed:
            raise self.wrong(SUMS, "is damaged")
        sums = {line[2]: line[1] for line in listed if line}
        for name in [*_TABLE_FILES, MANIFEST, *sums]:
            if name not in names:
                raise self.wrong(name, "is missing from it")
        for name in names:
            if name != SUMS and name not in sums:
                raise self.wrong(name, f"is not in {SUMS}")
            try:
                with self.archive.open(name) as packed:
                    found = hashlib.sha256()
                    for chunk in _chunks(packed):
                        found.update(chunk)
            except (zipfile.BadZipFile, EOFError):
                raise self.wrong(name, "is damaged") from None
            if name != SUMS and found.hexdigest() != sums[name]:
                raise self.wrong(name, f"is damaged: its SHA-256 is not that in {SUMS}")
        return names

    def _check_names(self) -> list[str]:
        names: list[str] = []
        for info in self.archive.infolist():
            name = info.filename
            if name not in (*_TEXTS, SUMS, *_TABLE_FILES) and not _WEIGHTS.fullmatch(name):
                raise self.wrong(name, "does not belong in an exported study")
            if name in names:
                raise self.wrong(name, "is in it twice")
            stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
            if not stored or info.flag_bits & _CHANGED:
                raise self.wrong(name, "is compressed or encrypted; an exported study's files are neither")
            names.append(name)
        if sum(info.file_size for info in self.archive.infolist()) > self.path.stat().st_size:
            raise RequestError(f"'{self.path}': its files overlap; an exported study's do not")
        if SUMS not in names:
            raise self.wrong(SUMS, "is missing from it")
        return names

    def manifest(self) -> dict[str, Any]:
        """Return what the archive says of itself.

        Raises:
            RequestError: It says it in a way that this version cannot read.
        """
        try:
            found: dict[str, Any] = json.loads(self.read(MANIFEST))
            versions = (int(found["format"]), int(found["results"]["schema"]))
            str(found["results"]["study"]), found["lease"], found["weights"]
        except (ValueError, KeyError, TypeError) as error:
            raise self.wrong(MANIFEST, f"cannot be read ({type(error).__name__}: {error})") from None
        if versions != (FORMAT, SCHEMA_VERSION):
            raise self.wrong(
                MANIFEST,
                f"has format {versions[0]}, schema {versions[1]}; this version reads {FORMAT} and {SCHEMA_VERSION}: "
                f"use flatmin-sweep {found.get('flatmin-sweep', 'of that time')}",
            )
        return found

    def rows(self, table: str) -> pa.Table:
        """Return a table's rows.

        Raises:
            RequestError: They are no rows of that table.
        """
        name = f"tables/{table}.parquet"
        try:
            rows = pq.ParquetFile(pa.BufferReader(self.read(name))).read()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self.wrong(name, f"is not a table: {error}") from None
        own = rows.schema
        for column in schema(table):
            if column not in own:
                raise self.wrong(name, f"lacks the column {column.name}, or has it in another type")
        for column in {"model_id", "trial_id"} & set(own.names):
            good = pc.match_substring_regex(rows[column], _IDENTITY)
            if not pc.all(pc.fill_null(good, False), min_count=0).as_py():
                raise self.wrong(name, f"has a {column} that is no name")
        return rows


def _zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except NotImplementedError as error:  # a file's version, of which the directory alone tells
        raise zipfile.BadZipFile(str(error)) from None


def _unpack(path: Path, results: Results) -> None:
    with _zip(path) as opened_archive:
        archive = _Archive(path, opened_archive)
        names = archive.check()
        manifest = archive.manifest()
        header = manifest["results"] if manifest["weights"] else {**manifest["results"], "weights": False}
        results.header_file.write_text(json.dumps(header, indent=2))
        if manifest["lease"]:
            results.lease_file.write_text(json.dumps(manifest["lease"], indent=2))
        if "study.yaml" in names:
            results.study_file.write_bytes(archive.read("study.yaml"))
        for table in TABLES:
            rows = archive.rows(table)
            (results.path / table).mkdir()
            for file, part in _files(table, rows):
                pq.write_table(part, results.table_file(table, file))
        (results.path / "checkpoints").mkdir()
        for name in names:
            weights = _WEIGHTS.fullmatch(name)
            if weights:
                place_of = results.directory / "checkpoints" / Path(name).name
                with opened_archive.open(name) as packed, place_of.open("wb") as file_there:
                    shutil.copyfileobj(packed, file_there, _CHUNK)


def _files(table: str, rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Yield the files that a table's rows are kept in, as a launch would have written them: name and rows."""
    if not len(rows):
        return
    if table == "plan":
        yield digest(rows["model_id"].to_pylist()), rows
        return
    keys = rows["trial_id"]
    if table == "failures":
        keys = pc.binary_join_element_wise(keys, rows["attempt"].cast(pa.string()), "-")
    encoded = keys.combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes))
    rows = rows.take(pa.array(order))
    for name, start, end in zip(encoded.dictionary.to_pylist(), [0, *ends[:-1]], ends, strict=True):
        yield name, rows.slice(start, end - start)
