"""How a worker starts: the program behind ``qbridge worker`` and ``celery worker``, and one inside a process."""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from celery.apps.worker import Worker
from celery.concurrency import prefork, thread
from celery.exceptions import SecurityWarning, WorkerShutdown
from celery.utils.imports import symbol_by_name
from celery.utils.log import get_logger
from celery.utils.nodenames import default_nodename
from celery.worker import WorkController, state
from kombu.asynchronous import get_event_loop, set_event_loop

from qbridge.config import WorkerConfig
from qbridge.exceptions import BrokerUnavailable, ConfigurationError
from qbridge.worker.banner import banner
from qbridge.worker.consumer import MESSAGE_FAULTS, BridgeConsumer
from qbridge.worker.ending import Ending
from qbridge.worker.health import Health, HealthFile, HealthPort, SystemdNotifier
from qbridge.worker.pools import EndingThreadPool, SoloPool, ThreadPool
from qbridge.worker.processes import ProcessPool
from qbridge.worker.watchdog import Watchdog

__all__ = ["BridgeWorker", "in_process_worker", "refuse_unenforced_limits"]

logger = get_logger(__name__)

_IN_PROCESS_POOLS: dict[str, type[Any]] = {"solo": SoloPool, "thread": ThreadPool, "threads": ThreadPool}
_PICKLES = {"pickle", "application/x-python-serialize"}
_NO_TIME_LIMITS = ("celery.concurrency.solo", "celery.concurrency.thread", "qbridge.worker.pools")


def unenforced_limits(app: Any, pool_cls: Any, queues: Iterable[str] | None = None) -> list[str]:
    """Return the names of tasks whose time limits a pool cannot enforce, of those whose queues are consumed here."""
    if getattr(pool_cls, "__module__", "") not in _NO_TIME_LIMITS:
        return []
    consumed = set(app.amqp.queues.consume_from if queues is None else queues)
    return sorted(
        name
        for name, task in app.tasks.items()
        if getattr(task, "definition", None) is not None
        and (task.time_limit or task.soft_time_limit)
        and (task.definition.queue or app.conf.task_default_queue) in consumed
    )


def refuse_unenforced_limits(app: Any, pool_cls: Any, queues: Iterable[str] | None = None) -> None:
    """Refuse a pool that cannot enforce the time limits of a task.

    Args:
        app: the bridge's app, with all tasks imported.
        pool_cls: the pool's class.
        queues: names of the queues that will be consumed; None: what the app has selected.

    Raises:
        ConfigurationError: naming the tasks.
    """
    names = unenforced_limits(app, pool_cls, queues)
    if names:
        raise ConfigurationError(*_limits_message(names))


def _limits_message(names: Iterable[str]) -> tuple[str, str]:
    return (
        f"this pool cannot enforce the time limits of {', '.join(names)}",
        "Use the process pool (worker.pool='process', --pool=prefork), consume other queues, or take their limits off.",
    )


class _KeepsItsSlots(WorkController):
    """A request that the pool cannot take gives its slot back; in Celery it keeps it, and the worker stands still."""

    consumer_cls: Any

    def on_init_blueprint(self) -> None:
        """Celery's hook, before anything is started.

        Raises:
            ConfigurationError: if there are keys, and a consumer that does not look at signatures.
        """
        super().on_init_blueprint()
        app: Any = self.app
        consumer: Any = symbol_by_name(self.consumer_cls)
        if app.lock is not None and not issubclass(consumer, BridgeConsumer):
            raise ConfigurationError(
                "this bridge has signing_keys, and the consumer of this worker looks at no signature",
                "Leave worker_consumer as the bridge has set it.",
            )

    def _process_task(self, req: Any) -> None:
        try:
            super()._process_task(req)
        except MESSAGE_FAULTS as error:
            self._quick_release()
            state.task_ready(req)
            # Not raised: where the slot was waited for, nobody above would catch it.
            self.__dict__["consumer"].refuse(req.message, error)

    def _quick_release(self) -> None:
        """Replaced per instance where there are slots to count (Celery's ``Pool`` step)."""


