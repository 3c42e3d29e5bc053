"""The one display of a launch: models finished, rate, time left, failures; log lines when not a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from flatmin.trial import Job

LOG_SECONDS = 30.0
"""Time between two log lines when the output is not a terminal."""


class Display:
    """Shows how a launch goes, on the standard error.

    Args:
        console: Where to draw.
        total: Models of the plan.
        done: Models that were there before.
        clock: Seconds that only go up.
    """

    def __init__(self, console: Console, total: int, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.total, self.before, self.clock = console, total, done, clock
        self.ended: dict[str, int] = {}
        """Models that have ended, of the trials under way."""
        self.finished_models = 0
        self.failed_attempts = 0
        self.started = self.logged = clock()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]models"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("models", total=total, completed=done, note="")

    def __enter__(self) -> Display:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._bar.stop()

    @property
    def done(self) -> int:
        """Models that have ended, those of earlier launches among them."""
        return self.before + self.new

    @property
    def new(self) -> int:
        """Models that have ended in this launch."""
        return self.finished_models + sum(self.ended.values())

    def note(self) -> str:
        """Return rate, time left and failures as one phrase."""
        minutes = max(self.clock() - self.started, 1e-9) / 60
        parts = []
        if self.new:
            rate = self.new / minutes
            parts.append(f"{rate:.1f} models/min, ETA {duration((self.total - self.done) / rate * 60)}")
        if self.failed_attempts:
            parts.append(f"{self.failed_attempts} failed attempts")
        return ", ".join(parts)

    def advanced(self, job: Job, ended: int) -> None:
        """Take note that `ended` models of a job have ended so far."""
        if not job.trial.committed_as:
            self.ended[job.trial.trial_id] = ended
        self._show()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.done, note=self.note())
        if not self.console.is_terminal and self.clock() - self.logged >= LOG_SECONDS:
            self.logged = self.clock()
            said = [f"{self.done} of {self.total} models", self.note()]
            self.console.print(", ".join(filter(None, said)), highlight=False)

    def finished(self, job: Job) -> None:
        """Take note that a job is committed."""
        if not job.trial.committed_as:
            self.ended.pop(job.trial.trial_id, None)
            self.finished_models += len(job.trial.models)
        self._show()

    def failed(self, job: Job, error: str, *, final: bool) -> None:
        """Take note that an attempt failed."""
        self.failed_attempts += 1
        self.ended.pop(job.trial.trial_id, None)
        fate = "gives up" if final else "will be tried again"
        names = f"trial {job.trial.trial_id} ({len(job.trial.models)} models)"
        self.said(f"{names} {fate}: {error}")

    def said(self, text: str) -> None:
        """Pass a sentence on to the user."""
        self.console.print(text, style="yellow", markup=False, highlight=False)


_DAY = 24 * 3600
_YEAR = 365.25 * _DAY


def duration(seconds: float) -> str:
    """Return a time as a person says it.

    >>> duration(42), duration(150), duration(7300), duration(200_000), duration(3.3e9)
    ('42 s', '2 min 30 s', '2 h 1 min', '2 days 7 h', '105 years')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 2 * _DAY:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole < 2 * _YEAR:
        return f"{whole // _DAY} days {whole % _DAY // 3600} h"
    return f"{whole / _YEAR:.0f} years"
