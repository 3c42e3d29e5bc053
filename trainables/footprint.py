"""The memory that a stack takes on its device while it trains: a probe of two steps and an evaluation, in this process.

On a GPU: what torch's allocator has reserved at most, and `CONTEXT_BYTES`. On a CPU: by how much the process grew, once
torch was loaded. Measures are not probed; they fit themselves into what is free when they are taken.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch

from flatmin.trainables.evaluation import evaluate
from flatmin.trainables.job import trainer_of
from flatmin.trainables.pilot import standing
from flatmin.trainables.ranks import Ranks
from flatmin.trial import Execution, Job, Trial

CONTEXT_BYTES = 600 * 2**20
"""What CUDA keeps for itself in every process, about; not measured on the device that is probed."""

_STEPS = 2
"""The first step makes the optimizer's state, the second one steps with it."""


def footprint(trial: Trial, execution: Execution) -> tuple[int, int | None]:
    """Return the bytes that a stack takes, and those that its device has; None of a CPU. Best in a fresh process.

    Args:
        trial: The stack.
        execution: How it is run.

    Raises:
        FlatminError: The data are not here, or what is asked for cannot be done.
    """
    cuda = execution.device == "cuda"
    before = 0 if cuda else _of_process("VmRSS")
    trainer = trainer_of(Job(trial, results="", token="", execution=execution), Ranks(), download=False)
    for _ in islice(trainer.train(), _STEPS):
        pass
    evaluate(trainer.network, *standing(trainer), trainer.data.train, trainer.objective)
    if not cuda:
        return _of_process("VmHWM") - before, None
    total = torch.cuda.get_device_properties(trainer.device).total_memory
    return torch.cuda.max_memory_reserved(trainer.device) + CONTEXT_BYTES, int(total)


def _of_process(name: str) -> int:
    """Return the bytes of a line of this process's status; `resource` has the greatest of the parent as well."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
