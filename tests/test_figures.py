"""Tables of benchmarks: what is printed is kept, and what is kept is on the page, cell by cell."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from rich.table import Table

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HEADS = ["who", "taken, s", "ratio", "taken, s", "a | b"]
ROWS = [["ours", "1.50", "1.0", "2.50", "x"], ["a|b, [K, d]", "3.00", "2.0", "", "y | z"]]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Return `benchmarks/_figures.py` as a module that keeps its rows in a folder of the test's own."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("_figures")
    monkeypatch.setattr(module, "FOLDER", tmp_path / "figures")
    return module


def table_of(title: str, rows: Sequence[Sequence[str]], heads: Sequence[str] = HEADS) -> Table:
    """Return a table as a benchmark makes it."""
    table = Table(*heads, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def tables_of(page: str) -> dict[str, list[list[str]]]:
    """Return the tables of a Markdown page by their titles, read as GitHub does: a bar after a backslash is text."""
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in page.splitlines():
        if line.startswith("**"):
            title = line.strip("*")
        if line.startswith("|"):
            cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.setdefault(title, []).append(cells)
    return found


def ruled(heads: list[str], rows: list[list[str]]) -> list[list[str]]:
    return [heads, ["---"] * len(heads), *rows]


def test_a_table_comes_back_cell_by_cell(figures: ModuleType) -> None:
    figures.show(table_of("ours against others", ROWS), "some", ["pandas"], about="n = 3")
    assert tables_of(figures.page()) == {"ours against others": ruled(HEADS, ROWS)}
    kept = pd.read_parquet(figures.FOLDER / "some.parquet")
    assert list(kept.columns) == figures.COLUMNS
    assert len(kept) == len(HEADS) * len(ROWS)


def test_a_page_says_what_a_table_was_found_on(
    figures: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_commit", lambda: "abc1234-dirty")
    figures.show(table_of("a title", ROWS), "some", ["pandas"], threads=2, about="n = 3")
    printed, page = " ".join(capsys.readouterr().out.split()), figures.page()
    assert "## `benchmarks/some.py`" in page
    for said in (f"pandas {pd.__version__}", "2 threads", "n = 3", "commit abc1234-dirty"):
        assert said in printed
        assert said in page
    assert all(cell in printed for cell in ("a title", "3.00", "ratio"))


def test_a_table_found_again_replaces_its_own_and_no_other(figures: ModuleType) -> None:
    first, other, again = [["ours", "1"]], [["ours", "2"]], [["ours", "3"], ["theirs", "4"]]
    for title, rows in (("a", first), ("b", other), ("a", again)):
        figures.show(table_of(title, rows, ["who", "s"]), "some", [])
    figures.show(table_of("a", first, ["who", "s"]), "another", [])
    files = figures.page().split("## ")
    assert tables_of(files[1]) == {"a": ruled(["who", "s"], first)}
    assert tables_of(files[2]) == {"a": ruled(["who", "s"], again), "b": ruled(["who", "s"], other)}


@pytest.mark.parametrize("change", [{"threads": 2}, {"threads": None}, {"device": "some GPU"}])
def test_what_another_machine_found_stays(figures: ModuleType, change: dict[str, object]) -> None:
    first, other = [["ours", "1"]], [["ours", "2"]]
    figures.show(table_of("a", first, ["who", "s"]), "some", [])
    figures.show(table_of("a", other, ["who", "s"]), "some", [], **change)
    assert tables_of(figures.page())["a"] == [*ruled(["who", "s"], first), *ruled(["who", "s"], other)]
    figures.show(table_of("a", other, ["who", "s"]), "some", [])
    assert tables_of(figures.page())["a"] == 2 * ruled(["who", "s"], other)


def test_no_figures_are_an_empty_page(figures: ModuleType) -> None:
    assert figures.page().startswith("# Figures")
    assert not tables_of(figures.page())


@pytest.fixture
def commit(figures: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], str]:
    """Return what writes a file of a repository with some figures in it, and then says which commit that is."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for file in ("code.py", "benchmarks/figures/some.parquet", "docs/figures.md"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("before")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(figures, "ROOT", tmp_path)

    def write(file: str) -> str:
        (tmp_path / file).write_text("after")
        found: str = figures._commit()
        return found

    return write


def test_only_changed_figures_leave_a_commit_as_it_is(commit: Callable[[str], str]) -> None:
    clean = commit("benchmarks/figures/some.parquet")
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    assert commit("docs/figures.md") == clean
    assert commit("code.py") == f"{clean}-dirty"
