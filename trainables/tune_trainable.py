"""The Ray Tune trainable: a job, carried out in slices of a few seconds."""

from __future__ import annotations

import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from ray import tune

from flatmin.errors import COMES_AGAIN
from flatmin.trial import Job

REFUSED, REFUSED_AT = "refused", "refused_at"
"""Columns of a result: why a job cannot be carried out, however often it is tried, and the traceback."""

SLICE_SECONDS = 5.0
"""How long one `step` works before it reports; short enough to show progress, long enough to cost nothing."""


class TuneTrainable(tune.Trainable):  # type: ignore[misc]
    """Runs the job that its config names by `job`, an index into the jobs it was given.

    Tune's own checkpoints are not used: a job's state and rows lie in the results directory, and a retry goes
    on from there.
    """

    def setup(self, config: Mapping[str, Any], jobs: Sequence[Job] = ()) -> None:
        """Take the jobs; start the one that the config names."""
        self._jobs = jobs
        self._start(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        """Go on with another job in the same process."""
        self._start(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Work for some seconds; report how many models have ended and whether the job is committed or refused."""
        deadline = time.monotonic() + SLICE_SECONDS
        try:
            for ended in self._work:
                self._ended = ended
                if time.monotonic() >= deadline:
                    return {"models_ended": self._ended, tune.result.DONE: False}
        except COMES_AGAIN as error:  # raised, Tune would try again
            refused = {REFUSED: str(error), REFUSED_AT: traceback.format_exc()}
            return {"models_ended": self._ended, tune.result.DONE: True, **refused}
        return {"models_ended": self._ended, tune.result.DONE: True}

    def cleanup(self) -> None:
        """Leave a checkpoint of a job that is stopped under way."""
        self._work.close()

    def _start(self, config: Mapping[str, Any]) -> None:
        from flatmin.trainables.job import run  # torch is loaded by the worker, not by the driver

        self._ended = 0
        self._work: Generator[int] = run(self._jobs[config["job"]])
