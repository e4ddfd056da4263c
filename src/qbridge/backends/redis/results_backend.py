"""How are results stored in Redis and read from it: Celery's backend, keys and channels, with ours to wait by."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import cached_property
from typing import Any

from celery.backends.base import Backend
from celery.backends.redis import RedisBackend as CeleryRedisBackend
from celery.backends.redis import ResultConsumer as CeleryResultConsumer
from celery.backends.redis import SentinelBackend as CelerySentinelBackend
from celery.exceptions import BackendStoreError
from celery.states import FAILURE, SUCCESS
from celery.utils.log import get_logger
from kombu.exceptions import DecodeError
from kombu.utils.encoding import bytes_to_str
from redis.exceptions import ResponseError

from qbridge.backends.redis.claim_store import RedisClaims
from qbridge.backends.redis.inherited import not_for_children
from qbridge.backends.redis.scripts import Script, is_forbidden
from qbridge.backends.redis.watcher import RedisWatcher
from qbridge.backends.storing import KeepsOutcomes
from qbridge.backends.watching import Alarm
from qbridge.exceptions import PayloadError
from qbridge.serialization.results import TypedResultMixin

__all__ = ["RedisBackend", "SentinelBackend"]

logger = get_logger(__name__)

_LOOK_AGAIN = 1.0  # seconds

STORE_FIRST = Script("""
local old = redis.call('GET', KEYS[1])
if old then return old end
if ARGV[2] == '0' then redis.call('SET', KEYS[1], ARGV[1]) else redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2]) end
redis.call('PUBLISH', KEYS[1], ARGV[1])
return false
""")
"""Key: of the task. Args: what is stored, seconds to keep it or 0. Answers what was there; then it does nothing.

Celery takes two round trips: it reads first, and decides by that, which another worker may have replaced by then."""


class ResultConsumer(CeleryResultConsumer):
    """Celery's consumer for ``AsyncResult.get``; it looks at the keys too while it waits.

    What is published between a look and the subscription, or during a reconnect, is not published again.

    Any thread that waits reads for all of them. So each value is decoded where it is known whose it is: one that cannot
    be read is the failure of that task.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._decode_result = _as_it_came  # Celery's readers do not say whose it is

    def on_state_change(self, meta: Any, message: Any) -> None:
        """Take a state that was published, or one that was read for a waiter.

        Args:
            meta: what was published, as it came; else a meta.
            message: None, or as it came on the channel of its task.
        """
        if message is not None:
            task_id = self.backend._strip_prefix(message["channel"])
            meta = self._meta_or_failure(task_id, meta)
        elif not isinstance(meta, dict):
            return  # of a new subscription, which is followed by a look
        super().on_state_change(meta, message)

    def _meta_or_failure(self, task_id: str, value: Any) -> dict[str, Any]:
        backend = self.backend
        found: dict[str, Any] = backend.meta_or_failure(
            task_id, lambda: backend._own(backend.decode_result(value), task_id)
        )
        return found

    def _reconnect_pubsub(self) -> None:
        super()._reconnect_pubsub()
        self._look_at_pending()

    def drain_events_until(self, p: Any, timeout: float | None = None, on_interval: Any = None) -> Any:
        looked_at = time.monotonic()

        def look_again() -> None:
            nonlocal looked_at
            if on_interval is not None:
                on_interval()
            if time.monotonic() - looked_at >= _LOOK_AGAIN:
                looked_at = time.monotonic()
                self._look_at_pending()

        return super().drain_events_until(p, timeout=timeout, on_interval=look_again)

    def stop(self) -> None:
        """Close the subscription for good: a result object that is dropped later must not open it again."""
        super().stop()
        self._pubsub = None
        self.subscribed_to.clear()

    def _look_at_pending(self) -> None:
        ids = [task_id for pending in self._pending_results for task_id in tuple(pending)]
        if not ids:
            return
        backend = self.backend
        with suppress(*backend.connection_errors):  # the subscription reconnects by itself
            values = backend.client.mget([backend.get_key_for_task(task_id) for task_id in ids])
            for task_id, value in zip(ids, values, strict=True):
                if value:
                    meta = self._meta_or_failure(task_id, value)
                    if meta["status"] in backend.READY_STATES:
                        self.on_state_change(meta, None)


def _as_it_came(payload: Any) -> Any:
    return payload


