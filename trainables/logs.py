"""The log of a trial: what its worker prints, and the tracebacks of its failures, each line with its time.

It is `logs/<trial_id>.log` of a results directory. Of results in a bucket it is kept on the worker's own disk while the
trial runs, and put there at its end. A trial that says nothing leaves none.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO

from flatmin.bucket import BucketPath
from flatmin.results import Results
from flatmin.secrets import without_secrets
from flatmin.trial import Job


class TrialLog(io.TextIOBase):
    """A file that takes the standard output and error while it is entered, again and again until it is closed.

    A disk that is full costs lines of the log and nothing else.

    Args:
        job: What the log is of.
    """

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._place = Results(job.results).log_file(job.trial.trial_id)
        self._local = self._place if isinstance(self._place, Path) else _scratch(self._place)
        self._file: IO[bytes] | None = None
        self._fresh = True
        with contextlib.suppress(OSError):
            self._local.parent.mkdir(parents=True, exist_ok=True)

    @property
    def file(self) -> IO[bytes]:
        """The open file, for what writes to a file of the operating system."""
        if self._file is None:
            try:
                self._file = open(self._local, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
            except OSError:
                self._file = open(os.devnull, "ab", buffering=0)  # noqa: SIM115
        return self._file

    def __enter__(self) -> TrialLog:
        """Take what this process prints."""
        self._taken = contextlib.ExitStack()
        self._taken.enter_context(contextlib.redirect_stdout(self))
        self._taken.enter_context(contextlib.redirect_stderr(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the standard output and error back."""
        self._taken.close()

    def writable(self) -> bool:
        """Return that it is."""
        return True

    def write(self, text: str) -> int:
        """Write, with the time before each line."""
        stamp = f"{datetime.now().astimezone().isoformat(timespec='seconds')} "
        lines = "".join((stamp if fresh else "") + line for line, fresh in self._lines(without_secrets(text)))
        with contextlib.suppress(OSError):
            self.file.write(lines.encode(errors="replace"))
        return len(text)

    def close(self) -> None:
        """Close the file, and put it into the bucket where the results are in one."""
        if self._file is not None:
            self._file.close()
            self._file = None
            with contextlib.suppress(OSError):
                if not self._local.exists() or not self._local.stat().st_size:
                    self._local.unlink(missing_ok=True)
                elif isinstance(self._place, BucketPath):
                    self._place.write_bytes(self._local)
        super().close()

    def _lines(self, text: str) -> list[tuple[str, bool]]:
        found = []
        for line in text.splitlines(keepends=True):
            found.append((line, self._fresh))
            self._fresh = line.endswith("\n")
        return found


def _scratch(place: BucketPath) -> Path:
    return Path(tempfile.gettempdir()) / f"flatmin-logs-{os.getuid()}" / place.name
