"""What shows from outside that a worker's loop lives? It comes round, it consumes, and messages come."""

from __future__ import annotations

from typing import Any

__all__ = ["Pulse"]

_BEAT = 0.5
"""Seconds between two beats: a timer that the loop itself has to fire."""


class Pulse:
    """What a consumer notes and other threads read: counters, so that nobody has to agree on a clock."""

    def __init__(self) -> None:
        self.beats: int = 0
        """How often the loop has come round to its timer."""
        self.received: int = 0
        """Messages that have come."""
        self.consuming: bool = False
        """True from the moment at which the broker was told to deliver until the connection is lost."""
        self._entry: Any = None

    def begin(self, consumer: Any) -> None:
        """Note that a connection consumes, and beat in its loop.

        Args:
            consumer: the worker's.
        """
        self._stop()
        self._entry = consumer.timer.call_repeatedly(_BEAT, self._beat)
        self.consuming = True

    def end(self) -> None:
        """Note that it consumes no more: the connection is lost, or the worker ends."""
        self.consuming = False
        self._stop()

    def _beat(self) -> None:
        self.beats += 1

    def _stop(self) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            entry.cancel()