class RedisBackend(KeepsOutcomes, TypedResultMixin, CeleryRedisBackend):
    """Celery's Redis results: the same keys, the same ``SET`` and ``PUBLISH``, one object for all threads."""

    ResultConsumer = ResultConsumer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.thread_safe = True
        self._may_run_scripts = True

    @cached_property
    def retry_policy(self) -> Any:  # kombu's cached_property
        """Celery's, with an end: against a frozen server each attempt takes ``redis_socket_timeout``."""
        return {**Backend.retry_policy, "timeout": 30.0, **(self._transport_options.get("retry_policy") or {})}

    def on_task_call(self, producer: Any, task_id: str) -> Any:
        """Do nothing: who waits subscribes then, and looks at the key.

        Celery subscribes at each send, which costs a command per send and one more for every result nobody waits for.
        Under ``defaults="celery"`` nothing is done otherwise than there.
        """
        if not getattr(self.app, "safe", True):
            super().on_task_call(producer, task_id)

    def _set(self, key: Any, value: Any, expires: int | None = None) -> None:
        # Celery's own calls SETEX, which redis-py deprecates: under -W error no result would be stored.
        seconds = self.expires if expires is None else expires
        with self.client.pipeline() as pipe:
            pipe.set(key, value, ex=seconds or None)
            pipe.publish(key, value)
            pipe.execute()

    def _store_result(
        self, task_id: Any, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Store a state as Celery does, never over a success; but the first one of a task in one step."""
        value, traceback = self.locked(task_id, state, result, traceback, request)
        meta = self._get_result_meta(result=value, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        if self.lock is not None:
            meta["children"] = None
        key, encoded = self.get_key_for_task(task_id), self.encode(meta)
        try:
            old = self._stored_first(key, encoded, state)
            if old is not None and not self._is_success(old, task_id):
                self._set_with_state(key, encoded, state)
        except BackendStoreError as error:
            raise BackendStoreError(str(error), state=state, task_id=task_id) from error
        return result

    def _stored_first(self, key: Any, value: Any, state: str) -> Any:
        """Store and announce what nothing was stored for before, and return None; else what is there.

        A list or a hash under the key is not Celery's, and counts as nothing: ``SET`` puts the outcome in its place.
        """
        try:
            return self._stored_first_or_value(key, value, state)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):  # servers before 7 say first in which script
                raise
            told = bytes_to_str(key)
            logger.warning("Key %s held no string: it is somebody else's, and the task's result replaces it", told)
            return b""

    def _stored_first_or_value(self, key: Any, value: Any, state: str) -> Any:
        if self._may_run_scripts and len(value) <= self._MAX_STR_VALUE_SIZE:
            seconds = self.failure_expires if state == FAILURE else None
            seconds = self.expires if seconds is None else seconds
            try:
                return self.ensure(STORE_FIRST.run, (self.client, [key], [value, seconds or 0]))
            except ResponseError as error:
                if not _has_no_scripts(error):
                    raise
                self._may_run_scripts = False
        return self.get(key) or b""

    def _is_success(self, stored: Any, task_id: Any) -> bool:
        if not stored:
            return False
        try:
            return bool(self._own(self.decode_result(stored), task_id)["status"] == SUCCESS)
        except PayloadError:
            if self.lock is None:
                raise  # somebody has keys, and may have stored a success
            return False  # it is not from a holder of the keys: this one takes its place
        except DecodeError:
            logger.warning("What was stored for task %s cannot be read, and its new state replaces it", task_id)
            return False

    def _get_task_meta_for(self, task_id: Any) -> Any:
        meta = self._own(super()._get_task_meta_for(task_id), task_id)
        self.see_children(meta)
        meta["task_id"] = bytes_to_str(task_id)  # Celery hands it to who waits for the id that is in it
        return meta

    def _own(self, meta: Any, task_id: Any) -> Any:
        if self.lock is not None and meta.get("task_id", task_id) != task_id:
            raise PayloadError(f"the result of task {task_id} is that of another task, put in its place")
        return meta

    def _get_pool(self, **params: Any) -> Any:
        return not_for_children(super()._get_pool(**params))

    def client_with(self, **changes: Any) -> Any:
        """A client of its own, with other connection parameters where the kind of connection has them."""
        params = {**self.connparams, **changes}
        if "path" in params:
            params.pop("socket_connect_timeout", None)  # a unix socket has none
        return self._create_client(**params)

    def result_watcher(self, alarm: Alarm) -> RedisWatcher:
        """What the result hub waits with."""
        return RedisWatcher(self, alarm)

    def claim_store(self) -> RedisClaims:
        """What keeps claims beside the results."""
        return self._claims

    @cached_property
    def _claims(self) -> RedisClaims:
        return RedisClaims(self)

    def close(self) -> None:
        """Close all connections; a later use opens new ones."""
        with suppress(Exception):
            self.result_consumer.stop()
        # Looked up where it is cached: closing must not make a client.
        client = self.__dict__.get("client")
        if client is not None:
            with suppress(Exception):
                client.connection_pool.disconnect()


def _has_no_scripts(error: ResponseError) -> bool:
    """Tell whether the account, the server or a proxy before it runs no scripts, or not one that announces."""
    return is_forbidden(error) or any(
        words in str(error) for words in ("executing the script can't", "unknown command")
    )


class SentinelBackend(RedisBackend, CelerySentinelBackend):
    """The same with Sentinels that know where the master is."""
