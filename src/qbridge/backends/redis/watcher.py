"""How does one thread wait for many results in Redis: subscribe, look, and look again after each loss.

Celery publishes a result on the channel that has the name of its key. A result stored before the subscription took
effect is not published again, so each key is read once the server has confirmed the subscription.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, cast

from kombu.utils import encoding

from qbridge.backends.watching import Alarm, Outcome, is_ready

__all__ = ["RedisWatcher"]

_bytes = cast("Callable[[Any], bytes]", encoding.ensure_bytes)  # kombu leaves it without types

_BATCH = 500
_FIRST_CHECK, _NEXT_CHECKS = 1.0, 2.0


class RedisWatcher:
    """Waits by publish/subscribe; each second or two it asks for the keys too, which finds a dead connection.

    Args:
        backend: the ``RedisBackend``.
        alarm: wakes the thread that waits here.
        patience: seconds that the server may take to answer.
    """

    def __init__(self, backend: Any, alarm: Alarm, patience: float = 2.0) -> None:
        self._backend = backend
        self._alarm = alarm
        self._client = backend.client_with(
            socket_timeout=patience, socket_connect_timeout=patience, max_connections=None, retry_on_timeout=False
        )
        self._patience = patience
        self._pubsub: Any = None
        self._ids: dict[bytes, str] = {}
        self._new: dict[bytes, None] = {}
        self._gone: dict[bytes, None] = {}
        self._unconfirmed: dict[bytes, float] = {}
        self._confirmed: dict[bytes, None] = {}
        self._check_at = 0.0
        self._asking_since: float | None = None

    @property
    def owing_since(self) -> float | None:
        """When the oldest unanswered question was put."""
        if self._asking_since is not None:
            return self._asking_since
        for since in tuple(self._unconfirmed.values()):
            return since
        return None

    def add(self, task_ids: Iterable[str]) -> None:
        for task_id in task_ids:
            key = self._backend.get_key_for_task(task_id)
            self._ids[key] = task_id
            self._new[key] = None
            self._gone.pop(key, None)
        self._check_at = time.monotonic() + _FIRST_CHECK

    def drop(self, task_ids: Iterable[str]) -> None:
        for task_id in task_ids:
            self._drop_key(self._backend.get_key_for_task(task_id))

    def _drop_key(self, key: bytes) -> None:
        self._ids.pop(key, None)
        self._confirmed.pop(key, None)
        if self._new.pop(key, False) is False:
            self._gone[key] = None

    def step(self, timeout: float) -> Mapping[str, Outcome]:
        found: dict[str, Outcome] = {}
        self._settle_subscriptions()
        self._read(found)
        self._fetch(found)
        if not found and not self._new:
            self._sleep(timeout)
            self._read(found)
            self._fetch(found)
        self._alarm.hush()
        self._check()
        return found

    def _settle_subscriptions(self) -> None:
        if not (self._new or self._gone):
            return
        if self._pubsub is None:
            self._pubsub = self._client.pubsub()
            self._gone.clear()
            self._new = dict.fromkeys(self._ids)
        now = time.monotonic()
        for batch in _batches(self._new):
            self._pubsub.subscribe(*batch)
            self._unconfirmed.update(dict.fromkeys(batch, now))
        self._new.clear()
        for batch in _batches(self._gone):
            self._pubsub.unsubscribe(*batch)
        self._gone.clear()

    def _read(self, found: dict[str, Outcome]) -> None:
        pubsub = self._pubsub
        while pubsub is not None and pubsub.subscribed and pubsub.connection.can_read(timeout=0):
            message = pubsub.get_message(timeout=0)
            if message is None:
                continue
            key = _bytes(message["channel"])
            if message["type"] == "subscribe":
                self._unconfirmed.pop(key, None)
                if key in self._ids:
                    self._confirmed[key] = None
            elif message["type"] == "message" and key in self._ids:
                self._take(key, message["data"], found)

    def _fetch(self, found: dict[str, Outcome]) -> None:
        keys, self._confirmed = self._confirmed, {}
        for key, value in self._values(keys):
            task_id = self._ids.get(key)
            if task_id is not None and not self._take(key, value, found):
                found[task_id] = None

    def _take(self, key: bytes, value: Any, found: dict[str, Outcome]) -> bool:
        outcome = self._decoded(value) if value else None
        if outcome is None or not is_ready(outcome):
            return False
        found[self._ids[key]] = outcome
        self._drop_key(key)
        return True

    def _check(self) -> None:
        if not self._ids or time.monotonic() < self._check_at:
            return
        self._check_at = time.monotonic() + _NEXT_CHECKS
        oldest = self.owing_since
        if oldest is not None and time.monotonic() - oldest > self._patience:
            raise TimeoutError("Redis does not confirm a subscription")
        self._confirmed.update(dict.fromkeys(key for key in self._ids if key not in self._unconfirmed))

    def _sleep(self, timeout: float) -> None:
        if self._ids:
            timeout = min(timeout, max(0.0, self._check_at - time.monotonic()))
        # The socket is private to redis-py, which has no other way to wait for two things at once.
        line = getattr(getattr(self._pubsub, "connection", None), "_sock", None)
        if line is None:
            self._alarm.wait(min(timeout, 0.05) if self._ids else timeout)
            return
        with selectors.DefaultSelector() as selector:
            selector.register(self._alarm, selectors.EVENT_READ)
            selector.register(line, selectors.EVENT_READ)
            selector.select(timeout)

    def look(self, task_ids: Iterable[str]) -> Mapping[str, Outcome]:
        ids = {self._backend.get_key_for_task(task_id): task_id for task_id in task_ids}
        return {ids[key]: self._decoded(value) for key, value in self._values(ids) if value}

    def _values(self, keys: Iterable[bytes]) -> Iterable[tuple[bytes, Any]]:
        for batch in _batches(keys):
            self._asking_since = time.monotonic()
            values = self._client.mget(batch)
            self._asking_since = None
            yield from zip(batch, values, strict=True)

    def _decoded(self, value: Any) -> Outcome:
        try:
            return self._backend.decode_result(value)
        except Exception as exc:  # noqa: BLE001
            # One broken result fails those who wait for it, nobody else.
            return exc

    def reset(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        with suppress(Exception):
            if pubsub is not None:
                pubsub.close()
            self._client.connection_pool.disconnect()
        self._asking_since = None
        self._unconfirmed.clear()
        self._confirmed.clear()
        self._gone.clear()
        self._new = dict.fromkeys(self._ids)

    def close(self) -> None:
        self._ids.clear()
        self.reset()


def _batches(keys: Iterable[bytes]) -> Iterable[list[bytes]]:
    everything = list(keys)
    return (everything[start : start + _BATCH] for start in range(0, len(everything), _BATCH))
