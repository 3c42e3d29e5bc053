"""What models that have ended cost a stack: real stacks of `digits-sharpness`, trained to where their models stop.

A model leaves its stack at the end of the epoch in which it reaches the stopping loss; one that diverges is frozen up
to the end of its epoch. Every step is timed with the models in it, on one thread; three numbers follow for a stack:

- `frozen`: the share of its time that went to frozen models, each taking an equal part of a step;
- `small`: what its steps cost more because it had shrunk, as a share of its time: the rest is what all its models'
  steps would have cost at the rate of the whole stack;
- `kept whole`: how many times as long it would take if models stayed until the last one ended, as in a stack of fixed
  size.

    python benchmarks/early_stop.py [--widths 48 96 192] [--batches 32 128]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _figures import show
from rich.table import Table

from flatmin.orchestrator.plan import make_plan
from flatmin.orchestrator.study import read_study
from flatmin.stack.arithmetic import prepare_arithmetic
from flatmin.trainables.datasets.digits import digits
from flatmin.trainables.trainer import StackTrainer, network_builder
from flatmin.trial import Execution, Trial

STUDY = "digits-sharpness"


@dataclass(frozen=True)
class Taken:
    """A step, with the evaluation behind it where there is one.

    Attributes:
        seconds: Of the CPU.
        models: In the stack.
        frozen: Of these, those that have diverged.
    """

    seconds: float
    models: int
    frozen: int


def trained(trial: Trial) -> list[Taken]:
    """Return the steps of a trial, trained to its end."""
    dataset = digits(Path())
    trainer = StackTrainer(
        trial, dataset, network_builder(trial.program, dataset.input_shape, dataset.classes), Execution()
    )
    steps = trainer.train()
    next(steps)  # which also sets up
    taken, models, started = [], len(trial.models), time.process_time()
    for progress in steps:
        now = time.process_time()
        frozen = len(progress.alive) - int(progress.running.sum())
        taken.append(Taken(now - started, models, frozen))
        models, started = len(progress.alive), time.process_time()
    return taken


def row(trial: Trial) -> tuple[list[str], float, float, float]:
    """Return what the table says of a trial; its seconds, those on frozen models, and those of shrinking."""
    taken = trained(trial)
    whole = len(trial.models)
    total = sum(step.seconds for step in taken)
    frozen = sum(step.seconds * step.frozen / step.models for step in taken)
    # the mean, for evaluations are dear and seldom
    each = statistics.fmean(step.seconds for step in taken if step.models == whole) / whole
    small = max(0.0, total - each * sum(step.models for step in taken))
    kept = each * whole * len(taken) / total
    cells = [f"{100 * frozen / total:.1f} %", f"{100 * small / total:.0f} %", f"{kept:.2f}"]
    ends = sorted({step.models for step in taken})
    settings = [str(trial.program[name]) for name in ("width", "batch_size")]
    return [*settings, str(whole), str(ends[0]), f"{total:.1f}", *cells], total, frozen, small


def main() -> None:
    """Train a trial of each width and batch size, and print the table."""
    parser = argparse.ArgumentParser(description="What models that have ended cost a stack.")
    parser.add_argument("--widths", type=int, nargs="*", default=[48, 96, 192])
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 128])
    options = parser.parse_args()
    torch.set_num_threads(1)
    prepare_arithmetic()
    sizes = f"widths {_listed(options.widths)}, batches {_listed(options.batches)}"
    head = ("width", "batch", "models", "at the end", "CPU s", "frozen", "small", "kept whole")
    table = Table(*head, title=f"Stacks of {STUDY}, trained until their models stop; {sizes}")
    sums = [0.0, 0.0, 0.0]
    for width in options.widths:
        for batch in options.batches:
            trials = make_plan(read_study(STUDY, [f"width={width}", f"batch_size={batch}"])).trials
            cells, *seconds = row(trials[0])
            table.add_row(*cells)
            sums = [a + b for a, b in zip(sums, seconds, strict=True)]
    total, frozen, small = sums
    share = (f"{100 * frozen / total:.1f} %", f"{100 * small / total:.0f} %")
    table.add_row("all", "", "", "", f"{total:.1f}", *share, "")
    show(table, "early_stop", ("torch",))


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


if __name__ == "__main__":
    main()