class BridgeWorker(_KeepsItsSlots, Worker):
    """Celery's worker program; refuses to start where it could not keep a promise."""

    pool_cls: Any
    ending: Ending | None = None
    health: Health | None = None

    def on_before_init(self, quiet: bool = False, **kwargs: Any) -> None:
        """Begin as Celery does, without its warning about root where no message can be a pickle."""
        app: Any = self.app
        with warnings.catch_warnings():
            if not _PICKLES & set(app.conf.accept_content or ()):
                warnings.simplefilter("ignore", SecurityWarning)
            super().on_before_init(quiet=quiet, **kwargs)

    def on_init_blueprint(self) -> None:
        """Refuse once the pool is known and the tasks are imported: for ``celery worker`` the program's end.

        Raises:
            SystemExit: if the pool cannot enforce a task's time limit.
        """
        if self.pool_cls is thread.TaskPool:
            self.pool_cls = EndingThreadPool
        elif self.pool_cls is prefork.TaskPool:
            self.pool_cls = ProcessPool
        try:
            super().on_init_blueprint()
            refuse_unenforced_limits(self.app, self.pool_cls)
            self.health = self._health()
        except ConfigurationError as error:
            raise SystemExit(str(error)) from None

    def _health(self) -> Health:
        app: Any = self.app
        config: WorkerConfig = app.worker_config or WorkerConfig()
        tellers: list[Any] = []
        if config.health_file is not None:
            tellers.append(HealthFile(config.health_file))
        if config.health_port is not None:
            tellers.append(HealthPort(config.health_host, config.health_port))
        if os.environ.get("NOTIFY_SOCKET"):
            tellers.append(SystemdNotifier(os.environ["NOTIFY_SOCKET"]))
        return Health(tellers)

    def emit_banner(self) -> None:
        """Say in a few lines what this worker is."""
        print(f"{banner(self)}\n", file=sys.__stdout__, flush=True)

    def install_platform_tweaks(self, worker: Any) -> None:
        """Install Celery's signal handlers, ours for the worker's end, and the watchdog."""
        super().install_platform_tweaks(worker)
        app: Any = self.app
        self.ending = Ending(self, float(app.conf.worker_soft_shutdown_timeout or 0))
        self.ending.install()
        config: WorkerConfig = app.worker_config or WorkerConfig()
        patience = config.watchdog or WorkerConfig().watchdog
        watchdog = Watchdog(self, patience, acts=config.watchdog > 0, tell=self.health or Health(()))
        watchdog.start()


_making = threading.Lock()


class _InProcessController(_KeepsItsSlots):
    """A worker without a program: no signals, no logging set-up, no process-wide app."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.ready = threading.Event()
        # kombu's event loop is process-wide: a second worker would run on the first one's, and stand still at its end
        with _making:
            others = get_event_loop()
            set_event_loop(None)
            try:
                super().__init__(*args, **kwargs)
            finally:
                set_event_loop(others)

    def on_consumer_ready(self, consumer: Any) -> None:
        """Celery's hook: tasks are being consumed."""
        self.ready.set()


def _shut_down() -> None:
    raise WorkerShutdown(0)


def _take_no_more(controller: Any) -> None:
    """Stop consuming, and give back what no thread has begun."""
    consumer = controller.consumer
    with suppress(*consumer.connection_errors):  # what it held is given back by the broker
        if consumer.task_consumer is not None:
            consumer.task_consumer.cancel()
    for request in controller.pool.withdraw():
        state.task_ready(request)
        if not request.acknowledged:
            request.acknowledged = True
            request.message.reject_log_error(logger, consumer.connection_errors, requeue=True)


@contextmanager
def in_process_worker(
    app: Any, *, pool: str, concurrency: int, queues: Iterable[str] | None, start_timeout: float, stop_timeout: float
) -> Iterator[Any]:
    """Run a worker in threads of this process.

    Args:
        app: the bridge's app.
        pool: ``"thread"`` or ``"solo"``.
        concurrency: tasks at once (thread pool).
        queues: names of queues to consume; None: all but those of remote tasks.
        start_timeout: seconds until it must consume.
        stop_timeout: seconds that running tasks get at the end.

    Raises:
        ConfigurationError: if the pool is another one.
        BrokerUnavailable: if it does not consume in time.
    """
    if pool not in _IN_PROCESS_POOLS:
        raise ConfigurationError(
            f"a worker inside this process cannot use the {pool!r} pool", "Use pool='thread' or pool='solo'."
        )
    app.finalize()
    controller = _InProcessController(
        app=app,
        hostname=default_nodename(f"in-process-{id(app):x}-{app.in_process_workers}"),
        pool_cls=_IN_PROCESS_POOLS[pool],
        concurrency=concurrency,
        queues=list(queues) if queues is not None else None,
        loglevel="WARNING",
    )
    names = unenforced_limits(app, controller.pool_cls)
    if names:
        logger.warning("%s. %s", *_limits_message(names))
    failure: list[BaseException] = []

    def run() -> None:
        # should_stop is process-wide in Celery: a worker that ended here before must not end this one
        state.should_stop = None
        state.should_terminate = None
        try:
            controller.start()
        except BaseException as error:  # noqa: BLE001 - a worker's failure must reach the thread that waits for it
            failure.append(error)
        finally:
            controller.ready.set()

    thread = threading.Thread(target=run, name="qbridge-worker", daemon=True)
    app.in_process_workers += 1
    thread.start()
    try:
        if not controller.ready.wait(start_timeout) or failure:
            cause = failure[0] if failure else None
            raise BrokerUnavailable(
                f"the worker inside this process did not start within {start_timeout:g} s", "Run bridge.check()."
            ) from cause
        yield controller
    finally:
        app.in_process_workers -= 1
        # in the worker's own thread: two threads must not read one connection
        consumer: Any = controller.__dict__["consumer"]
        end = time.monotonic() + stop_timeout
        if isinstance(controller.pool, EndingThreadPool):
            # A caller has its result before the message is acknowledged, and may end the worker between the two.
            consumer.call_soon(_take_no_more, controller)
            while controller.pool.at_work and thread.is_alive() and time.monotonic() < end:
                time.sleep(0.005)
        consumer.call_soon(_shut_down)
        thread.join(max(0.1, end - time.monotonic()))
        if thread.is_alive():
            logger.warning("the worker inside this process is still running a task after %g s", stop_timeout)
