"""What users hold: the bridge between typed tasks and a Celery app."""

# long because: it is the whole of what users hold; what it does is elsewhere, here it is only put together.

from __future__ import annotations

import asyncio
import os
import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload
from uuid import uuid4
from zoneinfo import ZoneInfo

from celery import Celery
from celery.backends.base import DisabledBackend

from qbridge.backends.embedded import EmbeddedBroker
from qbridge.batch import send_batch
from qbridge.celery_app import BridgeCelery
from qbridge.celery_settings import app_settings, payload_limit
from qbridge.celery_task import TypedTask, typed_task
from qbridge.config import BridgeConfig, QueueConfig
from qbridge.config.cross_checks import outlived
from qbridge.dead_letters import DeadLetters
from qbridge.due_by import HEADER_DEADLINE, as_deadline
from qbridge.exceptions import ConfigurationError, PayloadError, UnsupportedFeature
from qbridge.once import SendOnce, key_of, refuse_keys
from qbridge.options import SendOptions, checked_send_options
from qbridge.queues import KnownQueues
from qbridge.readers import EagerReader, HubReader, NoReader
from qbridge.report import Report
from qbridge.result import ResultReader, TaskResult
from qbridge.revoked import remember_revoked
from qbridge.sending import Attempts, SendingThreads, attempt_takes
from qbridge.serialization.header_limits import SENT_HEADER_OCTETS, SENT_HEADERS, header_fault
from qbridge.serialization.signature import result_decoder
from qbridge.task import Call, Declares, Item, Task, TaskDefinition, TaskSet, keep_unique, make_task

__all__ = ["Bridge"]

R = TypeVar("R")


