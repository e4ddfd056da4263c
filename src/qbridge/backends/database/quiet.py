"""How is no thread inside SQLite while the process forks?

SQLite has locks of its own, for the whole process. A child inherits them as they are at the moment of the fork: one
that another thread holds just then, because it opens a file, say, is never let go in the child, whose first use of
SQLite then waits for ever. So a fork waits until nobody is inside, and whoever comes meanwhile waits for the fork.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

__all__ = ["before_quiet_fork", "inside_sqlite"]

_PATIENCE = 5.0
"""Seconds that a fork waits: one statement that waits for a lock on the file must not hold it for long."""


class _Gate:
    """Counts the threads that are inside; closed while the process forks."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside = 0
        self._closing = False
        self._mine = threading.local()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be inside; waits while the process forks, but for a thread that is inside already."""
        depth = getattr(self._mine, "depth", 0)
        if not depth:
            with self._changed:
                while self._closing:
                    self._changed.wait()
                self._inside += 1
        self._mine.depth = depth + 1
        try:
            yield
        finally:
            self._mine.depth = depth
            if not depth:
                with self._changed:
                    self._inside -= 1
                    self._changed.notify_all()

    def close(self) -> None:
        """Wait until nobody but this thread is inside, and let nobody in."""
        own = 1 if getattr(self._mine, "depth", 0) else 0
        end = time.monotonic() + _PATIENCE
        self._changed.acquire()
        self._closing = True
        while self._inside > own and (left := end - time.monotonic()) > 0:
            self._changed.wait(left)

    def open(self) -> None:
        """Let them in again."""
        self._closing = False
        self._changed.notify_all()
        self._changed.release()


_gate = _Gate()
_last_words: list[Callable[[], None]] = []


def inside_sqlite() -> AbstractContextManager[None]:
    """Return a context manager for the time in which this thread uses SQLite."""
    return _gate.inside()


def before_quiet_fork(function: Callable[[], None]) -> None:
    """Have a function called before each fork, when nobody is inside."""
    _last_words.append(function)


def _before() -> None:
    _gate.close()
    for function in _last_words:
        with suppress(Exception):  # the fork comes anyway
            function()


def _in_parent() -> None:
    _gate.open()


def _in_child() -> None:
    global _gate  # noqa: PLW0603 - the old one may have waiters that do not exist here
    _gate.open()  # for this thread itself, should it be inside
    _gate = _Gate()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
