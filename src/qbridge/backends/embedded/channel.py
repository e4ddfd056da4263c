"""What does a channel of the embedded broker do? Declares, publishes, consumes and settles, for kombu's classes."""

from __future__ import annotations

import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amqp.exceptions import NotFound, PreconditionFailed, RecoverableConnectionError
from amqp.protocol import queue_declare_ok_t
from kombu.transport import virtual
from kombu.transport.base import to_rabbitmq_queue_arguments

from qbridge.backends.embedded import envelope
from qbridge.backends.embedded.errors import FileReplaced, FileUnavailable
from qbridge.backends.embedded.qos import QoS
from qbridge.backends.embedded.routing import EXCHANGE_TYPES
from qbridge.backends.embedded.store import Claim, Outgoing, Store
from qbridge.serialization.limits import BoundedMessage

if TYPE_CHECKING:
    from qbridge.backends.embedded.transport import Transport

__all__ = ["Channel", "PublishBatch"]

logger: logging.Logger = logging.getLogger(__name__)

# kombu has no usable types here: its base classes, messages and callbacks are Any at this border.
Payload = dict[str, Any]
Callback = Callable[[Any], Any]

CLAIM_PATIENCE = 1.0
"""Seconds that taking a message waits for a busy file before it is left to the next look: a worker's loop waits."""


@dataclass(slots=True)
class Subscription:
    """One consumer of one queue."""

    tag: str
    queue: str
    no_ack: bool
    callback: Callback
    pending: bool = True
    """The queue may hold something that this consumer has not looked at."""


class _Message(virtual.Message, BoundedMessage):
    """kombu's message, which is not decompressed to any size."""


