"""The consumer of a bridge's worker: no message kills it, no defect of Celery 5.7 that we know slows it down."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from amqp.exceptions import ResourceLocked
from celery import signals
from celery.app.trace import build_tracer
from celery.concurrency import prefork
from celery.exceptions import InvalidTaskError
from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.state import maybe_shutdown
from kombu.exceptions import ContentDisallowed, MessageStateError

from qbridge.backends.base import HEADER_UNREADABLE
from qbridge.dead_letters import Reason
from qbridge.dead_letters.letter import HEADER_DEAD_LETTER
from qbridge.serialization.refused import MessageRefused
from qbridge.task import TaskDefinition
from qbridge.versions import newer, version_in
from qbridge.worker.acknowledging import AcknowledgingConsumer
from qbridge.worker.claims import Claims
from qbridge.worker.cleanup import Cleanup
from qbridge.worker.dead_letters import DeadLetters
from qbridge.worker.delays import Delays
from qbridge.worker.loops import green_loop
from qbridge.worker.pulse import Pulse
from qbridge.worker.revocations import Revocations
from qbridge.worker.running import end_running, is_taken_over, keep_claimed
from qbridge.worker.screening import fault_of
from qbridge.worker.unknown import UnknownTasks
from qbridge.worker.unlocking import unlock

__all__ = ["MESSAGE_FAULTS", "BridgeConsumer"]

logger = get_logger(__name__)

MESSAGE_FAULTS = (LookupError, TypeError, ValueError, AttributeError, RecursionError)
"""Errors that are the message's fault; kombu's Redis transport counts KeyError among its connection errors."""


_OUR_STEPS = {"Control": "qbridge.worker.unlocking:Control", "DelayedDelivery": "qbridge.worker.delays:NativeDelivery"}

_NAME_TAKEN = 5.0
"""Seconds between two attempts under a name that another worker has: it may be on its way out."""
_NAME_HELD = 1.0
"""The same where it is this worker's own former connection that has it, which the broker takes for alive."""
_HEARTBEATS = 3.0
"""Heartbeats after which a broker has noticed that a connection is lost."""


