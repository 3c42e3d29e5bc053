"""How long a query takes on 3,000 models and a million rows of epochs, the start of the program included.

    python benchmarks/query.py [--models 3000] [--epochs 333] [--models-per-trial 24]

The first query of a table reads all of its files and keeps what it read; the next ones read that (docs/tables.md).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _figures import show
from rich.table import Table

from flatmin import plugins
from flatmin.results import Results
from flatmin.tables import schema

QUERIES = {
    "models": "SELECT lr, count(*), avg(gen_gap) FROM models GROUP BY lr",
    "wide": "SELECT lr, avg(m3), corr(m3, gen_gap) FROM wide GROUP BY lr",
    "epochs": "SELECT epoch, avg(train_loss), avg(test_acc) FROM epochs GROUP BY epoch ORDER BY epoch",
    "join": "SELECT m.lr, min(e.test_loss) FROM epochs e JOIN models m USING (model_id) GROUP BY m.lr",
}
MEASURES = 25


def fill(path: Path, models: int, epochs: int, stack: int) -> None:
    """Write results of random numbers."""
    results = Results.create(path, "benchmark")
    names = {"dataset": "digits", "network": "mlp", "optimizer": "sgd"}
    arguments = plugins.program_arguments(names)
    numbers = np.random.default_rng(0)
    for first in range(0, models, stack):
        trial = f"{first:016x}"
        ids = [f"{number:016x}" for number in range(first, min(first + stack, models))]
        row = {"trial_id": trial, "study": "benchmark", "status": "finished", "epochs_run": epochs, **names}
        rows = [{**row, "model_id": model, "gen_gap": numbers.random(), "lr": 0.1 * (first % 5)} for model in ids]
        results.write("models", trial, rows, arguments)
        row = {"trial_id": trial, "epoch": epochs, "settings": "{}"}
        measured = [
            {**row, "model_id": model, "measure": f"m{number}", "label": f"m{number}", "value": numbers.random()}
            for model in ids
            for number in range(MEASURES)
        ]
        results.write("sharpness", trial, measured)
        count = len(ids) * epochs
        columns = {
            field.name: pa.array(numbers.random(count)) if field.type == pa.float64() else None
            for field in schema("epochs")
        }
        columns |= {"model_id": pa.array(np.repeat(ids, epochs)), "trial_id": pa.array([trial] * count)}
        columns |= {"epoch": pa.array(np.tile(np.arange(1, epochs + 1), len(ids)))}
        results.table_file("epochs", trial).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns, schema=schema("epochs")), results.table_file("epochs", trial))


def seconds(path: Path, sql: str) -> tuple[float, float]:
    """Return how long the command takes, and how much of a core: other work on the machine changes the first alone."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-m", "flatmin.orchestrator", "query", "--results", str(path), sql]
    subprocess.run(line, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=333)
    parser.add_argument("--models-per-trial", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results"
        fill(path, options.models, options.epochs, options.models_per_trial)
        size = f"{options.models:,} models, {options.models * options.epochs:,} rows of epochs"
        title = f"Queries of {size}, {options.models_per_trial} models to a trial: the first, and the best of five more"
        table = Table("query", "first, s", "of a core, s", "best of more, s", "of a core, s", title=title)
        for name, sql in QUERIES.items():
            first, *others = [seconds(path, sql) for _ in range(6)]
            best = min(others)
            table.add_row(name, *(f"{taken:.2f}" for taken in (*first, *best)))
    show(table, "query", ("duckdb", "pyarrow", "flatmin-sweep"), threads=None)


if __name__ == "__main__":
    main()
