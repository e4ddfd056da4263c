"""How does one thread wait for the results of many tasks: what the result hub asks of a result backend.

A backend that can say more than "look again" offers one of two things: ``result_watcher(alarm)``, a ``Watcher``
that the hub's thread drives, or ``result_inbox``, an ``Inbox`` that tells by itself what has arrived. Any other
backend is polled.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from celery import states
from celery.backends.base import BaseKeyValueStoreBackend

__all__ = ["Alarm", "Inbox", "Outcome", "PollingWatcher", "Watcher", "is_ready", "read_metas"]

Outcome = Any
"""A meta (mapping), the exception that reading it raised, or None: looked at, nothing yet."""

_REST = 60.0  # seconds of waiting after which a task is taken for a slow one: the default of `get` is not more


class Alarm:
    """Wakes a thread that waits on sockets; rung from any thread, and never lost."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self._far.setblocking(False)

    def fileno(self) -> int:
        """The descriptor that becomes readable."""
        return self._near.fileno()

    def ring(self) -> None:
        """Wake the thread; a full buffer means that it is being woken already, a closed one that it has gone."""
        with suppress(OSError):
            self._far.send(b"!")

    def hush(self) -> None:
        """Take back all rings so far."""
        with suppress(OSError):
            while self._near.recv(4096):
                pass

    def wait(self, timeout: float) -> None:
        """Sleep up to ``timeout`` seconds or until rung."""
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            selector.select(max(0.0, timeout))

    def close(self) -> None:
        """Close both ends."""
        self._near.close()
        self._far.close()


class Watcher(Protocol):
    """Driven by the hub's thread only, but for ``owing_since``; any method may raise when the server is sick."""

    owing_since: float | None
    """``time.monotonic()`` of the oldest question that the server has not answered; None: it owes nothing."""

    def add(self, task_ids: Iterable[str]) -> None:
        """Begin to watch; does not speak to the server."""
        ...

    def drop(self, task_ids: Iterable[str]) -> None:
        """End to watch; does not speak to the server."""
        ...

    def step(self, timeout: float) -> Mapping[str, Outcome]:
        """Wait up to ``timeout`` seconds, or until the alarm rings, and say what is known since the last step.

        Returns:
            Outcomes of ready tasks, which are watched no longer; None for those looked at for the first time in vain.
        """
        ...

    def look(self, task_ids: Iterable[str]) -> Mapping[str, Outcome]:
        """Read the present metas, in whatever state; tasks that nothing is known of may be left out."""
        ...

    def reset(self) -> None:
        """Drop connections after an error; what is watched is kept."""
        ...

    def close(self) -> None:
        """Drop everything."""
        ...


class Inbox(Protocol):
    """Results that arrive by themselves; all methods are quick and may be called from any thread."""

    def knows(self, task_id: str) -> bool:
        """Whether a result of this task may arrive here, or has."""
        ...

    def watch(self, task_id: str, callback: Callable[[str], None]) -> None:
        """Call back with the id, from any thread, as soon as its result is there (now, if it is)."""
        ...

    def unwatch(self, task_id: str, callback: Callable[[str], None]) -> None:
        """Do not."""
        ...

    def outcome(self, task_id: str, *, take: bool) -> Outcome:
        """The present meta in whatever state, or None; ``take``: it is being handed over, and need not be kept long."""
        ...

    def forgotten(self, task_id: str) -> bool:
        """Whether the result was here and is no longer."""
        ...

    def trouble(self) -> str | None:
        """Why results cannot arrive just now, or None."""
        ...


def is_ready(meta: Any) -> bool:
    """Whether a meta tells of an ended task; what cannot be read is not going to change either."""
    return isinstance(meta, Exception) or meta.get("status") in states.READY_STATES


