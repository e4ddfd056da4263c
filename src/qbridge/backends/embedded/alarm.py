"""When must this consumer wake up for the next delayed message? One alarm, by the monotonic clock.

A consumer that waits in ``drain_events`` sleeps until ``at``; one in the event loop of a worker is called. The time is
read from the file again at every sweep, so a clock that is put forward or back costs a second at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["Alarm"]


class Alarm:
    """The time at which the next delayed message of the file is due."""

    def __init__(self) -> None:
        #: On the monotonic clock; infinite: nothing is delayed.
        self.at: float = float("inf")
        self._loop: Any = None  # kombu's hub
        self._ring: Callable[[], None] | None = None
        self._due: float | None = None
        self._timer: Any = None

    def is_due(self) -> bool:
        """True if the time has come."""
        return time.monotonic() >= self.at

    def set(self, due: float | None) -> None:
        """Wake up at ``due``, a UNIX time; None: not at all."""
        if due == self._due and not self.is_due():
            return  # asked at every wake-up: the loop would collect a heap of timers that were taken back
        self._due = due
        self.at = float("inf") if due is None else time.monotonic() + max(0.0, due - time.time())
        self._set_timer()

    def attach(self, loop: Any, ring: Callable[[], None]) -> None:
        """Call ``ring`` from the event loop when the time has come."""
        self._loop, self._ring = loop, ring
        self._set_timer()

    def detach(self) -> None:
        """Call nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._loop = self._ring = self._timer = None

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._loop is not None and self.at != float("inf"):
            self._timer = self._loop.call_later(max(0.0, self.at - time.monotonic()), self._ring)
