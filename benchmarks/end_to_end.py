"""`digits-sharpness` from the command to the last row: us, and plain Ray Tune with one model per trial.

Ours is the whole command `flatmin-sweep launch digits-sharpness`, its start included, by the clock. The peer
(`_plain_tune.py`) trains and measures a sample of the same models, spread over the grid, as the published codes do: a
DataLoader, a pass over the training set after each epoch and over the test set as often as ours, 100 passes for `lpf`,
bisections for `eps_sharpness`, 2 x 100 Lanczos steps for `lambda_max` and the trace. Its seconds by the clock, Ray's
start left out, are scaled to all models; beside them those of its trials alone, imports left out, as if Ray cost it
nothing.

By the clock, so it needs a machine on which nothing else runs.

    python benchmarks/end_to_end.py [--peers-models 24] [--repetitions 1]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _figures import show
from rich.table import Table

from flatmin.orchestrator.study import read_study
from flatmin.results import Results

STUDY = "digits-sharpness"
CORES = len(os.sched_getaffinity(0))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def ours(overrides: list[str]) -> tuple[float, int]:
    """Return the seconds of a launch and how many models have all their rows after it."""
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as folder:
        line = [sys.executable, "-m", "flatmin.orchestrator", "launch", STUDY, *overrides, "--results", folder]
        started = time.perf_counter()
        subprocess.run(line, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        return seconds, len(Results.open(folder).models())


def peers(settings: list[dict[str, Any]]) -> tuple[list[float], float]:
    """Return the seconds of plain trials of some models from within, and of all of them by the clock."""
    script = Path(__file__).with_name("_plain_tune.py")
    given = json.dumps(settings)
    said = subprocess.run(
        [sys.executable, script], input=given, env=ENVIRONMENT, check=True, capture_output=True, text=True
    )
    seconds = json.loads(said.stdout.strip().splitlines()[-1])
    return seconds["trials"], seconds["all"]


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description="A study from the command to the last row, beside plain Ray Tune.")
    parser.add_argument("--peers-models", type=int, default=24, help="models that plain Ray Tune trains (default 24)")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="settings of the study, as for launch")
    options = parser.parse_args()
    models = read_study(STUDY, options.overrides).models
    each = len(models) / options.peers_models
    own: list[float] = []
    trials: list[float] = []
    fits: list[float] = []
    for repetition in range(options.repetitions):
        seconds, there = ours(options.overrides)
        assert there == len(models)
        own.append(seconds)
        # another part of the grid each time, and every axis in it
        places = {int((i + repetition / options.repetitions) * each) for i in range(options.peers_models)}
        inside, fit = peers([dict(models[place].settings) for place in sorted(places)])
        trials += inside
        fits.append(fit * len(models) / len(inside))
    scale = len(models) / CORES
    error = statistics.stdev(trials) / len(trials) ** 0.5 * scale if len(trials) > 1 else 0.0
    table = Table("who", "models run", "seconds for all", "standard error", "times ours")
    table.title = f"{STUDY}, {len(models)} models"
    table.add_row("ours", str(len(models)), f"{statistics.median(own):.0f}", "", "1")
    for who, theirs in {
        "plain Ray Tune": statistics.mean(fits),
        "its trials alone": statistics.mean(trials) * scale,
    }.items():
        ratio = theirs / statistics.median(own)
        table.add_row(who, str(len(trials)), f"{theirs:.0f} (scaled)", f"{error:.0f}", f"{ratio:.1f}")
    show(table, "end_to_end", ("torch", "ray"), about=f"{CORES} trials at a time; n = {options.repetitions}")


if __name__ == "__main__":
    main()
