"""Queries: what they read, what they refuse, what they write, and the dictionary of columns."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from tests.orchestrator.conftest import Command, fill

from flatmin import Results, plugins
from flatmin.analysis import frames
from flatmin.errors import RequestError
from flatmin.orchestrator.columns import WITH_SETTINGS, dictionary, markdown
from flatmin.orchestrator.formats import MOST_SHOWN
from flatmin.orchestrator.inspect import VIEWS, query, rows_of
from flatmin.tables import COLUMNS, TABLES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return fill(tmp_path_factory.mktemp("query") / "r")


@pytest.fixture
def command(flatmin_sweep: Command) -> Command:
    """Return a function that runs `flatmin-sweep query` in this process."""
    return partial(flatmin_sweep, "query")


WRITING = {
    "INSERT INTO models SELECT * FROM models": "only reads",
    "UPDATE models SET lr = 1": "only reads",
    "DELETE FROM models": "only reads",
    "CREATE TABLE mine AS SELECT 1": "only reads",
    "CREATE TEMP VIEW mine AS SELECT 1": "only reads",
    "DROP VIEW models": "only reads",
    "COPY models TO 'FILE'": "only reads",
    "EXPORT DATABASE 'FILE'": "only reads",
    "ATTACH 'FILE'": "only reads",
    "PRAGMA database_list": "only reads",
    "SET enable_external_access = true": "only reads",
    "INSTALL httpfs": "only reads",
    "LOAD httpfs": "only reads",
    "CALL pragma_version()": "only reads",
    "BEGIN": "only reads",
    "EXPLAIN ANALYZE COPY models TO 'FILE'": "neither files nor the network",
    "SELECT * FROM read_csv('/etc/passwd')": "neither files nor the network",
    "SELECT * FROM read_text('/etc/passwd')": "neither files nor the network",
    "SELECT * FROM glob('/etc/*')": "neither files nor the network",
    "SELECT * FROM read_parquet('https://example.org/x.parquet')": "neither files nor the network",
    "SELECT * FROM '/etc/passwd'": "does not exist",
    "SELECT * FROM ROOT": "does not exist",
    "SELECT 1; DROP VIEW models": "2 statements; write one",
}


@pytest.mark.parametrize("sql", WRITING)
def test_a_query_only_reads_and_sees_nothing_but_the_tables(sql: str, results: Results, tmp_path: Path) -> None:
    before = sorted(results.directory.rglob("*"))
    with pytest.raises(RequestError, match=WRITING[sql]):
        query(results, sql.replace("FILE", str(tmp_path / "written")))
    assert not list(tmp_path.iterdir())
    assert sorted(results.directory.rglob("*")) == before


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("WITH w AS (SELECT * FROM wide) SELECT count(*) FROM w", [(6,)]),
        ("FROM models SELECT DISTINCT width ORDER BY width;", [(8,), (16,), (24,)]),
        ("PIVOT (SELECT width, lr FROM models) ON width USING count(lr)", [(2, 2, 2)]),
        ("SELECT table_name FROM information_schema.tables ORDER BY ALL LIMIT 2", [("epochs",), ("failures",)]),
        ("SELECT sum(width), sum(lr), 0.0 / 0, max(milestones) FROM Models", [(96, pytest.approx(1.2), None, [2, 3])]),
    ],
)
def test_what_a_query_may_be(sql: str, rows: list[tuple[object, ...]], results: Results) -> None:
    assert [tuple(row.values()) for row in rows_of(results, sql).to_pylist()] == rows


def test_whole_numbers_stay_whole_and_columns_of_one_name_apart(results: Results) -> None:
    frame = query(
        results, "SELECT sum(m.width), sum(1.5), m.epochs_run, e.epochs_run FROM models m, models e GROUP BY ALL"
    )
    assert [str(kind) for kind in frame.dtypes] == ["int64", "float64", "int64", "int64"]
    assert list(frame.columns)[2:] == ["epochs_run", "epochs_run_1"]


def test_times_are_read_without_a_warning(results: Results) -> None:
    frame = query(results, "SELECT * FROM models")
    assert set(frame["started_at"]) == {pd.Timestamp("2026-01-02 03:04:05", tz="UTC")}


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        (
            "SELECT lr,\n  widht FROM models",
            "Binder Error: Referenced column \"widht\" not found in FROM clause! Did you mean 'width'?\n"
            "LINE 2:   widht FROM models\n"
            "          ^^^^^\n",
        ),
        (
            "SELECT * FROM modles",
            "Catalog Error: Table with name modles does not exist! Did you mean 'models'?\n"
            "LINE 1: SELECT * FROM modles\n"
            "                      ^^^^^^\n",
        ),
        (
            "SELECT l2_nrom FROM wide",
            "Did you mean 'l2_norm'?\nLINE 1: SELECT l2_nrom FROM wide\n               ^^^^^^^\n",
        ),
        ("SELECT lr FROM models WHERE dataset = 1 AND", "LINE 1: "),
        ("SELECT lr + FROM models", 'syntax error at or near "FROM"\nLINE 1: SELECT lr + FROM models\n'),
    ],
)
def test_an_error_points_at_its_place(sql: str, said: str, results: Results, command: Command) -> None:
    done = command("--results", str(results.path), sql)
    assert done.returncode == 2
    assert done.stdout == b""
    text = done.stderr
    assert said in text
    assert "^" in text
    assert "Traceback" not in text
    assert "Tables: plan, models, epochs, sharpness, spectra, failures, and the views wide, published" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["SELECT 1"], "--results DIR is missing"),
        (["--results", "R"], "give either SQL"),
        (["--results", "R", "--schema", "SELECT 1"], "give either SQL"),
        (["--results", "R", " ; "], "the query is empty"),
        (
            ["--results", "R", "SELECT 1", "--format", "excel"],
            "'excel' is not one of 'table', 'csv', 'json', 'parquet'",
        ),
        (["--results", "nowhere", "SELECT 1"], "there is no results directory 'nowhere'"),
    ],
)
def test_wrong_requests(arguments: list[str], said: str, results: Results, command: Command) -> None:
    done = command(*(str(results.path) if word == "R" else word for word in arguments))
    assert done.returncode == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


SQL = (
    "SELECT width, lr, started_at, milestones, 'a, \"b\"' AS text, CAST(NULL AS BIGINT) AS nothing, width = 8 AS small "
    "FROM models ORDER BY model_id"
)


def test_csv(results: Results, command: Command) -> None:
    done = command("--results", str(results.path), SQL, "--format", "csv")
    header, *rows = csv.reader(StringIO(done.stdout.decode()))
    assert header == ["width", "lr", "started_at", "milestones", "text", "nothing", "small"]
    assert rows[0][:2] + rows[0][3:] == ["8", "0.1", "[2, 3]", 'a, "b"', "", "true"]
    assert pd.Timestamp(rows[0][2]) == pd.Timestamp("2026-01-02 03:04:05", tz="UTC")
    assert rows[4][1] == repr(0.1 * 3)  # every digit


def test_json(results: Results, command: Command) -> None:
    rows = json.loads(command("--results", str(results.path), SQL, "--format", "json").stdout)
    first = {"width": 8, "lr": 0.1, "started_at": "2026-01-02T03:04:05+00:00", "milestones": [2, 3], "text": 'a, "b"'}
    assert rows[0] == {**first, "nothing": None, "small": True}
    assert rows[4]["lr"] == 0.1 * 3
    assert json.loads(command("--results", str(results.path), "FROM failures", "--format", "json").stdout) == []


def test_parquet(results: Results, command: Command) -> None:
    done = command("--results", str(results.path), SQL, "--format", "parquet")
    rows = pq.read_table(BytesIO(done.stdout))
    assert [str(kind) for kind in rows.schema.types[:2]] == ["int64", "double"]
    assert rows["milestones"].to_pylist()[0] == [2, 3]


@pytest.mark.parametrize("output_format", ["csv", "json", "parquet"])
def test_a_pipe_that_is_closed_early_is_no_error(output_format: str, results: Results) -> None:
    """`query ... | head -1` of more than a pipe holds."""
    sql = "SELECT range AS number, 'some text that fills a pipe' AS text FROM range(200000)"
    line = [sys.executable, "-m", "flatmin.orchestrator", "query", "--results", str(results.path), sql]
    with subprocess.Popen(
        [*line, "--format", output_format], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.stdout.close()
        said = process.stderr.read().decode()
    assert "Traceback" not in said
    assert "BrokenPipe" not in said


def test_a_table_of_a_million_rows(results: Results, command: Command) -> None:
    sql = "SELECT range AS number FROM range(1000000)"
    done = command("--results", str(results.path), sql)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1 + MOST_SHOWN
    assert f"the first {MOST_SHOWN} of 1000000 rows; --format csv writes all" in done.stderr
    done = command("--results", str(results.path), sql, "--format", "csv")
    assert len(done.stdout.splitlines()) == 1 + 1_000_000


def test_empty_results(tmp_path: Path, command: Command) -> None:
    empty = Results.create(tmp_path / "r", "made-up")
    for name in TABLES:
        assert query(empty, f"SELECT * FROM {name}").empty
    assert query(empty, "SELECT * FROM wide").empty
    assert empty.wide().empty
    for output_format, expected in {"csv": b"model_id\n", "json": b"[]\n", "table": b"model_id\n"}.items():
        done = command("--results", str(empty.path), "SELECT model_id FROM wide", "--format", output_format)
        assert (done.returncode, done.stdout) == (0, expected)


def test_wide_is_the_models_joined_to_the_measures_at_their_end(results: Results) -> None:
    frame = results.wide()
    expected = frames.wide(results.models(), results.sharpness())
    assert list(frame.columns) == list(expected.columns)
    pd.testing.assert_frame_equal(frame, expected, check_dtype=False)
    assert frame["lpf(sigma=0.1)"].tolist() == [4.0, 4.0, 5.0, 5.0, 6.0, 6.0]
    assert frame["l2_norm"].isna().tolist() == [False, True] * 3
    assert query(results, "SELECT * FROM wide")["width"].dtype == "int64"


class TestDictionary:
    def test_the_page_is_what_the_declarations_say(self) -> None:
        """After a change: `python -m flatmin.orchestrator.columns > docs/columns.md`."""
        assert (ROOT / "docs" / "columns.md").read_text(encoding="utf-8") == markdown()

    def test_every_column_there_is_has_a_meaning_and_the_type_that_sql_sees(self, results: Results) -> None:
        entries = dictionary(results)
        silent = [entry for entry in entries if not entry.about]
        assert silent == []
        for name in (*TABLES, "wide"):
            seen = query(results, f"DESCRIBE {name}")
            of_table = [(entry.column, entry.type) for entry in entries if entry.table == name]
            assert of_table == list(zip(seen["column_name"], seen["column_type"], strict=True))

    def test_the_columns_of_published_are_declared(self, results: Results) -> None:
        declared = [entry.column for entry in dictionary() if entry.table == "published"]
        assert declared == list(query(results, "SELECT * FROM published LIMIT 1").columns)

    def test_all_that_there_can_be_includes_every_setting_and_measure(self) -> None:
        kinds = ("network", "dataset", "optimizer", "training")
        settings = {name for kind in kinds for of in plugins.listing(kind).values() for name in of.arguments}
        entries = {(entry.table, entry.column): entry for entry in dictionary()}
        for table in WITH_SETTINGS:
            assert {("dataset"), *settings} <= {column for of, column in entries if of == table}
        assert set(plugins.listing("measure")) <= {column for table, column in entries if table == "wide"}
        rho = plugins.get("optimizer", "sam").arguments["rho"].setting
        assert (entries["models", "rho"].unit, entries["models", "rho"].about) == (rho.unit, rho.about)

    def test_every_column_says_what_it_is_once(self) -> None:
        for table in TABLES:
            names = [column.name for column in COLUMNS[table]]
            assert len(set(names)) == len(names)
            assert all(column.about for column in COLUMNS[table])

    def test_the_command_prints_it(self, results: Results, command: Command) -> None:
        done = command("--schema", "--results", str(results.path), "--format", "json")
        rows = json.loads(done.stdout)
        assert [set(row) for row in rows[:1]] == [{"table", "column", "type", "unit", "about"}]
        assert {row["table"] for row in rows} == {*TABLES, *VIEWS}
        label = next(row for row in rows if row["column"] == "lpf(sigma=0.1)")
        assert "Gaussian noise in the weights" in label["about"]
        assert command("--schema", "--format", "csv").stdout.startswith(b'"table"') is False


def test_a_query_loads_no_torch(results: Results) -> None:
    code = (
        "import sys; sys.argv = ['x', 'query', '--results', sys.argv[1], 'SELECT lr FROM wide', '--format', 'csv']\n"
        "from flatmin.orchestrator.cli import main\n"
        "try: main()\n"
        "except SystemExit: print({'torch', 'ray', 'scipy'} & set(sys.modules))"
    )
    line = [sys.executable, "-c", code, str(results.path)]
    out = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("set()")