def read_metas(backend: Any, task_ids: Iterable[str], *, ready_only: bool) -> dict[str, Outcome]:
    """Read many metas from any Celery result backend with as few questions as it allows."""
    ids = list(task_ids)
    if hasattr(backend, "get_many_meta"):
        found: dict[str, Outcome] = backend.get_many_meta(ids, ready_only=ready_only)
        return found
    metas: dict[str, Outcome] = {}
    if isinstance(backend, BaseKeyValueStoreBackend):
        keys = [backend.get_key_for_task(task_id) for task_id in ids]
        values = backend.mget(keys)
        if isinstance(values, Mapping):
            values = [values.get(key) for key in keys]
        for task_id, value in zip(ids, values, strict=True):
            if value:
                metas[task_id] = _decoded(backend.decode_result, value)
    else:
        for task_id in ids:
            metas[task_id] = _decoded(lambda name: backend.get_task_meta(name, cache=False), task_id)
    return {task_id: meta for task_id, meta in metas.items() if not ready_only or is_ready(meta)}


def _decoded(decode: Callable[[Any], Any], value: Any) -> Outcome:
    try:
        return decode(value)
    except OSError:
        raise  # of the connection: all of them are concerned
    except Exception as exc:  # noqa: BLE001
        # One broken result fails those who wait for it, nobody else.
        return exc


class PollingWatcher:
    """Asks a backend again and again, with one question for all: often while a wait is young, rarely later.

    Args:
        backend: a Celery result backend.
        alarm: wakes the thread that waits here.
        poll_min: seconds between the first questions.
        poll_max: seconds between later ones; four times that after the first minute.
    """

    def __init__(self, backend: Any, alarm: Alarm, poll_min: float, poll_max: float) -> None:
        self.owing_since: float | None = None
        self._backend = backend
        self._alarm = alarm
        self._poll_min, self._poll_max = poll_min, poll_max
        self._since: dict[str, float] = {}
        self._unseen: set[str] = set()
        self._cost = 0.0
        self._next = self._not_before = 0.0

    def add(self, task_ids: Iterable[str]) -> None:
        now = time.monotonic()
        for task_id in task_ids:
            self._since.pop(task_id, None)  # the youngest stay last
            self._since[task_id] = now
            self._unseen.add(task_id)
            self._next = min(self._next, max(now + self._poll_min, self._not_before))

    def drop(self, task_ids: Iterable[str]) -> None:
        for task_id in task_ids:
            self._since.pop(task_id, None)
            self._unseen.discard(task_id)

    def step(self, timeout: float) -> Mapping[str, Outcome]:
        now = time.monotonic()
        pause = min(timeout, self._next - now if self._since else timeout)
        if pause > 0:
            self._alarm.wait(pause)
        self._alarm.hush()
        if not self._since or time.monotonic() < self._next:
            return {}
        found = dict(self._ask(list(self._since), ready_only=True))
        for task_id in self._unseen.difference(found):
            found[task_id] = None
        self._unseen.clear()
        self.drop([task_id for task_id, meta in found.items() if meta is not None])
        now = time.monotonic()
        # However many begin to wait now, half of the time is theirs.
        self._not_before = now + self._cost
        if self._since:
            self._next = now + self._interval(now)
        return found

    def _interval(self, now: float) -> float:
        youngest = now - next(reversed(self._since.values()))
        most = self._poll_max * (4 if youngest > _REST else 1)
        # An answer that takes long, from a busy server or about many tasks, is not asked for all the time.
        return max(min(max(self._poll_min, youngest * 0.15), most), 2 * self._cost)

    def look(self, task_ids: Iterable[str]) -> Mapping[str, Outcome]:
        return self._ask(list(task_ids), ready_only=False)

    def _ask(self, task_ids: list[str], *, ready_only: bool) -> dict[str, Outcome]:
        self.owing_since = started = time.monotonic()
        found = read_metas(self._backend, task_ids, ready_only=ready_only)
        self.owing_since = None
        self._cost = time.monotonic() - started
        return found

    def reset(self) -> None:
        self.owing_since = None

    def close(self) -> None:
        self._since.clear()
        self._unseen.clear()
