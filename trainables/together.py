"""Starts the other processes that train a job's model, and is what they run: `python -m flatmin.trainables.together`.

They are processes of this machine, each with a GPU of its own or, without GPUs, with threads of its own. The first is
the trial itself. It alone writes; when it ends, for whatever reason, so do the others, whose standard input it holds.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from flatmin.errors import FlatminError, RequestError
from flatmin.results import Results
from flatmin.trainables.ranks import Ranks
from flatmin.trial import Job

_HOST = "127.0.0.1"
_PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others: longer than one may take to read its data."""


@contextmanager
def others(job: Job, *, resumed: bool) -> Iterator[None]:
    """Start the processes that train with this one, joined, and end them with the context.

    Args:
        job: The job.
        resumed: Whether they go on from the trial's checkpoint.

    Raises:
        RequestError: There are fewer GPUs than processes.
        FlatminError: One of them has failed; the message is its own.
    """
    size = job.execution.processes_per_model
    if size == 1:
        yield
        return
    if job.execution.device == "cuda" and torch.cuda.device_count() < size:
        raise RequestError(
            f"--processes-per-model {size}: each needs a GPU, and this trial sees {torch.cuda.device_count()}; "
            f"give --gpus-per-trial {size} on a machine that has them"
        )
    store = TCPStore(_HOST, 0, size, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="flatmin-") as folder:
        logs = [Path(folder) / str(rank) for rank in range(1, size)]
        processes = [_start((job, rank, store.port, resumed), log) for rank, log in enumerate(logs, 1)]
        try:
            _join(job, Ranks(0, size), store)
            yield
        except RuntimeError as error:  # what a collective raises when another process has gone
            failed = [log for process, log in zip(processes, logs, strict=True) if _failed(process)]
            if not failed:
                raise
            reason = (failed[0].read_text().strip() or "it ended without a word").splitlines()[-1]
            raise FlatminError(f"a process of --processes-per-model {size} failed: {reason}") from error
        finally:
            for process in processes:
                with suppress(ProcessLookupError):  # with what it has started: workers that read images
                    os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            if dist.is_initialized():
                dist.destroy_process_group()


def _start(task: tuple[Job, int, int, bool], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with open(log, "wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "flatmin.trainables.together"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=environment,
            start_new_session=True,  # an interrupt at the terminal is for the first process
        )
    assert process.stdin is not None
    pickle.dump(task, process.stdin)
    process.stdin.flush()
    return process


def _failed(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a process has ended by itself, or is about to."""
    try:
        return process.wait(timeout=2) != 0
    except subprocess.TimeoutExpired:
        return False


def _join(job: Job, ranks: Ranks, store: Store) -> None:
    cuda = job.execution.device == "cuda"
    if cuda:
        torch.cuda.set_device(ranks.rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=ranks.rank, world_size=ranks.size, timeout=_PATIENCE
    )


def _follow(stdin: IO[bytes]) -> None:
    """Train a job's model as one of the others: the same steps, and nothing is written."""
    from flatmin.trainables.checkpoint import Checkpoints
    from flatmin.trainables.job import trainer_of

    task: tuple[Job, int, int, bool] = pickle.load(stdin)
    threading.Thread(target=_end_with, args=(stdin,), daemon=True).start()
    job, rank, port, resumed = task
    ranks = Ranks(rank, job.execution.processes_per_model)
    _join(job, ranks, TCPStore(_HOST, port, ranks.size, is_master=False))
    trainer = trainer_of(job, ranks)
    if resumed and not Checkpoints(Results(job.results), trainer).restore():
        raise FlatminError("the checkpoint that the first process goes on from cannot be read")
    for _ in trainer.train():
        pass


def _end_with(stdin: IO[Any]) -> None:
    stdin.read()
    if os.getpgrp() == os.getpid():  # what it has started goes with it
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    _follow(sys.stdin.buffer)
