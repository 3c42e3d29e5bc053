"""Looking at results: counts for `status`, SQL for `query`."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from flatmin import lease
from flatmin.bucket import Place
from flatmin.errors import RequestError, nearest
from flatmin.results import Results
from flatmin.tables import TABLES

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Status:
    """Counts of a study's models, from its tables.

    Attributes:
        planned: Models planned.
        converged, finished, diverged: Models trained, by how they ended.
        failed: Models that are planned, not there, and whose attempts are used up.
        remaining: Models that are planned and neither there nor failed.
        models_per_minute: Rate of the newest launch, or None before its first model.
        eta_seconds: Time the remaining models take at that rate; 0 when none remain, None without a rate.
    """

    planned: int
    converged: int
    finished: int
    diverged: int
    failed: int
    remaining: int
    models_per_minute: float | None
    eta_seconds: float | None

    def to_json(self) -> dict[str, int | float | None]:
        """Return the counts as plain data."""
        return asdict(self)


def opened(results: Results | str | Place) -> Results:
    """Return a results directory that was given as itself or as a path."""
    return Results.open(results.path if isinstance(results, Results) else results)


def status(results: Results | str | Place) -> Status:
    """Count a study's models.

    Raises:
        ResultsError: There is no such results directory.
    """
    results = opened(results)
    planned = set(results.table("plan")["model_id"].to_pylist())
    models = results.table("models").select(["model_id", "status", "started_at"]).to_pylist()
    by_status = dict.fromkeys(("converged", "finished", "diverged"), 0)
    for row in models:
        by_status[row["status"]] += 1
    missing = planned - {row["model_id"] for row in models}
    held = lease.read(results)
    started = datetime.fromisoformat(held["started_at"]) if held else None
    # a launch tries afresh what failed in those before it
    since = started if held and lease.fresh(held) else None
    failed = missing & _used_up(results, held["max_failures"] if held else 0, since)
    rate = None
    if held and started:
        until = datetime.fromtimestamp(held["heartbeat"], UTC)
        new = sum(row["started_at"] >= started for row in models)
        minutes = (until - started).total_seconds() / 60
        rate = new / minutes if new and minutes > 0 else None
    remaining = len(missing) - len(failed)
    eta = 0.0 if not remaining else remaining / rate * 60 if rate else None
    return Status(
        len(planned),
        **by_status,
        failed=len(failed),
        remaining=remaining,
        models_per_minute=rate,
        eta_seconds=eta,
    )


def _used_up(results: Results, max_failures: int, since: datetime | None) -> set[str]:
    failures = results.table("failures")
    if since:
        failures = failures.filter(pc.greater_equal(failures["at"], pa.scalar(since, failures["at"].type)))
    counts = failures.filter(pc.greater(failures["attempt"], 0)).group_by("model_id").aggregate([("attempt", "count")])
    worn = counts.filter(pc.greater(counts["attempt_count"], max_failures))
    return set(worn["model_id"].to_pylist())


READS = ("SELECT", "EXPLAIN", "MULTI")
"""The statements that a query may be, as DuckDB names them: `MULTI` is a PIVOT; DESCRIBE and SUMMARIZE are a SELECT."""

VIEWS = ("wide", "published")


def query(results: Results | str | Place, sql: str) -> pd.DataFrame:
    """Run SQL over a study's tables and the views `wide` and `published`.

    Args:
        results: A results directory.
        sql: One statement that reads. It sees the tables, and neither files nor the network.

    Raises:
        RequestError: There is no such directory, or the SQL is wrong or would write; the message points at the place.
    """
    frame: pd.DataFrame = rows_of(results, sql).to_pandas()
    return frame


def rows_of(results: Results | str | Place, sql: str) -> pa.Table:
    """Run SQL as `query` does; return an Arrow table, what is undefined null.

    Raises:
        RequestError: As for `query`.
    """
    results = opened(results)
    with duckdb.connect() as connection:
        try:
            statement = _statement(connection, sql)
            for name in mentioned(sql):
                connection.register(name, relation(results, name))
            connection.execute("SET enable_external_access = false")
            connection.execute("SET python_enable_replacements = false")
            connection.execute("SET lock_configuration = true")
            return _plain(_run(connection, statement))
        except duckdb.Error as error:
            raise RequestError(_explained(str(error), results)) from None


def relation(results: Results, name: str) -> pa.Table:
    """Return a table or view; `models` without rows yet still has the columns of the plan's settings."""
    if name == "published":
        from flatmin.orchestrator.beside import published_beside

        return pa.Table.from_pandas(published_beside(results), preserve_index=False)
    if name == "wide":
        return results.wide_table()
    rows = results.table(name)
    if name == "models" and not len(rows):
        rows = pa.unify_schemas([rows.schema, results.table("plan").schema]).empty_table()
    return rows


