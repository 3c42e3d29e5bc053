"""The Ray Tune trainable: a job, carried out in slices of a few seconds."""

from __future__ import annotations

import faulthandler
import signal
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayActorError
from ray.experimental import internal_kv

from flatmin import pulse
from flatmin.errors import COMES_AGAIN, FlatminError, error_line
from flatmin.trainables.logs import TrialLog
from flatmin.trial import Job

REFUSED, REFUSED_AT = "refused", "refused_at"
"""Columns of a result: why a job cannot be carried out, however often it is tried, and the traceback."""

SLICE_SECONDS = 5.0
"""How long one `step` works before it reports; short enough to show progress, long enough to cost nothing."""


class Preempted(RayActorError):  # type: ignore[misc]
    """The machine is about to be taken away, as spot machines are; Tune counts this as no failure."""

    def __init__(self) -> None:
        super().__init__(error_msg="the machine is going away (SIGTERM); the trial was saved", preempted=True)


class TuneTrainable(tune.Trainable):  # type: ignore[misc]
    """Runs the job that its config names by `job`, an index into the jobs it was given.

    Tune's own checkpoints are not used: a job's state and rows lie in the results directory, and a retry goes
    on from there.
    """

    def setup(self, config: Mapping[str, Any], jobs: Sequence[Job] = (), hang_timeout: float = 0.0) -> None:
        """Take the jobs, and after how many seconds without a sign of life one hangs; start the one of the config."""
        self._jobs, self._hang_timeout = jobs, hang_timeout
        self._told_to_end, self._under_way = False, False
        self._on_terminate = signal.signal(signal.SIGTERM, self._terminate)
        self._start(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        """Go on with another job in the same process."""
        self._start(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Work for some seconds; report how many models have ended and whether the job is committed or refused.

        Raises:
            Preempted: The machine is going away.
        """
        try:
            with self._log:
                return self._slice()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def cleanup(self) -> None:
        """Leave a checkpoint of a job that is stopped under way."""
        self._work.close()
        self._end()

    def _slice(self) -> dict[str, Any]:
        deadline = time.monotonic() + SLICE_SECONDS
        self._next_beat = 0.0  # the end of the slice before has called the dump off
        self._beat()
        try:
            self._leave_if_told()
            for ended in self._work:
                self._ended = ended
                self._beat()
                self._leave_if_told()
                if time.monotonic() >= deadline:
                    return {"models_ended": self._ended, tune.result.DONE: False}
        except COMES_AGAIN as error:  # raised, Tune would try again
            traceback.print_exc()
            self._end()
            refused = {REFUSED: str(error), REFUSED_AT: traceback.format_exc()}
            return {"models_ended": self._ended, tune.result.DONE: True, **refused}
        except Exception as error:
            traceback.print_exc()
            self._end()
            if _travels(error):
                raise
            raise FlatminError(error_line(error)) from error
        self._end()
        return {"models_ended": self._ended, tune.result.DONE: True}

    def _start(self, config: Mapping[str, Any]) -> None:
        from flatmin.trainables.job import run  # torch is loaded by the worker, not by the driver

        job = self._jobs[config["job"]]
        self._ended, self._beats, self._next_beat = 0, 0, 0.0
        self._key = pulse_key(job)
        self._log = TrialLog(job)
        pulse.listen(self._beat)
        self._work: Generator[int] = run(job)
        self._under_way = True

    def _end(self) -> None:
        self._under_way = False
        self._log.close()
        if self._beats:
            internal_kv._internal_kv_del(self._key)

    def _leave_if_told(self) -> None:
        if self._told_to_end:
            self._work.close()
            raise Preempted

    def _beat(self) -> None:
        """Show the driver a sign of life; without one in time, say in the log where the work hangs."""
        now = time.monotonic()
        if not self._hang_timeout or now < self._next_beat:
            return
        interval = min(SLICE_SECONDS, self._hang_timeout / 4)
        self._next_beat = now + interval
        self._beats += 1
        internal_kv._internal_kv_put(self._key, str(self._beats).encode(), overwrite=True)
        faulthandler.dump_traceback_later(self._hang_timeout - interval, file=self._log.file)

    def _terminate(self, number: int, frame: Any) -> None:
        """End after the step under way, with a checkpoint, or before the next slice; at once where no job is."""
        self._told_to_end = True
        if not self._under_way and callable(self._on_terminate):
            self._on_terminate(number, frame)


def _travels(error: Exception) -> bool:
    """Return whether an error reaches the driver as it is; of one that does not, the driver is told another error."""
    try:
        cloudpickle.loads(cloudpickle.dumps(error))
    except Exception:  # whatever a plug-in's own error makes of it
        return False
    return True


def pulse_key(job: Job) -> bytes:
    """Return under which key of the cluster's store a job's worker shows its signs of life."""
    return f"flatmin/{job.token}/{job.trial.trial_id}".encode()
