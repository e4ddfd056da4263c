"""The Celery app under a bridge: an ordinary ``celery.Celery`` whose few seams are ours.

What differs from plain Celery, and nothing else: connections and pools (``qbridge.amqp``), result backend classes
chosen by URL scheme, one reply queue per process, settings that may be assigned at any time, native delays that are
declared by the producer too, a pickle that finds the app again, and no process-wide state but filling the void where
no app is current at all.
"""

# long because: it is the one seam to Celery's app, and all that differs is in this one place.

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

from celery import Celery, _state
from celery.app.defaults import NAMESPACES
from celery.app.registry import TaskRegistry
from celery.app.utils import Settings, _old_key_to_new
from celery.backends.base import DisabledBackend
from celery.utils.imports import import_from_cwd
from celery.utils.time import maybe_iso8601
from kombu.entity import Queue as KombuQueue

from qbridge.amqp import BridgeAMQP, BridgeConnectionPool
from qbridge.backends.deadline import bounded
from qbridge.backends.rabbitmq.delays import NativeDelays
from qbridge.config import WorkerConfig
from qbridge.exceptions import ConfigurationError
from qbridge.producer import turn_away
from qbridge.serialization.lock import Lock
from qbridge.serialization.results import TypedResultMixin

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

_NOT_THE_BACKENDS = ("task_", "worker_", "beat_", "broker_", "control_", "event_", "security_")
_BACKENDS = tuple(f"{name}_" for name in NAMESPACES if f"{name}_" not in _NOT_THE_BACKENDS)
"""What names of settings that a result backend may read begin with."""


class BridgeSettings(Settings):
    """Celery's settings, which tell the app what changed, and are not overruled by environment variables.

    Celery's own tell of ``update`` only. That ``CELERY_BROKER_URL`` and its like agree with the configuration is
    checked where it is made (``qbridge.config.environment``); a URL assigned later is what was meant.
    """

    def _tell(self, keys: Iterable[Any] | None) -> None:
        tell = self.__dict__.get("_changed")
        if tell is None:
            return
        prefix = self.prefix or ""
        tell(None if keys is None else {_old_key_to_new(str(key).removeprefix(prefix)).lower() for key in keys})

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._tell([key])

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self._tell([key])

    def pop(self, key: str, *default: Any) -> Any:
        value = super().pop(key, *default)
        self._tell([key])
        return value

    def update(self, *args: Any, **kwargs: Any) -> Any:
        changes = dict(*args, **kwargs)
        super().update(changes)
        self._tell(changes)

    def clear(self) -> None:
        super().clear()
        self._tell(None)

    def add_defaults(self, d: Any) -> None:
        super().add_defaults(d)
        self._tell(None)

    broker_url: Any = property(lambda self: self.first("broker_url", "broker_host"))
    broker_read_url: Any = property(lambda self: self.get("broker_read_url") or self.broker_url)
    broker_write_url: Any = property(lambda self: self.get("broker_write_url") or self.broker_url)
    result_backend: Any = property(lambda self: self.first("result_backend", "CELERY_RESULT_BACKEND"))


class BridgeRegistry(TaskRegistry):
    """Celery's registry of tasks, which knows what a task has from the settings: Celery copies it once, for good."""

    def __setitem__(self, name: str, task: Any) -> None:
        kind = type(task)
        if "_from_settings" not in vars(kind):
            kind._from_settings = {attr: key for attr, key in kind.from_config if getattr(kind, attr, None) is None}
        super().__setitem__(name, task)

    def follow(self, conf: Any, names: set[str] | None) -> None:
        """Copy it again, after settings (None: any) changed."""
        for task in list(self.values()):
            task._exec_options = None
            kind = type(task)
            for attr, key in vars(kind).get("_from_settings", {}).items():
                if kind.__bound__ and (names is None or key in names):
                    setattr(kind, attr, conf[key])


