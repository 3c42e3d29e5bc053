"""How long a resume looks at results before its first trial: made-up results, and a fresh process that looks."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from safetensors.numpy import save_file

from flatmin.compact import compact
from flatmin.orchestrator.plan import Plan, make_plan
from flatmin.orchestrator.planned import write_plan
from flatmin.orchestrator.study import read_study
from flatmin.results import Results
from flatmin.tables import schema

STUDY = """\
study: finished
settings: {dataset: digits, network: mlp, optimizer: sgd, lr: 0.05, batch_size: 250, epochs: 10, width: 2}
measures: [l2_norm]
seeds: 2
"""

LOOK = """
import json, sys, time
from rich.console import Console
from flatmin.orchestrator.heal import heal
from flatmin.orchestrator.planned import what_is_missing
from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import read_study
from flatmin.results import Results
started = time.perf_counter()
plan = make_plan(read_study(sys.argv[1], [f"seeds={sys.argv[3]}"]), int(sys.argv[4]))
planned, before = time.perf_counter(), time.process_time()
results = Results.open(sys.argv[2])
heal(results, Console(quiet=True))
healed = time.perf_counter()
left = what_is_missing(results, plan)
ended = time.perf_counter()
assert not left.train and not left.measure
print(json.dumps([planned - started, healed - planned, ended - healed, time.process_time() - before]))
"""


def fill(results: Results, plan: Plan) -> None:
    """Write what the trials of a plan leave: random scores, the smallest weights, and nothing flushed to the disk."""
    numbers, at = np.random.default_rng(0), datetime.now(UTC)
    (results.directory / "checkpoints").mkdir()
    for table in ("models", "epochs", "sharpness"):
        (results.directory / table).mkdir()
    execution = json.dumps({"device": "cpu", "stack_size": 1, "versions": {"torch": "2.15.0"}, "memory_bytes": 1})
    for trial in plan.trials:
        name, ids = trial.trial_id, [model.model_id for model in trial.models]
        keys = [{"model_id": model, "trial_id": name} for model in ids]
        settings = trial.models[0].settings
        scores = {"status": "finished", "epochs_run": 10, "started_at": at, "execution": execution, **dict(settings)}
        rows = [{**key, "study": plan.study, "test_acc": numbers.random(), **scores} for key in keys]
        measured = [{**key, "epoch": 10, "measure": "l2_norm", "label": "l2_norm", "value": 1.0} for key in keys]
        epochs = [{**key, "epoch": epoch, "train_loss": numbers.random()} for key in keys for epoch in range(1, 11)]
        for table, content in (("models", rows), ("epochs", epochs), ("sharpness", measured)):
            own = {key for row in content[:1] for key in row}
            columns = schema(table)
            columns = pa.schema(
                [
                    *columns,
                    *(field for field in _settings(settings) if field.name not in columns.names and field.name in own),
                ]
            )
            pq.write_table(pa.Table.from_pylist(content, schema=columns), results.table_file(table, name))
        save_file(
            {f"{model}/weight": np.zeros(1, np.float32) for model in ids},
            results.directory / "checkpoints" / f"{name}.safetensors",
        )


def _settings(settings: object) -> pa.Schema:
    return pa.Table.from_pylist([dict(settings)]).schema  # type: ignore[call-overload]


def resumes(models: int, stacks: tuple[int, ...] = (32, 1)) -> Table:
    """Time a resume of so many finished models, trained in stacks, before and after their files were merged."""
    table = Table(
        "models", "trials", "files", "plan, s", "files read, s", "missing found, s", "both, s", "both, CPU, s"
    )
    for stack in stacks:
        with tempfile.TemporaryDirectory() as folder:
            study = Path(folder) / "finished.yaml"
            study.write_text(STUDY)
            checked = read_study(str(study), [f"seeds={models}"])
            plan = make_plan(checked, stack)
            results = Results.create(Path(folder) / "results", plan.study)
            write_plan(results, plan, checked)
            fill(results, plan)
            for said in ("", "again", "merged", "merged, again"):
                if said == "merged":
                    started = time.perf_counter()
                    compact(results)
                    print(f"compact: {time.perf_counter() - started:.1f} s", file=sys.stderr)
                line = [sys.executable, "-c", LOOK, str(study), str(results.path), str(models), str(stack)]
                taken = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
                files = sum(
                    1 for kind in ("models", "epochs", "sharpness") for _ in (results.directory / kind).iterdir()
                )
                row = [*taken[:3], taken[1] + taken[2], taken[3]]
                table.add_row(
                    f"{models:,}", f"{len(plan.trials):,}", f"{files:,} {said}", *(f"{one:.1f}" for one in row)
                )
    return table
