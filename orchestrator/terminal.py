"""What the commands of the command line share: arguments, options, tables on the terminal."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from flatmin.errors import RequestError

StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="A built-in study's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SETTING=VALUE[,VALUE]]...", help="Settings; several values make an axis."),
]
ResultsOption = Annotated[str, typer.Option("--results", help="The results directory.")]
Format = Literal["table", "csv", "json", "parquet"]
"""How rows are written."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StackOption = Annotated[
    str | None,
    typer.Option("--models-per-trial", help="The largest stack: a number, auto, or balanced over what runs at a time."),
]
ConcurrencyOption = Annotated[
    int | None,
    typer.Option("--concurrency", min=1, help="Trials at a time; as many as this machine holds unless given."),
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(metavar="SETTING=VALUE[,VALUE]", help="Only models with these values; several --only must all hold."),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Over a million models are meant.")]
SmallOption = Annotated[bool, typer.Option("--small", help="Take the study's small twin: minutes, and no download.")]


class WithSettings(TyperCommand):
    """A command whose help ends with every setting, read from the plug-ins' signatures."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the settings below the options."""
        from flatmin.reference import plain

        formatter.write(f"\n{plain()}\n")


_TIMES = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(option: str, text: str) -> float:
    """Return a time given as `90s`, `30m`, `2h` or a number of seconds.

    Raises:
        RequestError: It is none of these.

    >>> seconds_of("--time-budget", "1.5m")
    90.0
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([smhd]?)\s*", text)
    if match is None:
        raise RequestError(f"{option} {text}: not a time; write 90s, 30m, 2h or 1d")
    return float(match.group(1)) * _TIMES[match.group(2) or "s"]


def count(option: str, text: str | None) -> int | Literal["auto"] | None:
    """Return a number from 1 on, or `auto`; None where nothing is given.

    Raises:
        RequestError: It is neither.
    """
    if text is None or text == "auto":
        return None if text is None else "auto"
    if not text.isdigit() or int(text) < 1:
        raise RequestError(f"{option} {text}: should be a number from 1 on, or auto")
    return int(text)


def stack_size(text: str | None) -> int | Literal["auto", "balanced"] | None:
    """Return what --models-per-trial says; None where it is not given.

    Raises:
        RequestError: It says nothing that can be.
    """
    if text == "balanced":
        return "balanced"
    try:
        return count("--models-per-trial", text)
    except RequestError as error:
        raise RequestError(f"{error}, or balanced") from None


def at_most(yes: bool) -> int | None:
    """Return how many models a study may have: any number where that is meant."""
    from flatmin.orchestrator.grid import MOST_MODELS

    return None if yes else MOST_MODELS


def short(value: Any) -> str:
    """Return a value as a cell of a table."""
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table; without a header where all its names are empty."""
    table = Table(*header, show_header=any(header), box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            *(
                "" if value is None or (isinstance(value, float) and math.isnan(value)) else escape(str(value))
                for value in row
            )
        )
    # A pipe has no width of its own: whole cells are worth more there than lines of 80 characters.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)
