"""The start of a query: what takes longer to import than the answer takes is not imported, and is there when needed."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from flatmin import Results, plugins

NAMES = {"dataset": "digits", "network": "mlp", "optimizer": "sgd"}

SCRIPT = """
import json, sys
from flatmin.orchestrator.cli import main
try:
    main()
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    made = Results.create(tmp_path_factory.mktemp("start") / "r", "made-up")
    row = {"model_id": "m", "trial_id": "t", "study": "made-up", "status": "finished", "epochs_run": 3, **NAMES}
    row |= {"gen_gap": 0.25, "milestones": (2, 3), "started_at": datetime(2026, 1, 2, tzinfo=UTC)}
    made.write("models", "t", [row], plugins.program_arguments(NAMES))
    key = {"model_id": "m", "trial_id": "t", "epoch": 3}
    made.write("epochs", "t", [{**key, "train_loss": 0.5}])
    made.write("sharpness", "t", [{**key, "measure": "lpf", "label": "lpf", "value": 1.5, "settings": "{}"}])
    return made


def ask(results: Results, sql: str, *options: str) -> tuple[str, set[str]]:
    line = [sys.executable, "-c", SCRIPT, "query", "--results", str(results.path), sql, *options]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, set(json.loads(done.stderr.splitlines()[-1]))


def test_a_query_imports_no_slow_package(results: Results) -> None:
    sql = "SELECT gen_gap, lpf, milestones, started_at, epochs.train_loss FROM wide JOIN epochs USING (model_id)"
    written, modules = ask(results, sql, "--format", "json")
    (row,) = json.loads(written)
    assert (row["gen_gap"], row["lpf"], row["milestones"], row["train_loss"]) == (0.25, 1.5, [2, 3], 0.5)
    assert row["started_at"].startswith("2026-01-02T00:00:00")
    assert modules & {"pandas", "scipy", "torch", "ray", "plotly", "sklearn"} == set()


def test_the_published_numbers_are_there(results: Results) -> None:
    written, modules = ask(results, "SELECT count(*) AS n FROM published", "--format", "csv")
    assert written.splitlines()[0] == "n"
    assert "pandas" in modules
