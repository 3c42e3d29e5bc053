"""The lease: one driver owns a results directory, and only its workers may commit.

In a bucket it is written by conditional puts, each in place of the version that was read last: of two drivers that find
an expired lease one gets it, and an owner that was away too long learns at its next beat that it is one no more.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any

from flatmin.bucket import BucketPath, Changed, Tag
from flatmin.errors import LeaseLost, ResultsError
from flatmin.files import locked, write_atomically
from flatmin.results import Results, now

HEARTBEAT_SECONDS = 5.0
EXPIRY_SECONDS = 30.0
"""A heartbeat older than this may have stopped. Clocks may differ too, so it is watched before another takes over."""

OBSERVED_BEATS = 3
"""For so many beats; time is then counted by this machine alone."""


@dataclass
class Lease:
    """The ownership of a results directory while a driver runs; a context manager.

    Attributes:
        results: The directory.
        max_failures: How often a trial may fail in this launch; kept for `status`.
        token: What this owner is known by.
    """

    results: Results
    max_failures: int = 0
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    lost: bool = False
    _seen: Tag | None = None

    def __enter__(self) -> Lease:
        """Take the lease.

        Raises:
            ResultsError: Another driver holds it and is alive.
        """
        held, self._seen = _read(self.results)
        if held and (fresh(held) or self._beats(held)):
            age = time.time() - held["heartbeat"]
            raise ResultsError(
                f"'{self.results.path}' is in use by process {held['pid']} on {held['host']} since "
                f"{held['started_at'][:19]} (last heartbeat {age:.0f} s ago); wait for it, or end it and launch again"
            )
        self._started_at = now().isoformat()
        self._stop = threading.Event()
        try:
            self._take(held)
        except Changed:  # by another driver; or by ourselves, and the first answer was lost on its way
            held, self._seen = _read(self.results)
            if held is None or held["token"] != self.token:
                raise ResultsError(f"'{self.results.path}' was taken by another driver just now; wait for it") from None
        check(self.results, self.token)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lease back, unless another driver has taken it."""
        self._stop.set()
        self._thread.join()
        if not self.lost:
            # a full disk, a bucket that is away or has another owner: the heartbeat stops, which says the same
            with contextlib.suppress(OSError):
                self._write(released=True)

    def raise_if_lost(self) -> None:
        """Raise when another driver has taken the lease.

        Raises:
            LeaseLost: It has.
        """
        if self.lost:
            raise LeaseLost(f"another driver has taken '{self.results.path}' over; this one stops")

    def _beats(self, held: Mapping[str, Any]) -> bool:
        """Return whether the owner of a lease that looks old writes it all the same: a clock may have jumped."""
        if held["released"] or dead(held):
            return False
        until = time.monotonic() + OBSERVED_BEATS * HEARTBEAT_SECONDS
        while time.monotonic() < until:
            time.sleep(HEARTBEAT_SECONDS / 5)
            now_held, self._seen = _read(self.results)
            if now_held != held:
                return now_held is not None and not now_held["released"]
        return False

    def _take(self, held: Mapping[str, Any] | None) -> None:
        """Write the lease in place of the one that was read.

        Raises:
            Changed: Another driver was faster.
        """
        if isinstance(self.results.path, BucketPath):
            self._write(released=False)
            return
        with locked(self.results.path / ".lease.lock"):  # without locks, the one that wrote last has it
            there, _ = _read(self.results)
            if there != held and there and fresh(there):
                raise Changed(errno.EEXIST, "somebody else has written it", str(self.results.lease_file))
            self._write(released=False)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            held, seen = _read(self.results)
            if held and held["token"] != self.token:
                self.lost = True
                return
            self._seen = seen or self._seen
            try:
                self._write(released=False)
            except OSError:
                continue  # a full disk is the trials' to report; the next beat tries again, and reads who is the owner

    def _write(self, *, released: bool) -> None:
        content = {
            "token": self.token,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": self._started_at,
            "heartbeat": time.time(),
            "max_failures": self.max_failures,
            "released": released,
        }
        written, file = json.dumps(content, indent=2).encode(), self.results.lease_file
        if isinstance(file, BucketPath):
            self._seen = file.write_if(written, self._seen)
        else:
            write_atomically(file, written)


def read(results: Results) -> Mapping[str, Any] | None:
    """Return the newest lease, or None when there is none that can be read."""
    return _read(results)[0]


def _read(results: Results) -> tuple[Mapping[str, Any] | None, Tag | None]:
    """Return the newest lease, and in a bucket which version of the file was read; None where there is none."""
    file, tag = results.lease_file, None
    try:
        if isinstance(file, BucketPath):
            text, tag = file.read_tagged()
        else:
            text = file.read_bytes()
        content = json.loads(text)
        datetime.fromisoformat(content["started_at"])
        kinds = {"token": str, "host": str, "pid": int, "heartbeat": int | float, "max_failures": int, "released": bool}
        whole = all(isinstance(content[name], kind) for name, kind in kinds.items())
    except (OSError, ValueError, KeyError, TypeError):
        return None, tag
    return (content if whole else None), tag


def fresh(held: Mapping[str, Any]) -> bool:
    """Whether the owner of a lease still runs, as far as the clocks say."""
    return not held["released"] and not dead(held) and abs(time.time() - held["heartbeat"]) <= EXPIRY_SECONDS


def dead(held: Mapping[str, Any]) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    if held["host"] != socket.gethostname():
        return False
    try:
        os.kill(held["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def check(results: Results, token: str) -> None:
    """Raise unless the lease is still this token's.

    Raises:
        LeaseLost: Another driver has taken the directory over.
    """
    held = read(results)
    if held is None:
        if isinstance(results.path, BucketPath):
            results.lease_file.stat()  # a bucket that does not answer is no lost lease, and says so itself
        raise LeaseLost(
            f"'{results.path}' holds no lease on {socket.gethostname()}: "
            "every node must see the results directory under the same path"
        )
    if held["token"] != token or held["released"]:
        raise LeaseLost(f"'{results.path}' has another owner now; this process writes nothing more to it")
