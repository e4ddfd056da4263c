"""Who takes replies from the broker: one daemon thread per app and process, on a connection of its own."""

from __future__ import annotations

import logging
import selectors
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kombu.exceptions import OperationalError
from kombu.messaging import Consumer

from qbridge.backends.deadline import deadline, remaining
from qbridge.backends.watching import Alarm

__all__ = ["ReplyReceiver"]

_make_consumer: Any = Consumer  # kombu leaves it without types

logger: logging.Logger = logging.getLogger(__name__)

_SETUP = 5.0  # seconds for connecting, declaring and consuming
_PREFETCH = 500
_TICK = 1.0
_FAST_FAILURES = 3
_HOUSEKEEPING = 10.0


class ReplyReceiver:
    """Consumes the reply queues of one process and gives each message to ``deliver``.

    Args:
        app: the Celery app whose broker carries the replies.
        make_queue: makes the ``kombu.Queue`` of a reply address.
        deliver: called in the receiving thread with each message; must be quick.
        tidy: called in the receiving thread every few seconds.
    """

    def __init__(
        self,
        app: Any,
        make_queue: Callable[[str], Any],
        deliver: Callable[[Any], None],
        tidy: Callable[[], None],
    ) -> None:
        self._app = app
        self._make_queue = make_queue
        self._deliver = deliver
        self._tidy = tidy
        self._changed = threading.Condition()
        self._addresses: list[str] = []
        self._declared: set[str] = set()
        self._thread: threading.Thread | None = None
        self._alarm: Alarm | None = None
        self._closed = False
        self._connected = False
        self._failures = 0
        self._reason: str | None = None

    def receive_for(self, address: str) -> None:
        """Make sure that replies to ``address`` reach this process: returns once its queue exists.

        After the first time this costs nothing; a lost connection is made again in the background.

        Raises:
            kombu.exceptions.OperationalError: if the queue cannot be declared in time.
        """
        if address in self._declared and self._thread is not None:
            return
        left = remaining()
        end = time.monotonic() + (_SETUP if left is None else min(left, _SETUP))
        with self._changed:
            if self._closed:
                raise OperationalError("replies are received no longer: the bridge is closed")
            if address not in self._addresses:
                self._addresses.append(address)
                self._failures = 0
            if self._thread is None:
                self._failures = 0
                self._alarm = Alarm()
                self._thread = threading.Thread(
                    target=self._run, args=(self._alarm,), name="qbridge-replies", daemon=True
                )
                self._thread.start()
            if self._alarm is not None:
                self._alarm.ring()
            while address not in self._declared:
                left = end - time.monotonic()
                if left <= 0 or self._failures >= _FAST_FAILURES or self._closed:
                    why = self._reason or "the broker does not answer"
                    raise OperationalError(f"the reply queue could not be declared: {why}")
                self._changed.wait(left)

    @property
    def trouble(self) -> str | None:
        """Why no reply can arrive now, or None."""
        if self._closed:
            return "the bridge is closed"
        if self._thread is not None and not self._connected:
            return self._reason or "not connected to the broker yet"
        return None

    def close(self, timeout: float = 2.0) -> None:
        """Stop, delete the reply queues, and wait for that up to ``timeout`` seconds."""
        with self._changed:
            self._closed = True
            thread, alarm = self._thread, self._alarm
            self._changed.notify_all()
        if alarm is not None:
            alarm.ring()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    # -- the thread

    def _run(self, alarm: Alarm) -> None:
        pause = 0.1
        try:
            while not self._closed:
                try:
                    with self._consuming() as (connection, consumer):
                        pause = 0.1
                        self._serve(connection, consumer, alarm)
                except Exception as exc:  # noqa: BLE001
                    # Whatever the transport raises: the thread lives as long as the process may get replies.
                    self._failed(exc)
                    alarm.wait(pause)
                    alarm.hush()
                    pause = min(pause * 2, 5.0)
        finally:
            with self._changed:
                self._thread = self._alarm = None
                self._connected = False
                self._changed.notify_all()
            alarm.close()

    def _failed(self, exc: Exception) -> None:
        with self._changed:
            if self._connected:
                logger.warning("The connection for replies was lost (%s), connecting again.", type(exc).__name__)
            self._connected = False
            self._failures += 1
            self._reason = f"{type(exc).__name__}: {exc}".splitlines()[0][:200]
            self._changed.notify_all()

    @contextmanager
    def _consuming(self) -> Iterator[tuple[Any, Any]]:
        conf = self._app.conf
        # Where replies are published: on the broker that tasks are sent to, with a consumer's own timeouts.
        connection = self._app.connection_for_read(conf.broker_write_url, heartbeat=conf.broker_heartbeat)
        try:
            with deadline(_SETUP):
                connection.ensure_connection(max_retries=1, interval_start=0, timeout=_SETUP)
                confirmed = connection.transport.driver_type == "amqp"
                consumer = _make_consumer(
                    connection.default_channel,
                    [],
                    # Acknowledged after it is kept: what is under way when the connection breaks comes again.
                    no_ack=not confirmed,
                    prefetch_count=_PREFETCH if confirmed else None,
                    on_message=self._receive,
                    accept=None,
                )
                self._consume_new(consumer, set())
            with self._changed:
                self._connected = True
                self._failures = 0
                self._reason = None
                self._changed.notify_all()
            yield connection, consumer
            if self._closed:
                for address in self._addresses:
                    consumer.channel.queue_delete(queue=address, **({"nowait": True} if confirmed else {}))
        finally:
            # An orderly close waits for the server.
            with suppress(Exception):
                connection.collect(socket_timeout=0.5)

    def _consume_new(self, consumer: Any, consumed: set[str]) -> set[str]:
        new = [address for address in tuple(self._addresses) if address not in consumed]
        for address in new:
            consumer.add_queue(self._make_queue(address))
        if new:
            consumer.consume()
            with self._changed:
                self._declared.update(new)
                self._changed.notify_all()
        return consumed.union(new)

    def _receive(self, message: Any) -> None:
        try:
            self._deliver(message)
        finally:
            if not message.acknowledged:
                message.ack()

    def _serve(self, connection: Any, consumer: Any, alarm: Alarm) -> None:
        consumed = set(self._declared.intersection(self._addresses))
        drain = self._drain_amqp if connection.transport.driver_type == "amqp" else self._drain_other
        interval = connection.get_heartbeat_interval() if connection.supports_heartbeats else 0
        beat = tidied = time.monotonic()
        drain(connection, alarm, 0.0)
        while not self._closed:
            drain(connection, alarm, min(_TICK, interval / 4) if interval else _TICK)
            if len(consumed) < len(self._addresses):
                with deadline(_SETUP):
                    consumed = self._consume_new(consumer, consumed)
            now = time.monotonic()
            if interval and now - beat > interval / 2:
                connection.heartbeat_check(rate=2)
                beat = now
            if now - tidied > _HOUSEKEEPING:
                self._tidy()
                tidied = now

    @staticmethod
    def _drain_amqp(connection: Any, alarm: Alarm, timeout: float) -> None:
        # The socket and the alarm are waited for together; then everything that has come is taken.
        with selectors.DefaultSelector() as selector:
            selector.register(alarm, selectors.EVENT_READ)
            selector.register(connection.connection.sock, selectors.EVENT_READ)
            selector.select(timeout)
        alarm.hush()
        with suppress(TimeoutError):
            while True:
                connection.drain_events(timeout=0)

    @staticmethod
    def _drain_other(connection: Any, alarm: Alarm, timeout: float) -> None:
        # Virtual transports have no one socket; their drain_events returns with each message.
        alarm.hush()
        with suppress(TimeoutError):
            connection.drain_events(timeout=min(timeout, 0.2) or 0.001)
