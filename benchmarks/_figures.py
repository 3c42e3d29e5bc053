"""What benchmarks found: a table on the terminal, and the same as rows of `figures/BENCHMARK.parquet`.

Rows are cells of tables as text, for tables differ: `benchmark`, `table` (its title), `row`, `column`, `text`, and what
they were found with: `taken_at`, `commit`, `machine`, `versions`. A table found again replaces the one of its title and
machine. `python benchmarks/_figures.py` writes the page that shows them all.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "figures"
PAGE = ROOT / "docs" / "figures.md"
COLUMNS = ["benchmark", "table", "row", "column", "text", "taken_at", "commit", "machine", "versions"]


def show(
    table: Table, benchmark: str, packages: Sequence[str], *, device: str = "", threads: int | None = 1, about: str = ""
) -> None:
    """Print a table with what it was found on, and keep it.

    Args:
        table: The table; its title tells it from others of the benchmark.
        benchmark: The name of the benchmark's file.
        packages: What was compared or rests on: their versions are told.
        device: A device other than the CPU.
        threads: Of the CPU, in each process; None where libraries take what they find.
        about: What a reader has to know of this run: repetitions, sizes.
    """
    versions = ", ".join(["Python " + platform.python_version(), *(f"{p} {metadata.version(p)}" for p in packages)])
    machine, commit = _machine(device, threads), _commit()
    Console(width=200).print(table)
    print(". ".join(filter(None, [f"{machine}; {versions}; commit {commit}", about])))
    title = str(table.title or "")
    found = pd.DataFrame(list(_cells(table)), columns=["row", "column", "text"]).assign(
        benchmark=benchmark,
        table=title,
        taken_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        commit=commit,
        machine=machine,
        versions=f"{versions}. {about}" if about else versions,
    )
    file = FOLDER / f"{benchmark}.parquet"
    before = pd.read_parquet(file) if file.exists() else pd.DataFrame(columns=COLUMNS)
    same = (before["table"] == title) & (before["machine"] == machine)
    file.parent.mkdir(exist_ok=True)
    pd.concat([before[~same], found[COLUMNS]]).to_parquet(file, index=False)


def _cells(table: Table) -> Iterator[tuple[int, str, str]]:
    for column in table.columns:
        for row, cell in enumerate(column.cells):
            yield row, str(column.header), str(cell)


def _machine(device: str, threads: int | None) -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on = device or ("threads as libraries choose" if threads is None else f"{threads} thread{'s' * (threads > 1)}")
    return f"{platform.machine()} {platform.system()}, {cores} cores, {on}"


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    # figures change with every table, and are no reason to call what they were found with changed
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/figures", ":!docs/figures.md"
    )
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


def page() -> str:
    """Return the page of all that is kept, as Markdown."""
    parts = [
        "# Figures\n\nWhat the files of `benchmarks/` found, each where it last ran on a machine; written by "
        "`make figures`. What they mean is in [speed.md](speed.md) and [benchmarks.md](benchmarks.md)."
    ]
    for file in sorted(FOLDER.glob("*.parquet")):
        parts.append(f"## `benchmarks/{file.stem}.py`")
        for (title, _), cells in pd.read_parquet(file).groupby(["table", "machine"], sort=False):
            first = cells.iloc[0]
            parts += [f"**{title}**"] if title else []
            parts.append(_as_markdown(cells))
            parts.append(f"{first['machine']}; commit {first['commit']}, {first['taken_at']} UTC; {first['versions']}.")
    return "\n\n".join(parts) + "\n"


def _as_markdown(cells: pd.DataFrame) -> str:
    # columns of one name are told apart by their place
    columns = [own["text"] for _, own in cells.groupby((cells["row"] == 0).cumsum())]
    heads = cells.loc[cells["row"] == 0, "column"]
    rows = [heads, ["---"] * len(heads), *zip(*columns, strict=True)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page())
