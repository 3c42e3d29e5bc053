"""Writing the rows of a query: a table to look at, CSV, JSON or Parquet."""

from __future__ import annotations

import csv
import json
import sys
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from flatmin.errors import RequestError
from flatmin.orchestrator.terminal import Format, print_table

MOST_SHOWN = 1000
"""A table to look at has no more rows than this; the other formats have all."""

_BATCH = 10_000


def write(rows: pa.Table, output_format: Format) -> None:
    """Write rows to the standard output.

    Args:
        rows: Any table.
        output_format: `table`, the first `MOST_SHOWN` rows; `csv`, null empty and lists as JSON; `json`, a list with an
            object per line; `parquet`.

    Raises:
        RequestError: Parquet, which is binary, would go to a terminal.
    """
    if output_format == "table":
        print_table(
            rows.column_names, zip(*(column.to_pylist() for column in rows.slice(0, MOST_SHOWN).columns), strict=True)
        )
        if len(rows) > MOST_SHOWN:
            print(f"the first {MOST_SHOWN} of {len(rows)} rows; --format csv writes all", file=sys.stderr)
    elif output_format == "csv":
        _csv(rows)
    elif output_format == "json":
        _json(rows)
    elif sys.stdout.isatty():
        raise RequestError("--format parquet writes bytes, not text: send them to a file with > rows.parquet")
    else:
        pq.write_table(rows, sys.stdout.buffer)


def _csv(rows: pa.Table) -> None:
    csv.writer(sys.stdout, lineterminator="\n").writerow(rows.column_names)
    sys.stdout.flush()
    for place, column in enumerate(rows.schema):
        if pa.types.is_nested(column.type) or pa.types.is_duration(column.type) or pa.types.is_interval(column.type):
            texts = [None if value is None else _text(value) for value in rows.column(place).to_pylist()]
            rows = rows.set_column(place, column.name, pa.array(texts, pa.string()))
    texts = [column for column in rows.columns if pa.types.is_string(column.type)]
    plain = not any(pc.any(pc.match_substring_regex(column, r'[",\r\n]')).as_py() for column in texts)
    # "needed" quotes every text; "none" refuses those that need it
    options = pyarrow.csv.WriteOptions(include_header=False, quoting_style="none" if plain else "needed")
    pyarrow.csv.write_csv(rows, sys.stdout.buffer, options)


def _json(rows: pa.Table) -> None:
    between = "["
    for batch in rows.to_batches(max_chunksize=_BATCH):
        for row in batch.to_pylist():
            print(between, _text(row), sep="\n", end="")
            between = ","
    print("[]" if between == "[" else "\n]")


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_of_another_type)


def _of_another_type(value: Any) -> str:
    return str(value.isoformat() if hasattr(value, "isoformat") else value)
