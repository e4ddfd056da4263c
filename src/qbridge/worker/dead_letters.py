"""Where does a message go that a worker cannot handle? To ``<queue>.dead``, before it leaves its own queue.

Celery acknowledges or rejects such a message, and it is gone: a dead-letter exchange does not see what was
acknowledged, and Redis has none. So the worker writes the copy itself, the same way on every broker, and has the
broker confirm it first. The body is kept byte for byte, the headers as they were, beside one of ours that says why.
On RabbitMQ the queue is a classic one: looking into a quorum queue counts as deliveries, which end at 20.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from celery.utils.log import get_logger
from kombu.entity import Exchange, Queue

from qbridge.backends.deadline import deadline

__all__ = ["HEADER_DEAD_LETTER", "DeadLetters", "Reason"]

logger = get_logger(__name__)

HEADER_DEAD_LETTER = "qbridge_dead_letter"
"""Message header with the record of a dead letter, as JSON."""

Reason = Literal["undecodable", "unknown_task", "malformed"]
"""Why a message became a dead letter."""

_PATIENCE = 5.0  # seconds for the broker to take the copy: the worker's loop waits
_AGAIN = 5.0  # seconds until the message is looked at again if the broker did not
_LONGEST_ERROR = 2000  # characters: a server refuses headers above its frame size

# Not ``expiration``: a dead letter stays until somebody has seen it.
_PROPERTIES = ("correlation_id", "reply_to", "priority", "message_id", "timestamp", "type", "app_id")


class DeadLetters:
    """Keeps copies of the messages that a worker refuses.

    Args:
        consumer: the worker's.
    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._app: Any = consumer.app

    def keep(self, message: Any, reason: Reason, error: Exception, again: Callable[[Any], Any]) -> bool:
        """Write a message to its queue's dead letters.

        Args:
            message: as it was received, and not acknowledged.
            reason: why it cannot be handled.
            error: what handling it raised.
            again: called with the message after a while if the broker does not take the copy now.

        Returns:
            True if the broker has the copy and the message may leave its queue; False if it has to stay there.
        """
        if not self._app.safe or message.acknowledged:
            return True  # Celery's own way; or it was dealt with before what failed
        channel = message.channel
        if getattr(channel, "connection", None) is None and not getattr(channel, "stays", False):
            return False  # its channel is gone: the broker delivers it again
        queue = self._queue_of(message)
        try:
            self._send(message, queue, self._record(message, queue, reason, error))
        except Exception as trouble:  # noqa: BLE001 - it stays unacknowledged, whatever it was
            logger.warning(
                "Cannot write a dead letter to %s.dead, the message stays; trying again in %g s: %s",
                queue, _AGAIN, trouble,
            )  # fmt: skip
            self._consumer.timer.call_after(_AGAIN, again, (message,))
            return False
        logger.warning("A message of %s that cannot be handled (%s) is kept in %s.dead", queue, reason, queue)
        return True

    def _queue_of(self, message: Any) -> str:
        info, queues = message.delivery_info, self._app.amqp.queues
        tags: Mapping[str, str] = self._consumer.task_consumer._active_tags
        key = info.get("routing_key")
        for name, tag in tags.items():
            if tag == info.get("consumer_tag"):
                return name
        if key in tags or key in queues:
            return str(key)
        here = (info.get("exchange"), key)
        named = (name for name in tags if (queue := queues[name]) and (queue.exchange.name, queue.routing_key) == here)
        return next(named, str(self._app.conf.task_default_queue))

    def _record(self, message: Any, queue: str, reason: Reason, error: Exception) -> str:
        return json.dumps({
            "queue": queue,
            "reason": reason,
            "error": type(error).__name__,
            "text": str(error)[:_LONGEST_ERROR],
            "at": datetime.now(UTC).isoformat(),
            "worker": self._consumer.hostname,
            "content_type": message.content_type,
            "content_encoding": message.content_encoding,
        }, default=repr)  # fmt: skip

    def _send(self, message: Any, queue: str, record: str) -> None:
        amqp = self._consumer.connection.transport.driver_type == "amqp"
        arguments = {"x-queue-type": "classic"} if amqp else None
        name = f"{queue}.dead"
        headers = message.headers if isinstance(message.headers, Mapping) else {}
        properties = {name: message.properties[name] for name in _PROPERTIES if message.properties.get(name)}
        with deadline(_PATIENCE), self._app.producer_or_acquire() as producer:
            limit = producer.max_payload_bytes
            producer.max_payload_bytes = None  # the broker has the message already
            try:
                producer.publish(
                    _raw(message.body),
                    exchange="",
                    routing_key=name,
                    declare=[Queue(name, Exchange(""), name, durable=True, queue_arguments=arguments)],
                    headers={**headers, HEADER_DEAD_LETTER: record},
                    # without one kombu would make JSON of the body; what it was is in the record
                    content_type=message.content_type or "application/data",
                    content_encoding=message.content_encoding or "binary",
                    delivery_mode=2,
                    confirm_timeout=_PATIENCE,
                    retry=False,
                    **properties,
                )
            finally:
                producer.max_payload_bytes = limit


def _raw(body: Any) -> bytes:
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    text = "" if body is None else body if isinstance(body, str) else json.dumps(body, default=repr)
    return text.encode("utf-8", "surrogatepass")