def _statement(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    """Return the one statement of a text, if it reads."""
    statements = connection.extract_statements(sql)
    if not statements:
        raise RequestError("the query is empty; write SQL, such as SELECT * FROM wide")
    if len(statements) > 1:
        raise RequestError(f"the query has {len(statements)} statements; write one")
    (statement,) = statements
    if statement.type.name not in READS:
        raise RequestError(
            f"{sql.split()[0].upper()}: a query only reads; write SELECT, EXPLAIN, DESCRIBE, SUMMARIZE or PIVOT"
        )
    return str(statement.query)


def _run(connection: duckdb.DuckDBPyConnection, statement: str) -> pa.Table:
    try:
        return connection.sql(statement).to_arrow_table()
    except duckdb.Error:
        connection.execute(statement)  # raises the same error, with the place in the text
        raise


def mentioned(sql: str) -> list[str]:
    """Return the tables and views that a query may be about: those whose names are in it, all where none is.

    Args:
        sql: One statement.
    """
    words = set(re.findall(r"\w+", sql.lower()))
    return [name for name in (*TABLES, *VIEWS) if name in words] or [*TABLES, *VIEWS]


def _plain(rows: pa.Table) -> pa.Table:
    """Return rows with a name per column, sums of whole numbers whole, decimals as floats, and only finite numbers."""
    names: list[str] = []
    for name in rows.column_names:  # `SELECT a.epoch, b.epoch` has two columns of one name
        names.append(name if name not in names else f"{name}_{rows.column_names[: len(names)].count(name)}")
    rows = rows.rename_columns(names)
    for place, column in enumerate(rows.schema):
        values = rows.column(place)
        if pa.types.is_decimal(column.type):
            fits = column.type.scale == 0 and not pc.any(pc.greater(pc.abs(values.cast(pa.float64())), 2.0**62)).as_py()
            values = values.cast(pa.int64() if fits else pa.float64())
        if pa.types.is_floating(values.type):
            values = pc.if_else(pc.is_finite(values), values, pa.scalar(None, values.type))
        if values is not rows.column(place):
            rows = rows.set_column(place, column.name, values)
    return rows


def _explained(message: str, results: Results) -> str:
    """Return DuckDB's message with the place it marks, and the nearest column or table, or all tables."""
    first, *rest = message.strip().splitlines()
    place = [line for number, line in enumerate(rest) if line.startswith("LINE ") or "^" in line]
    given = re.search(r'column "([^"]+)" not found|column named "([^"]+)"|Table with name (\S+) does not exist', first)
    hint = ""
    if given and given[3]:
        hint = nearest(given[3], (*TABLES, *VIEWS))
    elif given:
        from flatmin.orchestrator.columns import names_in

        names = {name for table in (*TABLES, *VIEWS) for name in names_in(results, table)}
        hint = nearest(given[1] or given[2], names)
    elif "disabled" in first or "locked" in first:
        hint = "; a query reads the tables, and neither files nor the network"
    if " Valid:" in hint:  # the line below has them
        hint = ""
    tables = f"Tables: {', '.join(TABLES)}, and the views {', '.join(VIEWS)}; query --schema lists their columns."
    return "\n".join([first + hint, *place, tables])