class Bridge(Declares):
    """Typed tasks on one broker with one result backend.

    Construction reads the configuration and opens nothing; connections begin with the first send, get, check or
    worker. Several bridges in one process share neither pools nor tasks nor settings. Safe in threads and after fork.

    Args:
        config: None: from ``QBRIDGE_*`` variables, ``.env``, ``qbridge.toml`` and ``[tool.qbridge]``.

    Raises:
        ConfigurationError: if the configuration cannot work, or is none.
    """

    def __init__(self, config: BridgeConfig | None = None) -> None:
        self._config = _configuration(config)
        self._tasks: dict[str, Task[Any, Any]] = {}
        self._celery_tasks: dict[str, TypedTask] = {}
        self._undeclared: dict[str, TaskDefinition] = {}
        self._queues = KnownQueues(self._config, lambda: [task.definition for task in self._tasks.values()])
        self._lock = threading.RLock()
        self._app: BridgeCelery | None = None
        self._reader: HubReader | None = None
        self._threads = SendingThreads()
        self._warned = False
        self._closed = False
        _bridges.add(self)
        for finding in self._config.findings:
            if finding.level == "error":  # an existing configuration that could not be taken over as it is
                warnings.warn(f"{finding.what}. {finding.todo}", stacklevel=2)

    # -- what it is made of

    @property
    def config(self) -> BridgeConfig:
        """The configuration; frozen."""
        return self._config

    @property
    def tasks(self) -> Mapping[str, Task[Any, Any]]:
        """Declared tasks by name, remote ones included."""
        return dict(self._tasks)

    @property
    def celery(self) -> Celery:
        """The Celery app underneath: ``celery -A proj.tasks worker``, Flower, beat and Sentry work with it."""
        return self._celery()

    def _celery(self) -> BridgeCelery:
        with self._lock:
            if self._app is None:
                self._app = self._make_app()
            return self._app

    def _make_app(self) -> BridgeCelery:
        config = self._config
        safe = config.defaults == "safe"
        settings = app_settings(config)
        app = BridgeCelery(
            config.name,
            changes=settings,
            bridge_options={
                "safe": safe,
                "max_payload_bytes": payload_limit(config),
                "worker_config": config.worker,
                "lock": config.serialization.lock(),
                "confirm_timeout": config.broker.publish_timeout if safe else None,
                "attempt_takes": attempt_takes(config.broker) if safe else 0.0,
                "unknown_task_grace": config.worker.unknown_task_grace,
                "make_queues": self._queues.declarations if safe or self._queues.any_named else None,
            },
        )
        for definition in [task.definition for task in self._tasks.values()]:
            self._attach(app, definition)
        return app

    # -- queues

    def check_queue(self, name: str) -> None:
        """Refuse a queue that nobody declared.

        Raises:
            UnknownQueueError: with a did-you-mean.
        """
        self._queues.refuse_unknown(name, self._app.amqp.queues if self._app is not None else ())

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuse what a message could not be sent with; what Celery adds to its headers is looked at by then.

        Raises:
            UnknownQueueError: if nobody declared the queue.
            PayloadError: if the headers are more than a worker takes.
        """
        if "queue" in options:
            self.check_queue(options["queue"])
        headers = options.get("headers", {}) if self._config.defaults == "safe" else {}
        fault = header_fault(headers, SENT_HEADERS, SENT_HEADER_OCTETS)
        if fault is not None:
            raise PayloadError(f"these headers are not sent: {fault}", "Send a reference to the data, or an argument.")

    def queue_of(self, definition: TaskDefinition) -> str:
        """Return the name of the queue that a task goes to by default."""
        return definition.queue or str(self._celery().conf.task_default_queue)

    # -- declaring tasks

    def _register(self, definition: TaskDefinition) -> Task[Any, Any]:
        with self._lock:
            return self._adopt(make_task(definition, self))

    def include(self, tasks: TaskSet) -> None:
        """Give the tasks of a set a home in this bridge.

        Raises:
            DuplicateTaskError: if a name is taken by another function.
            ConfigurationError: if the set belongs to another bridge, or a result expires before its task's last retry.
        """
        with self._lock:
            for task in tasks.tasks.values():
                task.bind_to(self)
                self._adopt(task)

    def _adopt(self, task: Task[Any, Any]) -> Task[Any, Any]:
        definition = task.definition
        new_queue = definition.queue is not None and definition.queue not in self._queues.configs()
        if definition.queue is not None:
            QueueConfig(definition.queue)  # refuses a name that brokers cannot carry
        if definition.options.get("unique", False) is not False:
            self._refuse_without_claims(definition)
        self._refuse_outlived(definition)
        self._tasks[definition.name] = keep_unique(self._tasks, task)
        if self._app is not None:
            self._attach(self._app, definition)
            if new_queue:
                self._app.make_queues = self._queues.declarations
                self._app.amqp.forget_derived("queues", "default_queue", "router", "send_task_message")
        return task

    def _refuse_without_claims(self, definition: TaskDefinition) -> None:
        results = self._config.results
        if self._config.defaults == "safe" and not results.capabilities.claims:
            raise UnsupportedFeature(
                f"task {definition.name} is unique, and {results.kind} results cannot keep what was sent",
                "Set results to redis://... or to a database.",
            )

    def _refuse_outlived(self, definition: TaskDefinition) -> None:
        retry = definition.options.get("retry")
        if retry is None or definition.options.get("results") is False or self._config.defaults == "celery":
            return
        what = outlived(self._config, retry)
        if what is not None:
            todo = "Write a larger results.expires, or give the task a Retry with fewer or shorter waits."
            raise ConfigurationError(f"task {definition.name}: {what}", todo)

    def _attach(self, app: BridgeCelery, definition: TaskDefinition) -> None:
        task = typed_task(app, self._config, definition)
        self._celery_tasks[definition.name] = task
        if not definition.remote:
            app._tasks[definition.name] = task
            if app.finalized:
                task.bind(app)

    # -- sending

    def send(
        self,
        name: str,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[SendOptions],
    ) -> TaskResult[Any]:
        """Send a task by its name, for names known only at run time.

        Args:
            name: the task's name on the wire.
            args: positional arguments; checked if the task is declared here, else anything with a JSON form.
            kwargs: arguments by name.
            options: see ``SendOptions``.

        Raises:
            ArgumentsError, PayloadError, UnknownQueueError, BrokerUnavailable: as :meth:`Task.delay`.
        """
        given: object = name
        if not isinstance(given, str) or not given:
            raise ConfigurationError(f"{given!r} is not a task's name", "Give the text under which workers know it.")
        known = self._tasks.get(name)
        definition = known.definition if known is not None else self._somebody_elses(name)
        call = Call(definition.signature.encode_call(tuple(args), dict(kwargs or {})))
        return self.send_call(definition, call, options)

    async def asend_call(self, definition: TaskDefinition, call: Call, options: Mapping[str, Any]) -> TaskResult[Any]:
        """Send one encoded call from a thread, so that the event loop is never blocked."""
        sent: TaskResult[Any] = await self._threads.run(self.send_call, definition, call, options)
        return sent

    def send_many(self, *items: Item | Iterable[Item]) -> list[TaskResult[Any]]:
        """Send many calls of any tasks at once.

        Args:
            items: made by ``task.item(...)``, one by one or as iterables of them.

        Raises:
            BatchError: if the broker did not confirm all; names which ids were and which were not.
        """
        return self.send_all(chain.from_iterable((item,) if isinstance(item, Item) else item for item in items))

    def send_all(self, calls: Iterable[tuple[TaskDefinition, Call, Mapping[str, Any]]]) -> list[TaskResult[Any]]:
        """Send encoded calls, pipelined or with batched confirms; see :meth:`send_many`."""
        self._before_send()
        prepared = []
        for definition, call, options in calls:
            refuse_keys(definition, options)
            ready = self._options(definition, options)
            ready.setdefault("task_id", str(uuid4()))
            prepared.append((definition, self._celery_task(definition), call, ready))
        send_batch(self._celery(), self._config.broker, [(task, call, options) for _, task, call, options in prepared])
        return [self._handle(definition, options["task_id"]) for definition, _, _, options in prepared]

    def send_call(self, definition: TaskDefinition, call: Call, options: Mapping[str, Any]) -> TaskResult[Any]:
        """Send one encoded call; what ``Task.delay`` ends in."""
        self._before_send()
        app = self._celery()
        task = self._celery_task(definition)
        ready = self._options(definition, options)
        ready.setdefault("task_id", str(uuid4()))
        args, kwargs = call
        key = key_of(definition, call, ready.pop("idempotency_key", None))
        if app.conf.task_always_eager:
            outcome = task.send_encoded(args, kwargs, **ready)
            return TaskResult(outcome.id, EagerReader(outcome), definition.signature.decode_result, definition.name)

        def publish(options: dict[str, Any]) -> None:
            attempts = Attempts(app, self._config.broker)
            if app.safe:
                attempts.run(partial(task.send_encoded, args, kwargs, retry=False, **options))
            else:
                attempts.once(partial(task.send_encoded, args, kwargs, **options))

        if key is None:
            publish(ready)
        else:
            ready["task_id"] = self._send_once().send(key, ready, publish)
        return self._handle(definition, ready["task_id"])

    def _send_once(self) -> SendOnce:
        results, broker = self._config.results, self._config.broker
        window = float(getattr(results, "expires", 86400.0))
        return SendOnce(
            self._celery(), broker.publish_timeout, max(attempt_takes(broker), 0.05), window,
            lambda id_: str(self._result_reader().look(id_)["status"]),
        )  # fmt: skip

    def _options(self, definition: TaskDefinition, given: Mapping[str, Any]) -> dict[str, Any]:
        options = checked_send_options(given)
        if "queue" in options:
            self.check_queue(options["queue"])
        if "deadline" in options:
            due = as_deadline(options.pop("deadline"), ZoneInfo(self._config.timezone))
            options["headers"] = {**options.get("headers", {}), HEADER_DEADLINE: due.isoformat()}
        level = options.pop("priority", None) or definition.options.get("priority")
        if level is not None:
            queue = options.get("queue") or self.queue_of(definition)
            number = self._queues.priority(level, queue, self._server_version)
            if number is not None:
                options["priority"] = number
        return options

    def _server_version(self) -> tuple[int, ...]:
        """Ask RabbitMQ for its version: the connection has it from the server's greeting."""

        def ask() -> tuple[int, ...]:
            with self._celery().pool.acquire(block=True) as connection:
                text = str(connection.connection.server_properties.get("version", "0"))
            return tuple(int(part) for part in text.split("-", maxsplit=1)[0].split(".") if part.isdigit())

        return Attempts(self._celery(), self._config.broker).run(ask)

    def _celery_task(self, definition: TaskDefinition) -> TypedTask:
        app = self._celery()
        task = self._celery_tasks.get(definition.name)
        if task is None or task.definition is not definition:
            self._attach(app, definition)
            task = self._celery_tasks[definition.name]
        return task

    def _somebody_elses(self, name: str) -> TaskDefinition:
        def anything(*args: Any, **kwargs: Any) -> Any:
            """Somebody else's task."""

        with self._lock:
            if name not in self._undeclared:
                anything.__name__ = name.rpartition(".")[2] or "task"
                self._undeclared[name] = TaskDefinition(anything, {"name": name}, remote=True, known=False)
            return self._undeclared[name]

    def _before_send(self) -> None:
        self._refuse_closed()
        broker = self._config.broker
        # without one defaults="celery" means Celery's own, which is no surprise to those who ask for it
        if not self._warned and self._config.broker_is_default and isinstance(broker, EmbeddedBroker):
            self._warned = True
            warnings.warn(
                f"no broker is configured: tasks go to the embedded one in {broker.path}; set QBRIDGE_BROKER, for "
                "example to amqp://guest:guest@localhost// (or to embedded:// if this is what you want)",
                stacklevel=4,
            )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ConfigurationError("this bridge is closed", "Make a new Bridge; a closed one stays closed.")

    # -- results

    @overload
    def result(self, task_id: str, of: Task[Any, R]) -> TaskResult[R]: ...
    @overload
    def result(self, task_id: str, of: type[R]) -> TaskResult[R]: ...
    @overload
    def result(self, task_id: str, of: None = None) -> TaskResult[Any]: ...

    def result(self, task_id: str, of: Any = None) -> TaskResult[Any]:
        """Return the handle of a task sent earlier or elsewhere.

        Args:
            task_id: its id.
            of: the task, or the type of its result; None: the stored JSON as it is.

        Raises:
            ResultsUnavailable: at once, if the result backend cannot answer for ids of other processes (rpc).
        """
        reader = self._result_reader()
        reader.refuse_unreadable(task_id)
        if isinstance(of, Task):
            return TaskResult(task_id, reader, of.definition.signature.decode_result, of.name)
        return TaskResult(task_id, reader, _as_is if of is None else result_decoder(of))

    def _handle(self, definition: TaskDefinition, task_id: str) -> TaskResult[Any]:
        reader: ResultReader
        nowhere = isinstance(self._celery().backend, DisabledBackend)  # not the config: settings may be assigned
        if nowhere or definition.options.get("results") is False:
            reader = NoReader(definition.name, nowhere, self._revoke)
        else:
            reader = self._result_reader()
        return TaskResult(task_id, reader, definition.signature.decode_result, definition.name)

    def _result_reader(self) -> HubReader:
        with self._lock:
            if self._reader is None:
                self._refuse_closed()
                self._reader = HubReader(self._celery(), self._config.results, self._revoke)
            return self._reader

    def _revoke(self, task_id: str, terminate: bool) -> None:
        self._refuse_closed()
        app = self._celery()
        tell = partial(app.control.revoke, task_id, terminate=terminate)
        if app.safe:
            Attempts(app, self._config.broker).run(tell)
            remember_revoked(app, task_id)
        else:
            tell()

    # -- workers, checks, dead letters, the end

    @property
    def dead_letters(self) -> DeadLetters:
        """The messages that workers have given up: to list, look at, send again, throw away."""
        return DeadLetters(_Place(self))

    def worker(
        self,
        *,
        pool: Literal["thread", "solo"] = "thread",
        concurrency: int = 4,
        queues: Iterable[str] | None = None,
        start_timeout: float = 30.0,
        stop_timeout: float = 30.0,
    ) -> AbstractContextManager[Any]:
        """Run a worker inside this process: for tests, notebooks and small scripts.

        Args:
            pool: ``"thread"`` or ``"solo"``; time limits are not enforced there.
            concurrency: tasks at once.
            queues: names of queues to consume; None: all but those of remote tasks.
            start_timeout: seconds until it must consume.
            stop_timeout: seconds that running tasks get at the end.

        Raises:
            BrokerUnavailable: if it does not consume in time.
            UnknownQueueError: if nobody declared one of ``queues``.
        """
        self._refuse_closed()
        names = None if queues is None else list(queues)
        for name in names or ():
            self.check_queue(name)
        from qbridge.worker.main import in_process_worker  # a caller that only sends never loads Celery's worker

        return in_process_worker(
            self._celery(), pool=pool, concurrency=concurrency, queues=names,
            start_timeout=start_timeout, stop_timeout=stop_timeout,
        )  # fmt: skip

    def check(self) -> Report:
        """Look at the configuration and at the live servers; bounded, never raises for a sick server."""
        return Report.of(self._config, list(self._queues.configs().values()))

    def close(self) -> None:
        """Close connections and threads; idempotent. Sending afterwards is a ConfigurationError."""
        with self._lock:
            self._closed = True
            reader, self._reader = self._reader, None
            app = self._app
        if reader is not None:
            reader.close()
        self._threads.close()
        if app is not None:
            app.close()

    async def aclose(self) -> None:
        """Close without blocking the event loop."""
        await asyncio.to_thread(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return (
            f"<Bridge {self._config.broker.safe_url()} → {self._config.results.safe_url()}, {len(self._tasks)} tasks>"
        )

    # -- threads and forks

    def _after_fork_in_child(self) -> None:
        self._lock = threading.RLock()
        self._threads = SendingThreads()
        if self._app is not None:
            self._app.forget_connections()
        if self._reader is not None:
            self._reader = None


class _Place:
    """Where dead letters are (see ``qbridge.dead_letters.box.Place``)."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self.broker = bridge.config.broker
        self.keeps_dead_letters = bridge.config.defaults == "safe"
        self.lock = bridge.config.serialization.lock()
        self.check_queue = bridge.check_queue
        self.in_thread = bridge._threads.run

    def queue_names(self) -> Iterable[str]:
        return list(self._bridge.celery.amqp.queues)

    def outcomes(self) -> HubReader | None:
        readable = self._bridge.config.results.capabilities.readable_elsewhere
        return self._bridge._result_reader() if readable else None

    def connect(self) -> Any:
        self._bridge._refuse_closed()
        return self._bridge.celery.connection_for_write()


def _as_is(value: Any) -> Any:
    return value


def _configuration(given: BridgeConfig | None) -> BridgeConfig:
    if given is None:
        return BridgeConfig()
    if isinstance(given, BridgeConfig):
        return given
    if isinstance(given, Celery):
        todo = "For the settings of a Celery app: Bridge(BridgeConfig.from_celery(app.conf))."
    elif isinstance(given, str):
        scheme, is_url, _ = given.partition("://")  # of a URL no more is shown: it may hold a password
        setting = f"broker='{scheme}://...'" if is_url else f"name={given!r}"
        todo = f"Did you mean Bridge(BridgeConfig({setting}))?"
    else:
        todo = "Bridge() reads QBRIDGE_* variables and files; BridgeConfig(...) takes arguments."
    raise ConfigurationError(f"Bridge takes a BridgeConfig, not {type(given).__name__}", todo)


_bridges: weakref.WeakSet[Bridge] = weakref.WeakSet()


def _after_fork() -> None:
    for bridge in list(_bridges):
        bridge._after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork)
