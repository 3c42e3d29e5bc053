"""What orchestration costs beside the work: us and plain Ray Tune with one model per trial, in turn, in one run.

    python benchmarks/orchestrator.py [overhead] [memory] [scan] [--models 200] [--repetitions 3]
    python benchmarks/orchestrator.py long [--long-models 10000]

**overhead**: models that sleep for a second, through the whole of a real launch: study, plan, Ray, worker, trainer,
files of results. The sleep stands in for the arithmetic, and is all that is simulated: a plug-in network sleeps in its
training pass; a stack sleeps as many times as it has models. Plain Tune sleeps in a function trainable that has
imported torch, and reports one number. The ideal is models x seconds / slots; the overhead per model is what a slot
takes longer for one.

**long**: one such launch of very many models, in stacks, measured whole where the other figures are reckoned on; an
hour and a half for 10,000.

**memory**: resident memory of the driver while a launch of so many planned models is under way, ended by a time budget.

**scan**: the time that a resume needs before its first trial: every file read, weights looked for, what is missing
found. The rows are made up, and written without training.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from _figures import show
from _plugged_in import plugged_in
from rich.table import Table

SLOTS, STACK = 2, 32

NETWORK = '''"""A linear layer whose training pass takes as long as it is told to."""

import math
import time
from typing import Annotated

from torch import nn

from flatmin.settings import Setting


class Nap(nn.Module):
    def __init__(self, inputs, classes, seconds):
        super().__init__()
        self.linear, self.seconds = nn.Linear(inputs, classes), seconds

    def forward(self, x):
        if self.training and x.device.type != "meta":
            time.sleep(self.seconds)
        return self.linear(x.flatten(1))


def nap(input_shape, classes, *, nap_seconds: Annotated[float, Setting(unit="seconds", ge=0)] = 1.0) -> nn.Module:
    return Nap(math.prod(input_shape), classes, nap_seconds)
'''

STUDY = """\
study: naps
settings: {dataset: digits, network: nap, nap_seconds: 1.0, optimizer: sgd, lr: 0.05, train_size: 32, batch_size: 32}
resources: {models_per_trial: 1}
seeds: 2
"""

TUNE = """
import sys, time
import ray
from ray import tune

def train(config):
    import torch
    time.sleep(1.0)
    tune.report({"loss": float(torch.zeros(()))})

ray.init(address="local", num_cpus=int(sys.argv[2]), include_dashboard=False, log_to_driver=False)
budget = float(sys.argv[3]) if len(sys.argv) > 3 else None
tuner = tune.Tuner(
    train,
    param_space={"seed": tune.grid_search(list(range(int(sys.argv[1]))))},
    tune_config=tune.TuneConfig(time_budget_s=budget),
    run_config=tune.RunConfig(verbose=0),
)
tuner.fit()
"""


@contextmanager
def napping() -> Iterator[tuple[Path, dict[str, str]]]:
    """Give a folder with the study, and the environment in which its network is installed and nothing is kept."""
    with plugged_in("nap", NETWORK, STUDY) as (folder, environment):
        yield folder, environment | {"OMP_NUM_THREADS": "1", "HOME": str(folder)}


def launch_line(folder: Path, models: int, results: str, *more: str, stack: int = 1) -> list[str]:
    """Return the command that launches so many naps; a stack naps as many times as it has models."""
    settings = [f"seeds={models}", f"epochs={stack}", f"eval_every={stack}"]
    more = (*more, "--models-per-trial", str(stack))
    where = ["--results", str(folder / results), "--gpus-per-trial", "0"]
    line = [sys.executable, "-m", "flatmin.orchestrator", "launch", str(folder / "study.yaml"), *settings, *where]
    return [*line, "--cpus-per-trial", f"{len(os.sched_getaffinity(0)) / SLOTS:g}", *more]


def tune_line(models: int, *more: str) -> list[str]:
    """Return the command that runs so many naps in plain Ray Tune."""
    return [sys.executable, "-c", TUNE, str(models), str(SLOTS), *more]


def seconds(line: list[str], environment: dict[str, str]) -> float:
    """Return how long a command takes by the clock."""
    started = time.perf_counter()
    subprocess.run(line, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def overhead(models: int, peers_models: int, repetitions: int) -> Table:
    """Compare the time beside the work, the contenders in turn."""
    with napping() as (folder, environment):
        runs: dict[str, tuple[int, Callable[[int], list[str]]]] = {
            "ours": (models, lambda turn: launch_line(folder, models, f"r{turn}")),
            "ours, started and ended": (SLOTS, lambda turn: launch_line(folder, SLOTS, f"s{turn}")),
            f"ours, stacks of {STACK}": (
                models,
                lambda turn: launch_line(folder, models, f"k{turn}", stack=STACK),
            ),
            "plain Ray Tune": (peers_models, lambda turn: tune_line(peers_models)),
            "plain Ray Tune, started and ended": (SLOTS, lambda turn: tune_line(SLOTS)),
        }
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repetitions):
            for name, (_, line) in runs.items():
                taken[name].append(seconds(line(turn), environment))
        files = sum(1 for file in (folder / "r0").rglob("*") if file.is_file())
    table = Table("who", "models", "seconds", "spread", "ideal", "over the ideal", "per model beside the work, ms")
    for name, (count, _) in runs.items():
        ideal = count / SLOTS
        each = [(second - ideal) / count * SLOTS * 1e3 for second in taken[name]]
        table.add_row(
            name,
            str(count),
            f"{statistics.median(taken[name]):.1f}",
            f"{min(taken[name]):.1f} to {max(taken[name]):.1f}",
            f"{ideal:.0f}",
            f"{statistics.median(taken[name]) / ideal - 1:.1%}",
            f"{statistics.median(each):.0f}",
        )
    for who, count in (("ours", models), (f"ours, stacks of {STACK}", models), ("plain Ray Tune", peers_models)):
        once = statistics.median(taken[f"{who.partition(',')[0]}, started and ended"]) - 1
        beyond = [(second - once - count / SLOTS) / count * SLOTS * 1e3 for second in taken[who]]
        spread = f"{min(beyond):.0f} to {max(beyond):.0f}"
        ten = 10_000 / SLOTS
        expected = (once + ten + 10_000 / SLOTS * statistics.median(beyond) / 1e3) / ten - 1
        table.add_row(
            f"{who}, start left out",
            str(count),
            "",
            spread,
            "",
            f"10,000 models, reckoned: {expected:.1%}",
            f"{statistics.median(beyond):.0f}",
        )
    table.caption = f"{models} models of ours left {files} files"
    return table


def resident(line: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return the memory of a process without its children, in MB: at most, and at the last look before it ended."""
    process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = [0.0]
    page = os.sysconf("SC_PAGE_SIZE") / 1e6
    while process.poll() is None:
        try:
            seen.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page)
        except (OSError, IndexError):
            break
        time.sleep(0.2)
    process.wait()
    return max(seen), statistics.median(seen[-50:])


