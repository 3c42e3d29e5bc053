"""`report` on a results directory, once or for as long as a study runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from flatmin.analysis.report import report, settle, waiting
from flatmin.bucket import Place
from flatmin.errors import RequestError
from flatmin.orchestrator.beside import as_published
from flatmin.orchestrator.inspect import Status, status
from flatmin.results import Results
from flatmin.tables import TABLES


def write_report(results: str | Place, path: str | Path, *, refresh: float | None = None) -> Path:
    """Write the report of a results directory as one HTML file; return its path.

    Args:
        results: A results directory.
        path: The file.
        refresh: Seconds after which the page loads itself again; None: never.

    Raises:
        RequestError: The directory cannot be used, or holds no trained model.
    """
    opened = Results.open(results)
    study = _study(opened)
    counts = status(opened)
    models = opened.models()
    return report(
        study=study,
        models=models,
        epochs=opened.epochs(),
        sharpness=opened.sharpness(),
        spectra=opened.spectra(),
        path=path,
        target="gen_gap" if models["gen_gap"].notna().any() else "loss_gap",  # a regression has no accuracy
        planned=counts.planned,
        failed=counts.failed,
        plan=opened.plan(),
        failures=opened.failures(),
        recipes=as_published(str(study.get("study", ""))),
        refresh=refresh,
    )


def follow(
    results: str | Place,
    path: str | Path,
    *,
    every: float,
    tell: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Write the report anew whenever rows have come, until no model remains; return its path.

    However it ends, the page is left as one that does not load itself again.

    Args:
        results: A results directory; it may be empty as yet.
        path: The file.
        every: Seconds between two looks, and at least as long as the last report took to write.
        tell: Takes a line whenever a report is written.
        sleep: Waits so many seconds.

    Raises:
        RequestError: The directory or the file cannot be used, or `every` is no time.
    """
    if every <= 0:
        raise RequestError(f"--every: {every:g} seconds are no time to wait; give more, such as 10s")
    path = Path(path)
    known: object = None
    try:
        while True:
            opened = Results.open(results)
            counts = status(opened)
            trained = counts.converged + counts.finished + counts.diverged
            took = time.monotonic()
            if not counts.remaining and trained:
                write_report(results, path)
                tell(_progress(counts, trained))
                return path
            if known != (known := _files(opened)):
                if trained:
                    write_report(results, path, refresh=every)
                else:
                    waiting(study=_study(opened), path=path, refresh=every)
                tell(_progress(counts, trained))
            sleep(max(every, time.monotonic() - took))
    finally:
        settle(path)


def _files(results: Results) -> object:
    """What changes when rows come: the names and sizes of the tables' files."""
    return {file: file.stat().st_size for table in TABLES for file in (results.path / table).glob("*.parquet")}


def _progress(counts: Status, trained: int) -> str:
    failed = f", {counts.failed} failed" if counts.failed else ""
    return f"{trained} of {counts.planned} models{failed}"


def _study(results: Results) -> Mapping[str, Any]:
    """The resolved study; without it the title and the source go missing, the numbers do not, and launch writes it."""
    try:
        return yaml.safe_load(results.study_file.read_text()) or {}
    except (OSError, yaml.YAMLError):
        return {}
