"""The Celery app under a bridge: an ordinary ``celery.Celery`` whose few seams are ours.

What differs from plain Celery, and nothing else: connections and pools (``qbridge.amqp``), result backend classes
chosen by URL scheme, one reply queue per process, settings that may be assigned at any time, native delays that are
declared by the producer too, and no process-wide state but filling the void where no app is current at all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

from celery import Celery, _state
from celery.utils.time import maybe_iso8601
from kombu import Exchange
from kombu import Queue as KombuQueue
from kombu.transport.native_delayed_delivery import (
    bind_queue_to_native_delayed_delivery_exchange,
    declare_native_delayed_delivery_exchanges_and_queues,
)

from qbridge.amqp import BridgeAMQP, BridgeConnectionPool
from qbridge.backends.deadline import bounded

__all__ = ["BridgeCelery"]

Queues = tuple[Iterable[KombuQueue], Iterable[str]]
"""Queues to know, and the names among them that a worker leaves to others unless told."""

RESULT_BACKENDS = {
    "redis": "qbridge.backends.redis.results_backend:RedisBackend",
    "rediss": "qbridge.backends.redis.results_backend:RedisBackend",
    "sentinel": "qbridge.backends.redis.results_backend:SentinelBackend",
    "db": "qbridge.backends.database.backend:DatabaseBackend",
    "database": "qbridge.backends.database.backend:DatabaseBackend",
    "rpc": "qbridge.backends.rpc.backend:RPCBackend",
}
"""Our classes for Celery's result backend schemes; the URL stays what Celery and Flower expect."""

_ROUTING = frozenset({
    "task_queues", "task_default_queue", "task_default_exchange", "task_default_exchange_type",
    "task_default_routing_key", "task_create_missing_queues", "task_create_missing_queue_type",
    "task_create_missing_queue_exchange_type", "task_queue_max_priority", "task_default_queue_type",
})  # fmt: skip


class _WatchedDict(dict[str, Any]):
    """A dict that says when it changed: Celery's own views notify on ``update`` only."""

    def __init__(self, values: Mapping[str, Any], changed: Callable[[Iterable[str]], None]) -> None:
        super().__init__(values)
        self._changed = changed

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._changed([key])

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._changed([key])

    def update(self, *args: Any, **kwargs: Any) -> None:
        values = dict(*args, **kwargs)
        super().update(values)
        self._changed(values)

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, *default: Any) -> Any:
        value = super().pop(key, *default)
        self._changed([key])
        return value

    def clear(self) -> None:
        keys = list(self)
        super().clear()
        self._changed(keys)


