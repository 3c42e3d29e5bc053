"""Commands about results: what is there, and what it says."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click
import typer

from flatmin.errors import RequestError
from flatmin.orchestrator.terminal import Format, JsonOption, ResultsOption, print_table, seconds_of

if TYPE_CHECKING:
    from flatmin.orchestrator.inspect import Status


def status(
    results: ResultsOption,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until nothing remains; Ctrl-C ends it.")] = False,
    every: Annotated[str, typer.Option(help="Time between two looks of --watch: 5s, 1m.")] = "5s",
) -> None:
    """Count a study's models: planned, trained, failed, remaining; rate and time left."""
    from flatmin.orchestrator.inspect import status as count
    from flatmin.results import Results

    opened = Results.open(results)
    if not watch:
        _print_status(count(opened), as_json=as_json)
        return
    pause = max(0.1, seconds_of("--every", every))
    while True:
        found = count(opened)
        if sys.stdout.isatty():
            click.clear()
        _print_status(found, as_json=as_json)
        if found.planned and not found.remaining:  # a launch that has just begun has yet to write its plan
            return
        time.sleep(pause)


def _print_status(found: Status, *, as_json: bool) -> None:
    from flatmin.orchestrator.progress import duration

    if as_json:
        print(json.dumps(found.to_json(), indent=2), flush=True)
        return
    shown: dict[str, object] = dict(found.to_json())
    shown["models_per_minute"] = "" if found.models_per_minute is None else f"{found.models_per_minute:.1f}"
    shown["eta_seconds"] = "" if found.eta_seconds is None else duration(found.eta_seconds)
    print_table(["", ""], [[name.replace("_seconds", ""), value] for name, value in shown.items()])


def compact(results: ResultsOption, as_json: JsonOption = False) -> None:
    """Merge the small files of trials into few large ones; a launch may go on meanwhile."""
    from dataclasses import asdict

    from flatmin.compact import compact as merge
    from flatmin.results import Results

    done = merge(Results.open(results))
    if as_json:
        print(json.dumps([asdict(table) for table in done], indent=2))
    else:
        print_table(["table", "files before", "files after"], [[one.table, one.before, one.after] for one in done])


def replay(
    model_id: Annotated[str, typer.Argument(metavar="MODEL_ID", help="A model's id, or the beginning of it.")],
    results: ResultsOption,
    as_json: JsonOption = False,
) -> None:
    """Train one model again, alone, in this process, and compare it with its row; nothing is written."""
    from flatmin.orchestrator.replay import replay as again

    found = again(results, model_id)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    rows = []
    for name, value in found.stored.items():
        cells = (value, found.replayed.get(name), found.difference(name))
        rows.append([name, *(f"{cell:.8g}" if isinstance(cell, float) else cell for cell in cells)])
    print_table(["", "stored", "replayed", "difference"], rows)
    said = "the same to the last bit" if found.identical else "not the same to the last bit"
    print(f"model {found.model_id}, trained in a stack of {found.stack_size}, replayed alone: {said}")


def query(
    sql: Annotated[
        str | None, typer.Argument(metavar="SQL", help="A query over the tables and the views wide and published.")
    ] = None,
    results: Annotated[str | None, typer.Option("--results", help="The results directory.")] = None,
    output_format: Annotated[Format, typer.Option("--format")] = "table",
    with_schema: Annotated[
        bool, typer.Option("--schema", help="Print what every column is, of --results or of all there can be.")
    ] = False,
) -> None:
    """Ask the tables a question in SQL (DuckDB); a query only reads."""
    from flatmin.orchestrator.formats import write
    from flatmin.results import Results

    if with_schema == (sql is not None):
        raise RequestError("query: give either SQL, such as 'SELECT * FROM wide', or --schema")
    if with_schema:
        from flatmin.orchestrator.columns import as_table, dictionary

        write(as_table(dictionary(None if results is None else Results.open(results))), output_format)
        return
    if results is None:
        raise RequestError("query: --results DIR is missing: which tables?")
    from flatmin.orchestrator.inspect import mentioned, rows_of

    with contextlib.nullcontext() if "published" in mentioned(str(sql)) else _without_pandas():
        write(rows_of(results, str(sql)), output_format)


@contextlib.contextmanager
def _without_pandas() -> Iterator[None]:
    """Hide pandas from pyarrow and DuckDB, which import it if they find it: that takes longer than an answer."""
    finder = _NoPandas()
    if "pandas" in sys.modules:
        yield
        return
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _NoPandas(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)


def export(
    results: ResultsOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The zip file to write; with --to, the folder.")],
    weights: Annotated[bool, typer.Option("--weights", help="Pack the weights too.")] = False,
    viewer: Annotated[
        Literal["tensorboard", "mlflow", "wandb"] | None,
        typer.Option("--to", help="Write another viewer's files instead of an archive."),
    ] = None,
) -> None:
    """Pack rows, study, versions, column dictionary and checksums for a paper's supplement."""
    from flatmin.orchestrator.exporters import export_to
    from flatmin.orchestrator.release import export as pack

    if viewer is None:
        print(pack(results, output, weights=weights))
    elif weights:
        raise RequestError(f"export: --weights goes into an archive, not into the files of {viewer}; leave one out")
    else:
        print(export_to(viewer, results, output))


def import_(
    archive: Annotated[Path, typer.Argument(metavar="FILE.zip", help="What export wrote.")], results: ResultsOption
) -> None:
    """Make a results directory of an exported study, every file checked."""
    from flatmin.orchestrator.release import import_study

    print(import_study(archive, results).path)


def correlate(
    table: Annotated[
        str, typer.Argument(metavar="TABLE_OR_RESULTS", help="A CSV, TSV or Parquet file, or a results directory.")
    ],
    target: Annotated[str, typer.Option(help="What the measures should predict.")] = "gen_gap",
    axes: Annotated[str | None, typer.Option(help="Settings that tell configurations apart.")] = None,
    measures: Annotated[str | None, typer.Option(help="Columns or labels to correlate.")] = None,
    seed_column: Annotated[str, typer.Option(help="The column that tells runs of a configuration apart.")] = "seed",
    row_filter: Annotated[str | None, typer.Option("--filter", help="Models that count: 'train_loss <= 0.01'.")] = None,
    test_examples: Annotated[
        int | None, typer.Option(help="Test examples behind the target: the sign error leaves out chance.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Correlate measures with a target, over any table of models: docs/statistics.md."""
    from flatmin.labels import split_list
    from flatmin.orchestrator.correlate import correlate_table, print_correlations

    found = correlate_table(
        table,
        target=target,
        axes=None if axes is None else split_list(axes),
        measures=None if measures is None else split_list(measures),
        seed_column=seed_column,
        filter=row_filter,
        test_examples=test_examples,
    )
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
    else:
        print_correlations(found)


def report(
    results: ResultsOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    live: Annotated[bool, typer.Option("--live", help="Write it anew while models come; the page follows.")] = False,
    every: Annotated[str, typer.Option(help="With --live: the time between two looks: 10s, 5m.")] = "10s",
) -> None:
    """Write one self-contained interactive page that opens without a network."""
    from flatmin.orchestrator.report import follow, write_report

    if live:
        try:
            follow(results, output, every=seconds_of("--every", every), tell=lambda line: print(line, file=sys.stderr))
        except KeyboardInterrupt:
            print(f"stopped; {output} is as of the last rows", file=sys.stderr)
            raise typer.Exit(130) from None
    else:
        write_report(results, output)
    print(output)
