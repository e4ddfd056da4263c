"""What stands for one waiting caller: a thread that sleeps on an event, or a coroutine that awaits a future."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

__all__ = ["NOTHING", "AsyncTicket", "SyncTicket", "Ticket"]


class _Nothing:
    """Stands for "there is no outcome": None could be one."""

    def __repr__(self) -> str:
        return "NOTHING"


NOTHING: Final = _Nothing()


class Ticket:
    """One question of one caller.

    Args:
        task_id: id of the task.
        order: ``"wait"``, ``"look"``, ``"forget"``, ``"clear"`` or ``"restore"``.
    """

    __slots__ = ("hurried", "left", "looked", "meta", "order", "task_id")

    def __init__(self, task_id: str, order: str) -> None:
        self.task_id: str = task_id
        self.order: str = order
        #: What to restore.
        self.meta: Mapping[str, Any] = {}
        #: The backend was asked at least once since this ticket was drawn.
        self.looked: bool = False
        #: Time is up: one look is all that the caller still waits for.
        self.hurried: bool = False
        #: The caller waits no longer.
        self.left: bool = False

    def answer(self, outcome: Any) -> None:
        """Give the caller the outcome; from any thread, the first one counts."""
        raise NotImplementedError  # the two kinds below


class SyncTicket(Ticket):
    """For a caller in a thread."""

    __slots__ = ("_answered", "_outcome")

    def __init__(self, task_id: str, order: str) -> None:
        super().__init__(task_id, order)
        self._answered = threading.Event()
        self._outcome: Any = NOTHING

    def answer(self, outcome: Any) -> None:
        if not self._answered.is_set():
            self._outcome = outcome
            self._answered.set()

    def wait(self, timeout: float) -> Any:
        """Sleep until there is an outcome; ``NOTHING`` if there is none in time (seconds)."""
        self._answered.wait(timeout)
        return self._outcome


class AsyncTicket(Ticket):
    """For a coroutine, on the event loop that is running now."""

    __slots__ = ("_future", "_loop")

    def __init__(self, task_id: str, order: str) -> None:
        super().__init__(task_id, order)
        self._loop = asyncio.get_running_loop()
        self._future: asyncio.Future[Any] = self._loop.create_future()

    def answer(self, outcome: Any) -> None:
        # A loop that was closed meanwhile has nobody left to tell.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._set, outcome)

    def _set(self, outcome: Any) -> None:
        if not self._future.done():
            self._future.set_result(outcome)

    async def wait(self, timeout: float) -> Any:
        """Suspend until there is an outcome; ``NOTHING`` if there is none in time (seconds)."""
        if self._future.done():
            return self._future.result()
        done = self._loop.create_future()

        def wake(_: Any = None) -> None:
            if not done.done():
                done.set_result(None)

        timer = self._loop.call_later(max(timeout, 0.0), wake)
        self._future.add_done_callback(wake)
        try:
            await done
        finally:
            timer.cancel()
            self._future.remove_done_callback(wake)
        return self._future.result() if self._future.done() else NOTHING