class BridgeCelery(Celery):
    """A Celery app with private pools; made by a bridge, usable wherever Celery expects an app.

    Args:
        main: name of the main module, as Celery's.
        bridge_options: class attributes below, for this app, set before anything is derived from them.
    """

    amqp_cls = BridgeAMQP

    #: True under ``defaults="safe"``.
    safe = False
    max_payload_bytes: int | None = None
    #: Seconds a send may take in all; None: Celery's own bounds.
    publish_timeout: float | None = None
    #: Workers of this app that run in threads of this process.
    in_process_workers = 0
    #: Makes the queues that the bridge knows, given the name of the default queue; None: Celery's own way.
    make_queues: Callable[[str], Queues] | None = None
    #: Seconds to wait for the confirmation of a task message; None: do not confirm.
    confirm_timeout: float | None = None
    #: Transport options for connections that publish, over those of the configuration.
    write_transport_options: Mapping[str, Any] = {}

    def __init__(
        self, main: str | None = None, *, bridge_options: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        for name, value in (bridge_options or {}).items():
            setattr(self, name, value)
        self._pools_lock = threading.RLock()
        self._delays_declared_on: Any = None
        kwargs["set_as_current"] = False
        super().__init__(main, **kwargs)
        # per instance: the loader is a class attribute's instance of this app only
        self.loader.override_backends = dict(RESULT_BACKENDS)
        if _state.default_app is None and _state._tls.current_app is None:
            # Without any app, Celery would make up one on amqp://localhost for @shared_task and current_app.
            self.set_default()

    # -- settings that may change at run time

    def _load_config(self) -> Any:
        conf = super()._load_config()
        changes = _WatchedDict(conf.changes, self._settings_changed)
        conf.__dict__["changes"] = changes
        conf.maps[0] = changes
        return conf

    def _settings_changed(self, keys: Iterable[str]) -> None:
        names = {str(key).lower() for key in keys}
        amqp: Any = self.__dict__.get("amqp")
        if amqp is not None:
            if names & _ROUTING:
                amqp.forget_derived("queues", "default_queue", "default_exchange", "router")
            if "task_routes" in names:
                amqp._rtable = None
                amqp.forget_derived("router")
            amqp.forget_derived("send_task_message", "create_task_message", "utc")
        if any(name.startswith("broker_") for name in names):
            self.drop_connections()
        if any(name.startswith(("result_", "redis_", "database_")) for name in names):
            self._forget_backend()
        for task in self._tasks.values():
            task._exec_options = None

    def _forget_backend(self) -> None:
        self._backend_cache = None
        self._local.__dict__.pop("backend", None)

    # -- pools that belong to this app

    @property
    def pool(self) -> Any:
        """The app's broker connections (kombu's own pools are process-wide and shared by URL)."""
        if self._pool is None:
            with self._pools_lock:
                if self._pool is None:
                    self._ensure_after_fork()
                    self._pool = BridgeConnectionPool(self.connection_for_write(), limit=self.conf.broker_pool_limit)
        return self._pool

    def connection_for_write(self, url: str | None = None, **kwargs: Any) -> Any:
        """Return a connection for publishing; its waits are short, a consumer's are not."""
        if self.write_transport_options:
            kwargs["transport_options"] = {**self.write_transport_options, **(kwargs.get("transport_options") or {})}
        return super().connection_for_write(url, **kwargs)

    def _acquire_producer(self, timeout: float | None = None) -> Any:
        return super()._acquire_producer(bounded(timeout))

    def drop_connections(self) -> None:
        """Close all pooled connections; the next send opens new ones."""
        with self._pools_lock:
            pool, self._pool = self._pool, None
            amqp: Any = self.__dict__.get("amqp")
            if amqp is not None:
                producers, amqp._producer_pool = amqp._producer_pool, None
                if producers is not None:
                    producers.force_close_all()
            if pool is not None:
                pool.force_close_all()
            self._delays_declared_on = None

    def forget_connections(self) -> None:
        """In a forked child: let go of the parent's connections without speaking on them."""
        self._pools_lock = threading.RLock()
        self._pool = None
        self._delays_declared_on = None
        self._local = threading.local()
        self._backend_cache = None
        self.__dict__.pop("oid", None)
        amqp: Any = self.__dict__.get("amqp")
        if amqp is not None:
            amqp._producer_pool = None

    def close(self) -> None:
        """Close pools and leave Celery's register of apps."""
        self.drop_connections()
        if _state.default_app is self:
            _state.default_app = None
        super().close()

    @cached_property
    def Worker(self) -> Any:  # noqa: N802 - Celery's name
        """The worker class that ``celery worker`` and ``qbridge worker`` start."""
        if not self.safe:
            return self.subclass_with_self("celery.apps.worker:Worker")
        return self.subclass_with_self("qbridge.worker.main:BridgeWorker", name="Worker")

    @property
    def thread_oid(self) -> str:
        """The reply address: one per process, not per thread, so that any thread can fetch a result."""
        return str(self.oid)

    # -- sending

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send a task by name: Celery's, with delays that work from the first send on and below one second."""
        if self.safe and (options.get("countdown") or options.get("eta")):
            self._prepare_delay(options)
        return super().send_task(name, args, kwargs, **options)

    def _prepare_delay(self, options: dict[str, Any]) -> None:
        eta = options.get("eta")
        if isinstance(eta, str):
            eta = maybe_iso8601(eta)
        if eta is None:
            eta = datetime.now(UTC) + timedelta(seconds=float(options["countdown"]))
        elif eta.tzinfo is None:
            eta = eta.replace(tzinfo=self.timezone)
        delay = (eta - datetime.now(UTC)).total_seconds()
        options.pop("countdown", None)
        options["eta"] = eta
        if not any(
            (queue.queue_arguments or {}).get("x-queue-type") == "quorum" for queue in self.amqp.queues.values()
        ):
            return
        if delay < 1:
            # RabbitMQ's native delays are whole seconds and Celery refuses less; the worker holds the rest by the header.
            del options["eta"]
            options["headers"] = {**(options.get("headers") or {}), "eta": eta.isoformat()}
        else:
            self._declare_delays()

    def _declare_delays(self) -> None:
        """Declare native delayed delivery before the first delayed message (Celery leaves it to a worker's start).

        Topology and names: kombu's ``native_delayed_delivery``; a message to exchanges that do not exist would be refused.
        """
        pool = self.pool
        if self._delays_declared_on is pool:
            return
        with pool.acquire(block=True, timeout=bounded(None)) as connection:
            if connection.transport.driver_type != "amqp":
                return
            declare_native_delayed_delivery_exchanges_and_queues(
                connection, self.conf.broker_native_delayed_delivery_queue_type
            )
            for queue in self.amqp.queues.values():
                bound = queue.bind(connection.default_channel)
                exchange: Exchange = bound.exchange
                if exchange.type != "direct":
                    bound.declare()
                    bind_queue_to_native_delayed_delivery_exchange(connection, bound)
        self._delays_declared_on = pool