class BridgeCelery(Celery):
    """A Celery app with private pools; made by a bridge, usable wherever Celery expects an app.

    Args:
        main: name of the main module, as Celery's.
        bridge_options: class attributes below, for this app, set before anything is derived from them.
    """

    amqp_cls = BridgeAMQP
    registry_cls = BridgeRegistry

    #: True under ``defaults="safe"``.
    safe = False
    max_payload_bytes: int | None = None
    #: The bridge's ``WorkerConfig``, for what Celery has no setting for; None: without a bridge.
    worker_config: WorkerConfig | None = None
    #: Process and thread in which a worker's loop runs; None: no worker of this app has begun to consume here.
    worker_loop: tuple[int, int] | None = None
    #: The keys of the locked wire; None: nothing is signed.
    lock: Lock | None = None
    #: Workers of this app that run in threads of this process.
    in_process_workers = 0
    holder = ""  #: What this process's worker is called in claims; empty: it makes none.
    #: Seconds for which a task that a worker does not know is left to others.
    unknown_task_grace = 0.0
    #: Makes the queues that the bridge knows, given the name of the default queue; None: Celery's own way.
    make_queues: Callable[[str], Queues] | None = None
    #: Seconds to wait for the confirmation of a task message; None: do not confirm.
    confirm_timeout: float | None = None
    #: Seconds that an attempt to publish may take beyond the deadline of its call.
    attempt_takes: float = 0.0
    #: Transport options for connections that publish, over those of the configuration.
    write_transport_options: Mapping[str, Any] = {}

    _pool: BridgeConnectionPool | None
    _backend: Any
    _tasks: BridgeRegistry

    def __init__(
        self, main: str | None = None, *, bridge_options: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        for name, value in (bridge_options or {}).items():
            setattr(self, name, value)
        self._bridge_options = dict(bridge_options or {})
        self.pools_lock: Any = threading.RLock()
        self.native_delays: NativeDelays = NativeDelays(self)
        kwargs["set_as_current"] = False
        super().__init__(main, **kwargs)
        self._watch(self._conf)
        # per instance: the loader is a class attribute's instance of this app only
        self.loader.override_backends = dict(RESULT_BACKENDS)
        if _state.default_app is None and _state._tls.current_app is None:
            # Without any app, Celery would make up one on amqp://localhost for @shared_task and current_app.
            self.set_default()

    # -- settings that may change at run time

    def _watch(self, conf: Any) -> None:
        object.__setattr__(conf, "__class__", BridgeSettings)  # assigned plainly it would become a setting
        conf.__dict__["_changed"] = self._settings_changed

    def _load_config(self) -> Any:
        conf = super()._load_config()
        self._watch(conf)
        self._settings_changed(None)  # read anew after something was derived from others: config_from_object
        return conf

    def _settings_changed(self, names: set[str] | None) -> None:
        """Forget what was derived from settings.

        Args:
            names: of the settings, new style, lower case; None: any.
        """
        if not self.configured:
            return  # nothing was derived
        amqp: Any = self.__dict__.get("amqp")
        if amqp is not None:
            if names is None or names & _ROUTING:
                amqp.forget_derived("queues", "default_queue", "default_exchange", "router")
            if names is None or "task_routes" in names:
                amqp._rtable = None
                amqp.forget_derived("router")
            amqp.forget_derived("send_task_message", "create_task_message", "utc")
        for name in ("timezone", "annotations", "control", "extends_results"):
            self.__dict__.pop(name, None)
        if names is None or any(name.startswith("broker_") for name in names):
            self.drop_connections()
        if names is None or any(name.startswith(_BACKENDS) for name in names):
            self._forget_backend()
        self._tasks.follow(self._conf, names)

    @cached_property
    def extends_results(self) -> bool:
        """Whether results tell their task and its arguments; Celery looks the setting up for each of them."""
        return bool(self.conf.result_extended)

    def now(self) -> datetime:
        """Return the present moment in the app's time zone; Celery converts it twice."""
        return datetime.now(self.timezone)

    @property
    def backend(self) -> Any:
        """The app's result backend: one, also where several threads ask for the first time at once.

        Celery would make one for each, and keep the last: connections of the others are closed by nobody.
        """
        backend = self._backend
        if backend is None:
            with self.pools_lock:
                backend = self._backend
                if backend is None:
                    backend = self._backend = self._get_backend()
        return backend

    def _forget_backend(self) -> None:
        self._backend_cache = None
        self._local = threading.local()  # a backend that is not thread-safe is kept per thread

    # -- pools that belong to this app

    @property
    def pool(self) -> Any:
        """The app's broker connections (kombu's own pools are process-wide and shared by URL)."""
        pool = self._pool
        if pool is None:
            with self.pools_lock:
                pool = self._pool
                if pool is None:
                    self._ensure_after_fork()
                    limit = self.conf.broker_pool_limit
                    pool = self._pool = BridgeConnectionPool(self.connection_for_write(), limit=limit)
        return pool

    def _connection(self, *args: Any, **kwargs: Any) -> Any:
        connection = super()._connection(*args, **kwargs)
        connection.max_payload_bytes = self.max_payload_bytes
        return connection

    def connection_for_write(self, url: str | None = None, **kwargs: Any) -> Any:
        """Return a connection for publishing; its waits are short, a consumer's are not."""
        if self.write_transport_options:
            kwargs["transport_options"] = {**self.write_transport_options, **(kwargs.get("transport_options") or {})}
        return super().connection_for_write(url, **kwargs)

    def _acquire_producer(self, timeout: float | None = None) -> Any:
        while True:
            pool = self.amqp.producer_pool
            try:
                return super()._acquire_producer(self._for_a_whole_attempt(bounded(timeout)))
            except (RuntimeError, IndexError):
                # a setting was assigned in another thread, between the look at the pool and its use (kombu empties the
                # pool without a lock: who has just seen something in it finds nothing)
                if pool is self.amqp.producer_pool:
                    raise

    def _for_a_whole_attempt(self, timeout: float | None) -> float | None:
        """Return how long to wait for a producer: one that comes when the time is nearly up would overrun it."""
        return timeout if timeout is None else max(timeout - self.attempt_takes, 0.01)

    def drop_connections(self) -> None:
        """Close all pooled connections, those in use when they come back; the next send opens new ones."""
        with self.pools_lock:
            pool, self._pool = self._pool, None
            amqp: Any = self.__dict__.get("amqp")
            if amqp is not None:
                producers, amqp._producer_pool = amqp._producer_pool, None
                if producers is not None:
                    producers.force_close_all()
                    turn_away(producers)
            self.__dict__.pop("control", None)  # its mailbox keeps the pool of producers
        if pool is not None:
            pool.retire()

    def forget_connections(self) -> None:
        """In a forked child: let go of the parent's connections without speaking on them."""
        self.pools_lock = threading.RLock()
        self._finalize_mutex = threading.RLock()
        self._pool = None
        self._forget_backend()
        for name in ("oid", "control"):
            self.__dict__.pop(name, None)
        amqp: Any = self.__dict__.get("amqp")
        if amqp is not None:
            amqp._producer_pool = None

    def close(self) -> None:
        """Close connections, leave Celery's register of apps, and give back the place of the default app."""
        self.drop_connections()
        close = getattr(self._backend, "close", None)  # one that was never made has nothing to close
        if close is not None:
            close()
        self._forget_backend()
        if _state.default_app is self:
            _state.set_default_app(None)
        if _state._tls.current_app is self:
            _state._set_current_app(None)
        super().close()

    # -- other processes

    def __reduce__(self) -> Any:
        """Pickle where the app is found: its typed tasks and queues are code, a copy would have none of them.

        Workers with ``worker_pool_start_method='spawn'`` send the app to their children. An app that no module holds
        is pickled as Celery does it.
        """
        place = _place_of(self)
        return super().__reduce__() if place is None else (_from_place, place)

    def __reduce_keys__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self._bridge_options.items() if name != "make_queues"}
        return {**super().__reduce_keys__(), "bridge_options": kept}

    def _get_backend(self) -> Any:
        backend = super()._get_backend()
        if self.lock is not None and not isinstance(backend, TypedResultMixin | DisabledBackend):
            raise ConfigurationError(
                f"the result backend {type(backend).__module__} does not sign results, and this bridge has "
                "signing_keys",
                "Use rpc, Redis or a database.",
            )
        return backend

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

    @property
    def publish_timeout(self) -> float | None:
        """Seconds a send may take in all; None: Celery's own bounds."""
        return self.confirm_timeout

    # -- sending

    def send_task(self, name: str, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send a task by name: Celery's, with delays that work from the first send on and below one second."""
        if not self.safe or not (options.get("countdown") or options.get("eta")):
            return super().send_task(name, args, kwargs, **options)
        self._prepare_delay(options)
        try:
            return super().send_task(name, args, kwargs, **options)
        except Exception:
            self.native_delays.forget()
            raise

    def _prepare_delay(self, options: dict[str, Any]) -> None:
        eta = options.get("eta")
        if isinstance(eta, str):
            eta = maybe_iso8601(eta)
        if eta is None:
            eta = datetime.now(UTC) + timedelta(seconds=float(options["countdown"]))
        elif eta.tzinfo is None:
            eta = eta.replace(tzinfo=self.timezone)
        options.pop("countdown", None)
        options["eta"] = eta
        if not self.native_delays.prepare(_seconds_until(eta)) and not self.native_delays.in_use:
            return
        # Celery counts the seconds from the ETA once more, and refuses less than one: they may have become less while
        # the delays were declared. So it is given what is left now, and the ETA as the header that the worker reads.
        del options["eta"]
        options["headers"] = {**(options.get("headers") or {}), "eta": eta.isoformat()}
        left = _seconds_until(eta)
        if left >= 1:
            options["countdown"] = left


def _seconds_until(moment: datetime) -> float:
    return (moment - datetime.now(UTC)).total_seconds()


def _place_of(app: BridgeCelery) -> tuple[str, str] | None:
    """Find the module and the name in it that hold an app, or the bridge over it."""
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] in {"celery", "qbridge"}:
            continue  # where the current app is kept; nothing is there in another process
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is app or (type(value).__module__ == "qbridge.bridge" and vars(value).get("_app") is app):
                return module_name, name
    return None


def _from_place(module: str, name: str) -> BridgeCelery:
    # as workers import their modules: the command line takes the current directory off the path again
    found = getattr(import_from_cwd(module), name)
    app: BridgeCelery = found if isinstance(found, BridgeCelery) else found.celery
    return app
