"""How does kombu, and so Celery, speak to the embedded broker? A virtual transport over one SQLite file.

Guarantees, for any number of processes on one machine:

- A publish that returns is in the file: it survives ``kill -9`` of every process and, for persistent messages, a power
  cut. It returns or raises within ``publish_timeout``. Several messages go in one transaction (``publish_many``,
  ``Producer.batch``): all or none.
- A message that is handed out is claimed, not deleted, until it is acknowledged. It comes back, to its old place, when
  it is rejected with requeue, when its channel or connection closes (but for what is kept, because its task runs on:
  see ``staying``), or about a second after its process died. While the process lives, stopped or busy, nobody else
  gets it.
- ``delivery_info`` says ``redelivered``, ``delivery_count`` (earlier deliveries; also the header ``x-delivery-count``,
  as on RabbitMQ's quorum queues) and ``loss_count`` (how often the process that held it died).
- Highest priority first (0 to 9; 5 where the sender named none), then first in, first out.
- A task whose header ``eta`` lies ahead stays in the file until then, to the millisecond; no consumer holds it.
- Queues of replies, events and remote control end with their consumers: ``x-expires``, ``x-message-ttl``, exclusive
  and auto-delete are honoured, for processes that died too. Other queue arguments mean nothing here.

Transport options that are read: ``publish_timeout`` (seconds, default 10) and ``sweep_interval`` (seconds between two
looks for dead processes and expired things, default 1).

In an event loop one message is delivered per turn: what its callback schedules (an acknowledgement) runs before the
next delivery, so a worker that dies takes no finished task back with it. For a worker that runs its tasks in the loop
acknowledgements go with that delivery, in one transaction, or at once where nothing is left to deliver: again before
the next task begins.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
import weakref
from collections.abc import Sequence
from typing import Any

from amqp.exceptions import ConnectionError as AMQPConnectionError
from amqp.exceptions import NotFound, RecoverableConnectionError
from kombu.exceptions import ChannelError
from kombu.transport import virtual

from qbridge.backends.embedded.address import path_of
from qbridge.backends.embedded.alarm import Alarm
from qbridge.backends.embedded.channel import Channel
from qbridge.backends.embedded.errors import FileReplaced, FileUnavailable
from qbridge.backends.embedded.presence import Presence
from qbridge.backends.embedded.qos import QoS
from qbridge.backends.embedded.routing import EXCHANGE_TYPES, ExchangeMissing
from qbridge.backends.embedded.settling import SETTLE_PATIENCE, Settling
from qbridge.backends.embedded.staying import Staying
from qbridge.backends.embedded.store import Outgoing, Store
from qbridge.backends.forking import begin_anew_after_fork

__all__ = ["Transport"]

logger: logging.Logger = logging.getLogger(__name__)

SENDERS_SWEEP_INTERVAL = 10.0
"""Seconds between two sweeps by a process that only sends: broadcasts must not pile up where all consumers are dead."""


class Transport(Settling, virtual.Transport):
    """One connection to the file, and this process's party on it once it consumes."""

    Channel = Channel
    channels: Any  # a list of Channel; None in the base class
    can_parse_url = True
    polling_interval: Any = None
    driver_type = "embedded"
    driver_name = "sqlite3"
    implements: Any = virtual.Transport.implements.extend(
        asynchronous=True, batch_publish=True, exchange_type=EXCHANGE_TYPES, heartbeats=False
    )
    connection_errors: Any = (AMQPConnectionError, FileUnavailable)
    channel_errors: Any = (ChannelError,)
    # Everything else was tried for publish_timeout seconds already: kombu must not multiply that bound.
    recoverable_connection_errors: tuple[type[Exception], ...] = (RecoverableConnectionError, FileReplaced)
    recoverable_channel_errors: tuple[type[Exception], ...] = ()

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        options = client.transport_options
        self.publish_timeout: float = float(options.get("publish_timeout", 10.0))
        self.sweep_interval: float = float(options.get("sweep_interval", 1.0))
        name = client.hostname or ""
        url = name if "://" in name else f"embedded:///{(client.virtual_host or '').lstrip('/')}"
        self.store: Store = Store(path_of(url).absolute(), self.publish_timeout)
        self._presence: Presence | None = None
        self._finalizer: weakref.finalize[..., Transport] | None = None
        self._pid = os.getpid()
        self._loop: Any = None
        self._sweep_timer: Any = None
        self._next_sweep = 0.0
        self._alarm = Alarm()
        self.settle_nothing()
        self._kept: list[QoS] = []
        begin_anew_after_fork(self)

    def driver_version(self) -> str:
        return sqlite3.sqlite_version

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        return uri

    @property
    def default_connection_params(self) -> dict[str, Any]:
        return {}

    def verify_connection(self, connection: Any) -> bool:
        return self._pid == os.getpid()

    def establish_connection(self) -> Any:
        self._pid = os.getpid()
        self.store.database.open()
        return super().establish_connection()

    def close_connection(self, connection: Any) -> None:
        try:
            super().close_connection(connection)
        finally:
            self._detach()
            presence, self._presence = self._presence, None
            if presence is not None and not self._stay(presence):
                self._leave(presence)
            self.store.database.close()

    def outlive(self, qos: QoS) -> None:
        """Settle what a channel that is closed now has kept, and let it outlive this connection too."""
        qos.staying = self
        self._kept.append(qos)

    def _stay(self, presence: Presence) -> bool:
        """Keep what tasks that run on have claimed; False if there is nothing, or if that cannot be."""
        kept, self._kept = self._kept, []
        for qos in kept:
            qos.staying = None
        claims = [claim for qos in kept for claim in qos.kept()]
        if not claims:
            return False
        try:
            self.settle_put_off(presence)
            staying = Staying(presence, self.store, claims)
        except FileUnavailable as error:
            logger.warning("Cannot keep what running tasks have claimed: %s", error)
            return False
        if self._finalizer is not None:
            self._finalizer.detach()  # the presence is no longer ours
        for qos in kept:
            qos.staying = staying
        return True

    def _leave(self, presence: Presence) -> None:
        try:
            self.settle_put_off(presence)
            self.store.leave(presence.id)
        except FileUnavailable as error:  # others will find the lock free, and take over from there
            logger.warning("Cannot leave the embedded broker in good order: %s", error)
        finally:
            presence.close()

    # Sending

    def send(self, messages: Sequence[Outgoing], *, mandatory: bool = False, timeout: float | None = None) -> None:
        """Store messages in one transaction; what ``Channel.publish_many`` says."""
        persistent = any(message.durable for message in messages)
        if not persistent:
            if self._presence is None and time.monotonic() >= self._next_sweep:
                self._sweep_as_sender()
            if not mandatory and not any(
                not message.exchange or self.store.has_route(message.exchange, message.routing_key)
                for message in messages
            ):
                return  # events that nobody watches cost one look
        try:
            routed = self.store.publish(messages, min(self.publish_timeout, timeout or self.publish_timeout))
        except ExchangeMissing as error:
            raise NotFound(f"There is no exchange {error} on the embedded broker; nothing was sent") from error
        if mandatory and 0 in routed:
            lost = messages[routed.index(0)]
            raise ChannelError(f"No queue is bound to {lost.exchange!r} with {lost.routing_key!r}; it was not stored")

    def _sweep_as_sender(self) -> None:
        self._next_sweep = time.monotonic() + SENDERS_SWEEP_INTERVAL
        try:
            self.store.sweep(timeout=SETTLE_PATIENCE)
        except FileReplaced:
            raise
        except FileUnavailable as error:
            logger.debug("Cannot sweep now: %s", error)

    # Receiving

    def party(self) -> str:
        """Id of this connection's party; the first call makes it."""
        if self._presence is None:
            presence = Presence(self.store.folder)
            try:
                self.store.join(presence.id)
            except BaseException:
                presence.close()
                raise
            self._finalizer = weakref.finalize(self, presence.close)
            self._presence = presence
            self.sweep()
            self._attach()
        return self._presence.id

    def drain_events(self, connection: Any, timeout: float | None = None, **kwargs: Any) -> None:
        """Deliver one message, waiting for it at most ``timeout`` seconds (None: for ever; 0: not at all).

        Raises:
            TimeoutError: if none came.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if time.monotonic() >= self._next_sweep and self._presence is not None:
                self.sweep()
            if self._alarm.is_due():
                self.release_due()
                self._look_again_if_woken()
            if self._deliver_next():
                return
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise TimeoutError(f"No message within {timeout} s")
            wake_up = min(self._next_sweep if self._presence else now + 1.0, self._alarm.at, deadline or float("inf"))
            if self._presence is None:
                time.sleep(max(0.0, wake_up - now))
            else:
                self._presence.wait(wake_up - now)
                self._look_again_if_woken()

    def nudge(self) -> bool:
        """Give the consumers a turn if one has room and something may be waiting for it; from any thread.

        Returns:
            Whether there will be a turn.
        """
        if self._presence is None or not any(channel.wants_turn() for channel in tuple(self.channels)):
            return False
        self._presence.poke()
        return True

    def sweep(self) -> None:
        """Settle what was put off, take over from the dead, end what has expired, and look at all queues again."""
        self._next_sweep = time.monotonic() + self.sweep_interval
        try:
            if self._presence is not None:
                self.settle_put_off(self._presence)
            self.store.sweep(None if self._presence is None else self._presence.id, timeout=SETTLE_PATIENCE)
        except FileReplaced:
            raise
        except FileUnavailable as error:
            logger.warning("Cannot look after the embedded broker now, trying again: %s", error)
        if self._presence is not None:
            self.release_due()
        for channel in tuple(self.channels):
            channel.look_again()

    def release_due(self) -> None:
        """Make ready what is due by now, and set the alarm for what is due next."""
        try:
            due = self.store.release_due(timeout=SETTLE_PATIENCE)
        except FileReplaced:
            raise
        except FileUnavailable as error:
            logger.warning("Cannot look for messages that are due, trying again: %s", error)
            due = time.time() + self.sweep_interval
        self._alarm.set(due)

    def _deliver_next(self) -> bool:
        for channel in tuple(self.channels):
            if channel.deliver_next():
                if channel in self.channels:  # the callback may have closed it; else: others first, next time
                    self.channels.remove(channel)
                    self.channels.append(channel)
                return True
        return False

    def _look_again_if_woken(self) -> None:
        if self._presence is not None and self._presence.settle():
            self.release_due()  # the sender may have left something for later
            for channel in tuple(self.channels):
                channel.look_again()

    # The event loop of Celery's workers

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self._loop = loop
        self._attach()

    def unregister_from_event_loop(self, connection: Any, loop: Any) -> None:
        self._detach()

    def _attach(self) -> None:
        if self._loop is not None and self._presence is not None and self._sweep_timer is None:
            self._loop.add_reader(self._presence.fileno(), self._on_wake)
            self._sweep_timer = self._loop.call_repeatedly(self.sweep_interval, self._on_sweep)
            self._alarm.attach(self._loop, self.release_due)
            self._presence.poke()

    def _detach(self) -> None:
        loop, self._loop = self._loop, None
        timer, self._sweep_timer = self._sweep_timer, None
        if timer is not None and self._presence is not None:
            timer.cancel()
            self._alarm.detach()
            loop.remove_reader(self._presence.fileno())

    def _on_wake(self) -> None:
        self._look_again_if_woken()
        if not self._deliver_next():
            self.settle_waiting()
        self.nudge()

    def _on_sweep(self) -> None:
        self.sweep()
        self.nudge()

    def after_fork(self) -> None:
        """In a forked child: consumers and claims are the parent's; the child starts with none."""
        self._presence = self._loop = self._sweep_timer = None
        self._alarm = Alarm()
        self.settle_nothing()
        self._kept.clear()
        for channel in tuple(self.channels):
            channel.forget()
