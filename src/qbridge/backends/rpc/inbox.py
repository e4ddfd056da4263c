"""Which results have come back to this process, and which may still: bounded, for all threads."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

__all__ = ["KEPT_AFTER_READING", "LIMIT", "Reply", "ReplyInbox"]

LIMIT = 100_000
"""Results that are kept until they are read, and ids of sent tasks that are remembered."""

KEPT_AFTER_READING = 1_000
"""Results that are kept for another look after they were read."""

_WAITED_FOR, _GONE = True, False


class Reply(NamedTuple):
    """One stored state of one task.

    It is kept as it came: a decoded meta is several times as large, and each reader gets one of its own.
    """

    body: Any
    content_type: str | None
    content_encoding: str | None
    ready: bool
    arrived: float


class ReplyInbox:
    """Replies by task id.

    Args:
        expires: seconds that an unread reply is kept; None: as long as there is room.
        limit: how many.
    """

    def __init__(self, expires: float | None, limit: int = LIMIT) -> None:
        self._expires = expires or None
        self._limit = limit
        # Reentrant: the garbage collector may end somebody's interest while this thread is in here.
        self._lock = threading.RLock()
        self._sent: OrderedDict[str, bool] = OrderedDict()
        self._unread: OrderedDict[str, Reply] = OrderedDict()
        self._read: OrderedDict[str, Reply] = OrderedDict()
        self._listeners: dict[str, list[Callable[[str, Reply], None]]] = {}

    def expect(self, task_id: str) -> None:
        """A task is sent from here; its result may come."""
        with self._lock:
            self._sent[task_id] = _WAITED_FOR
            while len(self._sent) > self._limit:
                self._sent.popitem(last=False)

    def put(self, task_id: str, reply: Reply) -> None:
        """A state has arrived: keep the newest, but nothing after the end of the task, and tell who listens."""
        with self._lock:
            known = self._unread.get(task_id) or self._read.get(task_id)
            if self._sent.get(task_id) is _GONE or (known is not None and known.ready):
                return
            self._unread.pop(task_id, None)
            self._unread[task_id] = reply
            self._make_room(reply.arrived)
            listeners = tuple(self._listeners.get(task_id, ()))
        for listener in listeners:
            listener(task_id, reply)

    def _make_room(self, now: float) -> None:
        while self._unread:
            task_id, oldest = next(iter(self._unread.items()))
            expired = self._expires is not None and now - oldest.arrived > self._expires
            if not expired and len(self._unread) <= self._limit:
                break
            del self._unread[task_id]
            self._mark_gone(task_id)

    def expire(self) -> None:
        """Drop what nobody has read in time."""
        with self._lock:
            self._make_room(time.monotonic())

    def listen(self, task_id: str, listener: Callable[[str, Reply], None]) -> Reply | None:
        """Call ``listener`` with each state that arrives from now on; return the present one."""
        with self._lock:
            self._listeners.setdefault(task_id, []).append(listener)
            return self._unread.get(task_id) or self._read.get(task_id)

    def unlisten(self, task_id: str, listener: Callable[[str, Reply], None]) -> None:
        """Do not."""
        with self._lock:
            listeners = self._listeners.get(task_id)
            if listeners is None:
                return
            if listener in listeners:
                listeners.remove(listener)
            if not listeners:
                del self._listeners[task_id]

    def states(
        self, task_ids: Iterable[str], timeout: float | None, on_interval: Callable[[], Any] | None
    ) -> Iterator[tuple[str, Reply]]:
        """Yield the present and all coming states of some tasks until the last of them has ended.

        Args:
            task_ids: which tasks.
            timeout: seconds; None: without end.
            on_interval: called at least once a second.

        Raises:
            TimeoutError: if time runs out.
        """
        end = None if timeout is None else time.monotonic() + timeout
        heard: SimpleQueue[tuple[str, Reply]] = SimpleQueue()
        waiting = set(task_ids)

        def listener(task_id: str, reply: Reply) -> None:
            heard.put((task_id, reply))

        try:
            for task_id in waiting:
                present = self.listen(task_id, listener)
                if present is not None:
                    listener(task_id, present)
            while waiting:
                left = 1.0 if end is None else min(1.0, end - time.monotonic())
                try:
                    task_id, reply = heard.get(timeout=max(left, 0.0))
                except Empty:
                    if end is not None and time.monotonic() >= end:
                        raise TimeoutError from None
                else:
                    if reply.ready:
                        waiting.discard(task_id)
                        self.unlisten(task_id, listener)
                    yield task_id, reply
                if on_interval is not None:
                    on_interval()
        finally:
            for task_id in waiting:
                self.unlisten(task_id, listener)

    def find(self, task_id: str, *, take: bool = False) -> Reply | None:
        """The present state; ``take``: it is handed over, so it makes room for others sooner."""
        with self._lock:
            reply = self._unread.get(task_id)
            if reply is None:
                return self._read.get(task_id)
            if take and reply.ready:
                del self._unread[task_id]
                self._read[task_id] = reply
                while len(self._read) > KEPT_AFTER_READING:
                    self._mark_gone(self._read.popitem(last=False)[0])
            return reply

    def _mark_gone(self, task_id: str) -> None:
        if task_id in self._sent:
            self._sent[task_id] = _GONE

    def forget(self, task_id: str) -> None:
        """Drop the reply, also if it comes later."""
        with self._lock:
            self._unread.pop(task_id, None)
            self._read.pop(task_id, None)
            self._mark_gone(task_id)

    def knows(self, task_id: str) -> bool:
        """Whether the task was sent from here, or has answered."""
        with self._lock:
            return task_id in self._sent or task_id in self._unread or task_id in self._read

    def gone(self, task_id: str) -> bool:
        """Whether the reply was read, forgotten or dropped, and is no longer here."""
        with self._lock:
            return self._sent.get(task_id) is _GONE

    def __len__(self) -> int:
        return len(self._unread) + len(self._read)