def _pause(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        maybe_shutdown()
        time.sleep(0.1)


class _Strategies(dict[str, Any]):
    """How each task's messages are handled; a task declared while the worker runs is found at its first message.

    That is the way of notebooks and tests with a worker inside their process; Celery looks once, at the start.
    """

    def __init__(self, consumer: Any) -> None:
        super().__init__()
        self._consumer = consumer

    def __missing__(self, name: str) -> Any:
        consumer: Any = self._consumer
        app = consumer.app
        task = app.tasks[name]
        task.__trace__ = build_tracer(name, task, app.loader, consumer.hostname, app=app)
        strategy = self[name] = task.start_strategy(app, consumer)
        return strategy


class BridgeConsumer(AcknowledgingConsumer):
    """Celery's consumer, with eleven differences.

    Where there are keys, what no holder of them has sent is refused, commands to workers too.
    Whatever a message does while it is unpacked, it is refused and the worker goes on.
    What is refused is kept in the queue's dead letters first.
    The solo pool acknowledges at once: from the event loop's queue it would wait for an unrelated timer
    (2 to 35 tasks/s on RabbitMQ with a prefetch of 1). On RabbitMQ such acknowledgements go together.
    Green pools do not wait for heartbeats of the event connection after each message.
    A broker that refuses the account or has no such vhost is asked again after a while, not hundreds of times a second.
    A worker whose name is taken says so and asks again after a while too.
    Tasks declared while the worker runs are run too.
    A task that it does not know, or not in that version, is left to others for a while.
    A task that is due in a while goes back to the broker, which keeps it on disk.
    RabbitMQ's delays are made ready for the queues that it consumes, not for those that nobody has declared yet.
    No mingle (a second before the first task) and no gossip (traffic that grows with the square of the workers).
    """

    class Blueprint(Consumer.Blueprint):
        """Celery's steps of a start, two of them ours: remote control, and the delays of RabbitMQ."""

        default_steps = [  # noqa: RUF012 - as Celery has it
            _OUR_STEPS.get(str(step).rpartition(":")[2], step) for step in Consumer.Blueprint.default_steps
        ]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.update(without_mingle=True, without_gossip=True)
        super().__init__(*args, **kwargs)
        self.strategies: Any = _Strategies(self)
        self.dead_letters: DeadLetters = DeadLetters(self)
        self._unknown = UnknownTasks(self)
        self.pulse: Pulse = Pulse()
        app: Any = self.app
        self.revocations: Revocations = Revocations(app.backend.expires)
        self._claims = Claims(self)
        self._cleanup = Cleanup(app)
        self._handle: Callable[[Any], Any] = lambda message: None  # there is none before the first connection
        self._refusals = 0
        self._lost_at = float("-inf")
        if getattr(self.pool, "is_green", False) and not self.hub:
            self.loop = green_loop

    def connect(self) -> Any:
        """Connect to the broker, for as long as it takes."""
        connection = super().connect()
        self._refusals = 0
        return connection

    def stop(self) -> None:
        """Stop consuming."""
        self._claims.stop()
        self._cleanup.stop()
        super().stop()

    def shutdown(self) -> None:
        """Stop for good."""
        self._claims.stop()
        self._cleanup.stop()
        super().shutdown()

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Wait before the next attempt at a broker that is there and refuses: Celery tries again at once, for ever."""
        self._refusals += 1
        wait = min(2.0 * self._refusals, 32.0)
        logger.error(
            "The broker %s refuses this worker: %s. Trying again in %g seconds; `qbridge check` says what to do.",
            self.conninfo.as_uri(), str(exc).rstrip("."), wait,
        )  # fmt: skip
        _pause(wait)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Say so and wait where another worker has this one's name: Celery tries again at once, for ever."""
        pool: Any = self.pool
        withdraw = getattr(pool, "withdraw", None)
        if withdraw is not None:  # what no thread has begun comes again; Celery runs both
            withdraw()
            keep_claimed(pool.running())
        elif isinstance(pool, prefork.TaskPool):
            self._claims.let_go(end_running(pool))
        if self.pulse.consuming:
            self._lost_at = time.monotonic()
        events: Any = getattr(self, "event_dispatcher", None)  # Celery's step for events has put it there
        if events is not None and events.connection is not None:
            # Celery closes it in order before it connects again: with a server that is gone each answer that does not
            # come is waited for, and no task runs meanwhile
            events.connection.collect()
        super().on_connection_error_after_connected(exc)
        ending = self._ending
        if ending is not None:  # nothing is left to acknowledge on, and nothing more is to be taken
            state.should_stop = ending.exit_code
        if isinstance(exc, ResourceLocked) and ".pidbox" in str(exc):
            self._wait_for_the_name()

    def _wait_for_the_name(self) -> None:
        if time.monotonic() - self._lost_at < _HEARTBEATS * float(self.amqheartbeat or 0):
            logger.warning(
                "The broker has not noticed yet that this worker's former connection is lost, which has its queue for "
                "remote control. Trying again in %g seconds.",
                _NAME_HELD,
            )
            _pause(_NAME_HELD)
            return
        logger.error(
            "Another worker on this broker is called %s: its queue for remote control is locked, and this worker "
            "cannot start beside it. Give it a name of its own: -n another@%%h. Trying again in %g seconds.",
            self.hostname, _NAME_TAKEN,
        )  # fmt: skip
        _pause(_NAME_TAKEN)

    def on_ready(self) -> None:
        """Celery's hook: the broker was told to deliver."""
        self.pulse.begin(self)
        app: Any = self.app
        app.worker_loop = os.getpid(), threading.get_ident()
        super().on_ready()

    def on_close(self) -> None:
        """Celery's hook: nothing can be acknowledged any more."""
        self.pulse.end()
        super().on_close()

    def let_go(self, requests: Iterable[Any]) -> None:
        """Let others have tasks whose runs are over without an outcome.

        Args:
            requests: of the tasks.
        """
        self._claims.let_go(requests)

    @property
    def _ending(self) -> Any:
        ending = getattr(self.controller, "ending", None)
        return ending if ending is not None and ending.began else None

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Return Celery's message handler inside a guard."""
        handle = super().create_task_handler(*args, **kwargs)
        delays = Delays(self)
        app: Any = self.app
        lock, max_bytes = app.lock, app.max_payload_bytes
        self._claims.start()
        self._cleanup.start()
        self.hold_acks()
        connection_errors = tuple(
            error for error in self.connection_errors + self.channel_errors if not issubclass(error, MESSAGE_FAULTS)
        )

        pulse = self.pulse

        def guarded(message: Any) -> Any:
            pulse.received += 1
            ending = self._ending
            if ending is not None:
                return ending.hold(message)
            maybe_shutdown()  # several messages arrive at once, and the solo pool runs each of them here
            try:
                if HEADER_DEAD_LETTER in (message.headers or ()):
                    return self._bury(message)
                unlock(message, lock, max_bytes)
                self._screen(message)
                if (
                    is_taken_over(message, self)
                    or delays.put_back(message, guarded)
                    or self._claims.holds(message, guarded)
                ):
                    return None
                return handle(message)
            except connection_errors:
                raise
            except Exception as error:  # noqa: BLE001 - whatever a message does
                self.refuse(message, error)
                return None

        self._handle = guarded
        return guarded

    def _bury(self, message: Any) -> None:
        """Keep a message that was given up before, when the broker did not take its copy."""
        if self._kept(message, "foreign", None):
            message.ack_log_error(logger, self.connection_errors)

    def _kept(self, message: Any, reason: Reason, error: Exception | None) -> bool:
        return self.dead_letters.keep(message, reason, error, self._handle)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Keep a message whose body cannot be read; Celery's log would show the body."""
        if self._kept(message, exc.reason if isinstance(exc, MessageRefused) else "undecodable", exc):
            logger.error("Cannot read a message (content type %r): %s", message.content_type, type(exc).__name__)
            message.ack_log_error(logger, self.connection_errors)

    def on_unknown_message(self, body: Any, message: Any) -> None:
        """Keep a message that names no task."""
        error = InvalidTaskError("it names no task")
        if self._kept(message, "malformed", error):
            self._reject(message, error)

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Leave a message whose task this worker does not have to others for a while, then keep it."""
        if self._unknown.put_back(message, self._handle):
            return
        if self._kept(message, "unknown_task", exc):
            self._unknown.end(message, exc)

    def on_newer_version(self, message: Any, definition: TaskDefinition) -> None:
        """Leave a message of a version that this worker does not have yet to others for a while, then keep it."""
        name = f"version {version_in(message.headers)} of the task"
        if self._unknown.put_back(message, self._handle, name):
            return
        error = newer(definition, message.headers)
        if self._kept(message, "unknown_task", error):
            self._unknown.end(message, error, name, error)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        """Keep a message that is not what a producer makes, or of a refused type."""
        if self._kept(message, "undecodable" if isinstance(exc, ContentDisallowed) else "malformed", exc):
            self._reject(message, exc)

    def _reject(self, message: Any, error: Exception) -> None:
        logger.error("Refused a message (content type %r): %s", message.content_type, error)
        message.reject_log_error(logger, self.connection_errors)
        signals.task_rejected.send(sender=self, message=message, exc=error)

    def _screen(self, message: Any) -> None:
        headers = message.headers
        if isinstance(headers, Mapping) and HEADER_UNREADABLE in headers:
            raise InvalidTaskError("its properties and headers cannot be read")
        if isinstance(headers, Mapping) and "task" in headers:
            fault = fault_of(headers)
            if fault is not None:
                raise InvalidTaskError(fault)

    def refuse(self, message: Any, error: Exception) -> None:
        """Take a message that cannot be handled off its queue, and say so; its content stays out of the log."""
        if not self._kept(message, error.reason if isinstance(error, MessageRefused) else "malformed", error):
            return
        try:
            message.reject_log_error(logger, self.connection_errors)
        except MessageStateError:
            logger.debug("the refused message had been acknowledged before")
        body = message.body  # of any type, where a broker's client has read it
        logger.error(
            "Refused a message that cannot be handled: %s: %s (content type %r, delivery %r, %s bytes)",
            type(error).__name__,
            error,
            message.content_type,
            message.delivery_info,
            len(body) if isinstance(body, str | bytes | memoryview) else "?",
            exc_info=error,
        )
