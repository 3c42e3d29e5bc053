"""Reading a table of models from a file, a directory of files or a bucket."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from flatmin.bucket import BucketPath
from flatmin.errors import RequestError, nearest

_SEPARATORS: Mapping[str, str] = {";": "semicolons", "\t": "tabs", ",": "commas"}


def read_table(path: str | Path) -> pd.DataFrame:
    """Read one table, a row per model, from a CSV, TSV or Parquet file.

    Args:
        path: A file that ends in `.csv`, `.tsv` or `.parquet`, or a directory of Parquet files; or the URI of either
            in a bucket.

    Returns:
        The table as stored: no column is renamed, no row is left out.

    Raises:
        RequestError: The file is missing, of another kind, unreadable, or has no rows.
    """
    if "://" in str(path):
        return _read_from_bucket(BucketPath.parse(str(path)))
    path = Path(path)
    if not path.exists():
        beside = [str(other) for other in _beside(path)]
        raise RequestError(f"{path}: no such file.{nearest(str(path), beside) if beside else ''}")
    reader = _read_folder if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise RequestError(
            f"{path}: cannot read {path.suffix or 'a file without ending'}. Valid: {', '.join(_READERS)}."
        )
    try:
        frame = reader(path)
    except RequestError:
        raise
    except Exception as problem:  # the parsers raise errors of several libraries, all of which mean "not a table"
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise RequestError(f"{path}: not a readable {path.suffix or 'Parquet'} table ({reason}).") from problem
    if frame.empty:
        raise RequestError(f"{path}: the table has no rows.")
    return frame


def _read_text(path: Path, *, separator: str) -> pd.DataFrame:
    frame = pd.read_csv(path, sep=separator)
    (first, *more) = (str(column) for column in frame.columns)
    other = max(_SEPARATORS, key=first.count)
    if not more and other in first:
        words = {",": ".csv", "\t": ".tsv"}
        mend = f"call it {words[other]}" if other in words else f"write {_SEPARATORS[separator]}"
        raise RequestError(f"{path}: its columns seem to be parted by {_SEPARATORS[other]}; {mend}.")
    return frame


def _read_folder(path: Path) -> pd.DataFrame:
    from pyarrow import dataset

    files = [str(file) for file in sorted(path.rglob("*.parquet"))]
    if not files:
        raise RequestError(f"{path}: there is no Parquet file in this directory.")
    found = dataset.dataset(files, format="parquet", partitioning="hive", partition_base_dir=str(path))
    frame: pd.DataFrame = found.to_table().to_pandas()
    return frame


_READERS: Mapping[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda path: _read_text(path, separator=","),
    ".tsv": lambda path: _read_text(path, separator="\t"),
    ".parquet": pd.read_parquet,
}


def _read_from_bucket(there: BucketPath) -> pd.DataFrame:
    there.reach()
    files = [there] if there.is_file() else sorted(there.glob("*.parquet"))
    if not files:
        raise RequestError(f"{there}: no such file.")
    with tempfile.TemporaryDirectory(prefix="flatmin-") as folder:
        for file in files:
            (Path(folder) / file.name).write_bytes(file.read_bytes())
        return read_table(Path(folder) / there.name if there.is_file() else folder)


def _beside(path: Path) -> list[Path]:
    """The tables that lie where `path` was looked for."""
    return [other for other in path.parent.glob("*") if other.suffix.lower() in _READERS]
