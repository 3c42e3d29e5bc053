"""A sign of life of long work, which whoever watches it can tell from work that hangs."""

from __future__ import annotations

from collections.abc import Callable

_listeners: list[Callable[[], None]] = []


def listen(listener: Callable[[], None] | None) -> None:
    """Call a function at every beat from now on, in place of the one before; None: none."""
    _listeners[:] = [] if listener is None else [listener]


def beat() -> None:
    """Say that the work in this process has got on: a pass over some examples was made, or some bytes have come."""
    for listener in _listeners:
        listener()
