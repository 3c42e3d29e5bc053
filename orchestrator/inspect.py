"""Looking at results: counts for `status`, SQL for `query`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from flatmin import lease
from flatmin.errors import RequestError, nearest
from flatmin.results import Results
from flatmin.tables import TABLES


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


def opened(results: Results | str | Path) -> Results:
    """Return a results directory that was given as itself or as a path."""
    return Results.open(results.path if isinstance(results, Results) else results)


def status(results: Results | str | Path) -> Status:
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
    failed = missing & _used_up(results, held["max_failures"] if held else 0)
    rate = None
    if held:
        started = datetime.fromisoformat(held["started_at"])
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


def _used_up(results: Results, max_failures: int) -> set[str]:
    failures = results.table("failures")
    counts = failures.group_by("model_id").aggregate([("attempt", "max")])
    worn = counts.filter(pc.greater(counts["attempt_max"], max_failures))
    return set(worn["model_id"].to_pylist())


def query(results: Results | str | Path, sql: str) -> pd.DataFrame:
    """Run SQL over a study's tables and the views `wide` and `published`.

    Raises:
        RequestError: There is no such directory, or the SQL is wrong; the tables and views there are, are named.
    """
    results = opened(results)
    connection = duckdb.connect()
    try:
        connection.execute("SET enable_external_access = false")
        for name in TABLES:
            connection.register(name, _with_settings(results, name))
        connection.register("wide", wide(results))
        connection.register("published", published())
        if not duckdb.extract_statements(sql):
            raise RequestError("the query is empty; write SQL, such as SELECT * FROM wide")
        frame: pd.DataFrame = connection.execute(sql).df()
        return frame
    except duckdb.Error as error:
        message = str(error).strip().splitlines()[0]
        raise RequestError(
            f"{message}\nTables: {', '.join(TABLES)}, and the views wide, published.{_columns_hint(results, message)}"
        ) from None
    finally:
        connection.close()


def published() -> pa.Table:
    """Return the published numbers of all studies, whatever the results are of."""
    from flatmin.analysis.published import published as numbers

    return pa.Table.from_pandas(numbers(), preserve_index=False)


def _with_settings(results: Results, name: str) -> pa.Table:
    """Return a table; one of models that has no rows yet still has the columns of the plan's settings."""
    rows = results.table(name)
    if name == "models" and not len(rows):
        rows = pa.unify_schemas([rows.schema, results.table("plan").schema]).empty_table()
    return rows


def _columns_hint(results: Results, message: str) -> str:
    if 'column "' not in message:
        return ""
    given = message.split('column "')[1].split('"')[0]
    names = {name for table in TABLES for name in results.table(table).column_names}
    hint = nearest(given, names)
    return hint if "Did you mean" in hint and given not in names else ""


def wide(results: Results) -> pa.Table:
    """Return models joined to one column per measure label, at the model's last epoch."""
    from flatmin.analysis.frames import wide as join

    models = results.models()
    if models.empty:
        return _with_settings(results, "models")
    return pa.Table.from_pandas(join(models, results.sharpness()), preserve_index=False)
