"""How are dead letters read on RabbitMQ? Got one by one, not acknowledged, and given back in their order at the end.

AMQP cannot look without taking. What was taken returns to its place when the channel is closed; a classic queue counts
no deliveries. Meanwhile nobody else sees it, so readers take turns: an exclusive queue is their lock, and the server
lets go of it when its owner dies.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from amqp.exceptions import ConnectionError as AMQPConnectionError
from amqp.exceptions import NotFound, ResourceLocked

from qbridge.backends.deadline import bounded, remaining
from qbridge.backends.kept import InUse, Kept
from qbridge.backends.rabbitmq.publisher import ConfirmChannel

__all__ = ["open_queue"]

_PAUSE = 0.1  # seconds between two looks at whether another reader has finished

_NAMES = (
    "content_type", "content_encoding", "correlation_id", "reply_to", "priority", "message_id", "timestamp", "type",
    "app_id",
)  # fmt: skip


@contextmanager
def open_queue(connection: Any, name: str) -> Iterator[_Queue]:
    """Open a queue of dead letters for reading; one that does not exist is empty.

    Args:
        connection: a kombu connection that nobody else uses.
        name: of the queue.

    Raises:
        InUse: if another reader does not finish before the caller's deadline.
    """
    connection.ensure_connection(max_retries=1, timeout=bounded(None))
    amqp = connection.connection
    with _turn(amqp, f"{name}.reader"):
        channel = amqp.channel()
        channel.auto_decode = False  # a body is bytes, whatever its encoding says
        try:
            count = int(channel.queue_declare(queue=name, passive=True).message_count)
        except NotFound:  # the server has closed the channel
            yield _Queue(amqp, None, name, 0)
            return
        try:
            yield _Queue(amqp, channel, name, count)
        finally:
            with suppress(OSError, AMQPConnectionError):  # a connection that is gone has given everything back
                channel.close()


@contextmanager
def _turn(amqp: Any, name: str) -> Iterator[None]:
    while True:
        channel = amqp.channel()
        try:
            channel.queue_declare(queue=name, exclusive=True, durable=False, auto_delete=False)
            break
        except ResourceLocked:
            left = remaining()
            if left is not None and left < 2 * _PAUSE:
                raise InUse(f"somebody else reads it: the queue {name!r} is locked") from None
            time.sleep(_PAUSE)
    try:
        yield
    finally:
        with suppress(OSError, AMQPConnectionError):
            channel.queue_delete(queue=name)
            channel.close()


class _Queue:
    def __init__(self, amqp: Any, channel: Any, name: str, count: int) -> None:
        self._amqp = amqp
        self._channel = channel
        self._name = name
        self._count = count
        self._confirms: ConfirmChannel | None = None

    def look(self) -> Iterator[Kept]:
        """Yield what was there when the queue was opened, oldest first; once for each opening."""
        for _ in range(self._count):
            message = self._channel.basic_get(self._name)
            if message is None:
                return
            properties = message.properties
            yield Kept(
                place=message.delivery_tag,
                body=bytes(message.body or b""),  # py-amqp gives an empty text for an empty body
                headers=properties.get("application_headers") or {},
                properties={key: properties[key] for key in _NAMES if properties.get(key) is not None},
            )

    def discard(self, kept: Kept) -> bool:
        """Delete a message."""
        self._channel.basic_ack(kept.place)
        return True  # it is in our hands

    def send(self, kept: Kept, queue: str, headers: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
        """Publish a message to another queue, confirmed, then delete it here."""
        if self._confirms is None:
            self._confirms = ConfirmChannel(self._amqp)
        named = {key: properties.get(key) for key in _NAMES}
        message = self._confirms.channel.prepare_message(
            kept.body,
            named.pop("priority"),
            named.pop("content_type"),
            named.pop("content_encoding"),
            dict(headers),
            {"delivery_mode": 2, **{key: value for key, value in named.items() if value is not None}},
        )
        self._confirms.publish(message, exchange="", routing_key=queue)
        self._confirms.settle()
        return self.discard(kept)
