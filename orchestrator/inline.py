"""The in-process runner: the same jobs without Ray, for a debugger or a profiler."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence

from flatmin.errors import COMES_AGAIN, LeaseLost, error_line
from flatmin.orchestrator.runner import Monitor, RunOptions, record_failure
from flatmin.results import Results
from flatmin.secrets import without_secrets
from flatmin.trial import Job


def run_inline(results: Results, jobs: Sequence[Job], options: RunOptions, monitor: Monitor) -> bool:
    """Run jobs one after the other in this process; return whether the time budget was spent."""
    from flatmin.trainables.job import run  # loads torch, which planning does without

    deadline = None if options.time_budget is None else time.monotonic() + options.time_budget
    for job in jobs:
        for attempt in range(options.max_failures + 1):
            work = run(job)
            try:
                for ended in work:
                    monitor.advanced(job, ended)
                    if deadline is not None and time.monotonic() >= deadline:
                        work.close()
                        return True
            except LeaseLost:
                raise
            except Exception as error:  # a plug-in may raise anything; the other trials go on
                final = attempt == options.max_failures or isinstance(error, COMES_AGAIN)
                record_failure(results, job, error, traceback.format_exc())
                monitor.failed(job, without_secrets(error_line(error)), final=final)
                if final:
                    break
            else:
                monitor.finished(job)
                break
    return False