class Channel(virtual.Channel):
    """A channel; everything it declares and sends is in the file, for all processes."""

    Message = _Message
    QoS = QoS
    supports_fanout = True
    body_encoding: Any = None  # SQLite keeps text and bytes as they are
    default_priority = 5  # "normal"; kombu cannot tell a priority of 0 from none

    connection: Transport | None
    qos: Any  # a QoS, made at first use; a property of the base class

    def __init__(self, connection: Transport, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self._subscriptions: deque[Subscription] = deque()

    @property
    def transport(self) -> Transport:
        """The open connection.

        Raises:
            RecoverableConnectionError: if the channel was closed.
        """
        if self.connection is None:
            raise RecoverableConnectionError("The channel of the embedded broker is closed; what it held went back")
        return self.connection

    @property
    def store(self) -> Store:
        """The broker's state."""
        return self.transport.store

    # Declaring

    def exchange_declare(
        self,
        exchange: str | None = None,
        type: str = "direct",  # noqa: A002 - kombu passes it by name
        *args: Any,
        passive: bool = False,
        **kwargs: Any,
    ) -> None:
        kind = type or "direct"
        if kind not in EXCHANGE_TYPES:
            raise PreconditionFailed(
                f"The embedded broker has no exchanges of type {kind!r}, but direct, topic, fanout"
            )
        name = exchange or f"amq.{kind}"
        found = self.store.exchange_type(name) if passive else self.store.declare_exchange(name, kind)
        if found is None:
            raise NotFound(f"There is no exchange {name!r} on the embedded broker")
        if found != kind and not passive:
            raise PreconditionFailed(f"The exchange {name!r} exists with type {found!r}, it cannot become {kind!r}")

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        self.store.delete_exchange(exchange, if_unused=if_unused)

    def prepare_queue_arguments(self, arguments: Mapping[str, Any], **kwargs: Any) -> Any:
        return to_rabbitmq_queue_arguments(arguments, **kwargs)

    def queue_declare(
        self,
        queue: str | None = None,
        passive: bool = False,
        durable: bool = True,
        exclusive: bool = False,
        auto_delete: bool = False,
        arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        name = queue or f"amq.gen-{uuid.uuid4()}"
        if not passive:
            given = arguments or {}
            self.store.declare_queue(
                name,
                durable=durable,
                auto_delete=auto_delete,
                party=self.transport.party() if exclusive else None,
                message_ttl=_seconds(given.get("x-message-ttl")),
                expires=_seconds(given.get("x-expires")),
            )
        elif not self.store.queue_exists(name):
            raise NotFound(f"There is no queue {name!r} on the embedded broker")
        return queue_declare_ok_t(name, self.store.size(name), self.store.consumers(name))

    def queue_bind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", *args: Any, **kwargs: Any
    ) -> None:
        self.store.bind(queue, exchange or "amq.direct", routing_key or "")

    def queue_unbind(
        self, queue: str, exchange: str | None = None, routing_key: str = "", *args: Any, **kwargs: Any
    ) -> None:
        self.store.unbind(queue, exchange or "amq.direct", routing_key or "")

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any) -> int:
        return self.store.delete_queue(queue, if_unused=if_unused, if_empty=if_empty)

    def queue_purge(self, queue: str, **kwargs: Any) -> int:
        return self.store.purge(queue)

    def list_bindings(self) -> list[tuple[str, str, str]]:
        return self.store.bindings()

    def _size(self, queue: str) -> int:
        return self.store.size(queue)

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        return self.store.queue_exists(queue)

    # Sending

    def basic_publish(
        self,
        message: Payload,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.publish_many([(message, exchange, routing_key)], mandatory=mandatory, timeout=timeout)

    def publish_many(
        self, messages: Iterable[tuple[Payload, str, str]], *, mandatory: bool = False, timeout: float | None = None
    ) -> None:
        """Publish prepared messages in one transaction: all are stored, or an error is raised and none is.

        Args:
            messages: each as made by ``prepare_message``, its exchange, its routing key.
            mandatory: raise if a message reached no queue.
            timeout: seconds to wait for the file, if less than ``publish_timeout``.

        Raises:
            FileUnavailable: if the file was not had in time, or could not be written.
            ChannelError: if an exchange does not exist, or ``mandatory`` and a message reached no queue.
        """
        self.transport.send([self.outgoing(*message) for message in messages], mandatory=mandatory, timeout=timeout)

    def outgoing(self, message: Payload, exchange: str, routing_key: str) -> Outgoing:
        """The row that a prepared message becomes."""
        priority = self._get_message_priority(message)
        return envelope.seal(message, exchange or "", routing_key or "", priority)

    def _get_message_priority(self, message: Payload, reverse: bool = False) -> int:
        try:
            return int(super()._get_message_priority(message, reverse=reverse))
        except OverflowError:  # infinite: kombu expects no such number
            return self.default_priority

    def create_publish_batch(self, max_size: int) -> PublishBatch:
        """What ``kombu.Producer.batch`` collects its messages in."""
        return PublishBatch(self, max_size)

    # Receiving

    def basic_consume(
        self, queue: str, no_ack: bool = False, callback: Any = None, consumer_tag: str = "", **kwargs: Any
    ) -> str:
        tag = consumer_tag or uuid.uuid4().hex
        self.store.add_consumer(self.transport.party(), queue, tag)
        self._consumers.add(tag)
        self._subscriptions.append(Subscription(tag, queue, no_ack, callback))
        self.transport.nudge()
        return tag

    def basic_cancel(self, consumer_tag: str) -> None:
        self._consumers.discard(consumer_tag)
        for subscription in [each for each in self._subscriptions if each.tag == consumer_tag]:
            self._subscriptions.remove(subscription)
            try:
                self.store.remove_consumer(self.transport.party(), subscription.queue, consumer_tag)
            except FileUnavailable as error:  # the row goes when the party goes; nothing is delivered any more
                logger.warning("Cannot take a consumer of %s off the list: %s", subscription.queue, error)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        party = self.transport.party()
        self.transport.release_due()
        claim = self.store.claim(queue, party, keep=not no_ack) if self.store.has_ready(queue) else None
        self.store.touch(queue)
        return None if claim is None else self._received(claim, queue, no_ack)

    def keep(self, delivery_tags: Iterable[str]) -> None:
        """Let messages stay claimed when the channel is closed.

        Args:
            delivery_tags: of messages whose tasks run on.
        """
        if self.connection is not None:
            self.qos.keep(delivery_tags)

    @property
    def stays(self) -> bool:
        """Whether claims outlive the channel."""
        return self.qos.staying is not None

    def close(self) -> None:
        """Close the channel; what it holds goes back, but for what is kept."""
        if not self.closed and self.connection is not None and self.qos.kept():
            self.connection.outlive(self.qos)
        super().close()

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        if not self.stays:
            self.transport  # noqa: B018  # a closed channel has given its messages back: say so
        if multiple:
            self.qos.ack_up_to(delivery_tag)
        else:
            self.qos.ack(delivery_tag)

    def settle_now(self) -> None:
        """Write down what has been acknowledged."""
        if self.connection is not None:
            self.connection.settle_waiting()

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if not self.stays:
            self.transport  # noqa: B018  # as above
        self.qos.reject(delivery_tag, requeue=requeue)

    def look_again(self) -> None:
        """Something may have come into any queue."""
        for subscription in self._subscriptions:
            subscription.pending = True

    def wants_turn(self) -> bool:
        """True if a consumer has room and a queue that may hold something for it."""
        return any(self._ready(subscription) for subscription in tuple(self._subscriptions))

    def deliver_next(self) -> bool:
        """Claim one message for one consumer, in turn, and hand it over; False if there is none to be had now."""
        for _ in range(len(self._subscriptions)):
            self._subscriptions.rotate(-1)
            subscription = self._subscriptions[-1]
            if not self._ready(subscription):
                continue
            subscription.pending = False  # before looking: a wake-up from now on must not be lost
            try:
                claim = self.transport.claim(subscription.queue, keep=not subscription.no_ack, timeout=CLAIM_PATIENCE)
            except FileReplaced:
                raise
            except FileUnavailable as error:  # reconnecting would give running tasks to others: look again at the sweep
                logger.warning("Cannot take a message from %s, trying again: %s", subscription.queue, error)
                continue
            if claim is not None:
                subscription.pending = True
                subscription.callback(self._received(claim, subscription.queue, subscription.no_ack))
                return True
        return False

    def forget(self) -> None:
        """Drop consumers and claims without a word to the file: in a forked child, where they are the parent's."""
        self._subscriptions.clear()
        self._consumers.clear()
        self.qos.forget()

    def _ready(self, subscription: Subscription) -> bool:
        return subscription.pending and (subscription.no_ack or self.qos.can_consume())

    def decode_body(self, body: Any, encoding: Any = None) -> Any:
        """Return a body as it is in the file.

        Raises:
            ValueError: if its sender says that it is encoded: nothing is here, and decoding what is not would lose it.
        """
        if encoding and str(encoding).lower() != "utf-8":
            raise ValueError("The embedded broker keeps no encoded bodies")
        return body

    def _received(self, claim: Claim, queue: str, no_ack: bool) -> Any:
        try:
            message = self.Message(envelope.open_up(claim, queue), channel=self)
        except Exception as error:  # noqa: BLE001 - whatever its sender wrote
            logger.warning("A message of %s cannot be read: %s", queue, type(error).__name__)  # not what it holds
            message = self.Message(envelope.unreadable(claim, queue), channel=self)
        if not no_ack:
            self.qos.append(message, message.delivery_tag)
        return message


class PublishBatch:
    """Collects messages for one transaction; kombu's ``Producer.batch`` drives it."""

    def __init__(self, channel: Channel, max_size: int) -> None:
        self.channel = channel
        self.max_size = max_size
        self._messages: list[Outgoing] = []

    def publish(self, message: Payload, exchange: str = "", routing_key: str = "", **kwargs: Any) -> None:
        """Add a message; at ``max_size`` all are sent."""
        self._messages.append(self.channel.outgoing(message, exchange, routing_key))
        if len(self._messages) >= self.max_size:
            self.flush()

    def flush(self) -> None:
        """Send what was collected: all of it, or an error and none of it."""
        messages, self._messages = self._messages, []
        if messages:
            self.channel.transport.send(messages)

    def discard(self) -> None:
        """Send nothing of what was collected."""
        self._messages = []

    def close(self) -> None:
        """Nothing to close."""


def _seconds(milliseconds: Any) -> float | None:
    return None if milliseconds is None else float(milliseconds) / 1000