def at_length(models: int) -> Table:
    """Measure one launch of very many models in stacks: its time, the driver's memory, and the files it leaves."""
    table = Table(
        "models", "stacks of", "seconds", "ideal", "over the ideal", "driver, most, MB", "under way, MB", "files"
    )
    with napping() as (folder, environment):
        started = time.perf_counter()
        most, under_way = resident(launch_line(folder, models, "r", stack=STACK), environment)
        taken, ideal = time.perf_counter() - started, math.ceil(models / STACK) * STACK / SLOTS
        files = sum(1 for file in (folder / "r").rglob("*") if file.is_file())
    figures = (f"{taken:.0f}", f"{ideal:.0f}", f"{taken / ideal - 1:.1%}", f"{most:.0f}", f"{under_way:.0f}")
    table.add_row(f"{models:,}", str(STACK), *figures, f"{files:,}")
    return table


def memory(budget: float, planned: tuple[int, ...], peers: tuple[int, ...]) -> Table:
    """Compare the drivers' memory against the number of planned models."""
    table = Table("who", "planned models", "most, MB", "under way, MB")
    with napping() as (folder, environment):
        for count in planned:
            line = launch_line(folder, count, f"m{count}", "--time-budget", f"{budget:g}s")
            table.add_row("ours", f"{count:,}", *(f"{size:.0f}" for size in resident(line, environment)))
        for count in peers:
            line = tune_line(count, f"{budget:g}")
            table.add_row("plain Ray Tune", f"{count:,}", *(f"{size:.0f}" for size in resident(line, environment)))
    return table


def main() -> None:
    """Measure what was asked for, or all of it."""
    from _resume import resumes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["overhead", "memory", "scan"], metavar="PART")
    parser.add_argument("--models", type=int, default=256, help="one-second models of ours")
    parser.add_argument("--peers-models", type=int, default=30, help="and of plain Ray Tune")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of a launch whose memory is measured")
    parser.add_argument("--planned", default="1000,10000,100000", help="models of a plan whose memory is measured")
    parser.add_argument("--finished", type=int, default=100_000, help="models of the results that are scanned")
    parser.add_argument("--stacks", default="32,1", help="sizes of the stacks in which those were trained")
    parser.add_argument("--long-models", type=int, default=10_000, help="models of the long launch")
    given = parser.parse_args()
    planned = tuple(int(count) for count in given.planned.split(","))

    def found(table: Table, title: str) -> None:
        table.title = title
        about = f"load {os.getloadavg()[0]:.1f}"
        show(table, "orchestrator", ("ray", "torch", "pyarrow"), threads=None, about=about)

    if "overhead" in given.parts:
        title = f"Beside the work: {given.models} one-second models, {given.peers_models} of plain Ray Tune"
        found(overhead(given.models, given.peers_models, given.repetitions), title)
    if "memory" in given.parts:
        found(memory(given.budget, planned, planned[:2]), f"Memory of the driver, {given.planned} planned")
    if "scan" in given.parts:
        sizes = tuple(int(size) for size in given.stacks.split(","))
        found(resumes(given.finished, sizes), f"A resume of {given.finished:,} models, in stacks of {given.stacks}")
    if "long" in given.parts:
        found(at_length(given.long_models), f"{given.long_models:,} one-second models, a whole launch")


if __name__ == "__main__":
    main()
