"""Where coroutines of tasks run: one event loop per process, in a thread of its own, reused by every async task.

One loop, because clients that tasks share (database pools, HTTP sessions) belong to the loop they were made on.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

__all__ = ["run"]


class _Loop:
    """The loop of this process and its thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name="qbridge-async-tasks", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        # A coroutine that stops the loop, or ends with SystemExit or KeyboardInterrupt (asyncio lets them out), ends
        # itself; the coroutines beside it and after it must still run.
        while not self.loop.is_closed():
            with suppress(SystemExit, KeyboardInterrupt):
                self.loop.run_forever()


_lock = threading.Lock()
_current: _Loop | None = None


def _loop() -> _Loop:
    global _current  # noqa: PLW0603 - one loop per process is the point; it holds no configuration
    with _lock:
        if _current is None or _current.pid != os.getpid():
            _current = _Loop()
        return _current


def _after_fork() -> None:
    global _lock, _current
    _lock, _current = threading.Lock(), None


os.register_at_fork(after_in_child=_after_fork)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on the process's loop and return what it returns.

    Whatever interrupts the waiting thread (a soft time limit, a shutdown) cancels the coroutine.

    Raises:
        RuntimeError: if called on the loop itself: a task's coroutine that calls another task plainly must await it.
    """
    home = _loop()
    if threading.current_thread() is home.thread:
        coroutine.close()
        raise RuntimeError("an async task cannot be run from within another one; await it instead")
    future = asyncio.run_coroutine_threadsafe(coroutine, home.loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
