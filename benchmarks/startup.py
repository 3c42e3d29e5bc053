"""What a command takes before it does anything: `--help`, `plan`, and `launch` up to the first training step.

Beside them: `import torch` alone, and plain Ray Tune up to the first step of a loop of its own. The first step is told
by a network that notes the time when it is first trained. Every command is a process of its own; in turn, wall and
CPU seconds (of it and of what it waited for), medians over repetitions. `launch` and `plan` count the operations of
networks when they first see them, and keep the counts: `first` has none kept, `again` has them.

    python benchmarks/startup.py [--repetitions 5]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from _figures import show
from _plugged_in import plugged_in
from rich.table import Table

NETWORK = '''"""A linear layer that notes when it is first trained."""

import math
import os
import time
from pathlib import Path

from torch import nn


class Noted(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x):
        note = Path(os.environ["NOTED"])
        if self.training and x.device.type != "meta" and not note.exists():
            note.write_text(str(time.monotonic()))
        return self.linear(x.flatten(1))


def noted(input_shape, classes) -> nn.Module:
    return Noted(math.prod(input_shape), classes)
'''

STUDY = "study: noted\nsettings: {dataset: digits, network: noted, optimizer: sgd, epochs: 1}\nseeds: 1\n"

TUNE = """
import ray
from ray import tune

def train(config):
    import os, time
    import torch
    from sklearn.datasets import load_digits
    load_digits()
    network = torch.nn.Linear(64, 10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(network(torch.rand(32, 64)), torch.zeros(32, dtype=torch.long)).backward()
    with open(os.environ["NOTED"], "w") as note:
        note.write(str(time.monotonic()))

ray.init(address="local", include_dashboard=False, log_to_driver=False)
tune.Tuner(train, run_config=tune.RunConfig(verbose=0)).fit()
"""

FLATMIN = [sys.executable, "-m", "flatmin.orchestrator"]


def whole(line: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return wall and CPU seconds of a command."""
    before, started = _cpu(), time.monotonic()
    subprocess.run(line, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - started, _cpu() - before


def first_step(line: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return the wall seconds of a command up to its first step, and the CPU seconds of all of it."""
    Path(environment["NOTED"]).unlink(missing_ok=True)
    started = time.monotonic()
    _, cpu = whole(line, environment)
    return float(Path(environment["NOTED"]).read_text()) - started, cpu


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Run all in turn and print the table."""
    parser = argparse.ArgumentParser(description="What commands take before they do anything.")
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    found: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, timed: Callable[[list[str], dict[str, str]], tuple[float, float]], line: list[str]) -> None:
        found.setdefault(name, []).append(timed(line, environment))

    for _ in range(repetitions):
        with plugged_in("noted", NETWORK, STUDY) as (folder, environment):
            environment |= {"NOTED": str(folder / "note"), "FLATMIN_DATA": str(folder / "data")}
            note("import torch", whole, [sys.executable, "-c", "import torch"])
            note("flatmin-sweep --help", whole, [*FLATMIN, "--help"])
            for turn in ("first", "again"):
                note(f"plan of 2,916 models, {turn}", whole, [*FLATMIN, "plan", "lpf-sharpness"])
            for turn, more in (("first", []), ("again", []), ("again, --inline", ["--inline"])):
                results = ["--results", str(folder / turn)]
                launch = [*FLATMIN, "launch", str(folder / "study.yaml"), *results, *more]
                note(f"launch, to the first step, {turn}", first_step, launch)
            note("plain Ray Tune, to the first step", first_step, [sys.executable, "-c", TUNE])
    table = Table("command", "wall s", "spread", "CPU s", "spread ", title="Before anything is done")
    for name, times in found.items():
        columns = [f(values) for values in zip(*times, strict=True) for f in (_median, _spread)]
        table.add_row(name, *columns)
    show(table, "startup", ("torch", "ray"), about=f"n = {repetitions}; the system's cache of files is warm")


def _median(values: tuple[float, ...]) -> str:
    return f"{statistics.median(values):.2f}"


def _spread(values: tuple[float, ...]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


if __name__ == "__main__":
    main()
