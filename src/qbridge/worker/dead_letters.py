"""Where does a message go that a worker gives up? To ``<queue>.dead``, before it leaves its own queue.

Celery acknowledges or rejects such a message, and it is gone: a dead-letter exchange does not see what was
acknowledged, and Redis has none. So the worker writes the copy itself, the same way on every broker, and has the
broker confirm it first. The body is kept byte for byte, the headers as they were, beside one of ours that says why.
On RabbitMQ the queue is a classic one: looking into a quorum queue counts as deliveries, which end at 20.

If the broker does not take the copy, the message goes to the end of its own queue, to come again after a while, with
the record in it: so it is not run again, and takes no place of a task that could run. If the broker takes nothing at
all, the message stays unacknowledged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.utils.log import get_logger
from kombu.entity import Exchange, Queue

from qbridge.dead_letters.cutting import with_record
from qbridge.dead_letters.letter import HEADER_DEAD_LETTER, Reason, is_record, name_of, record_of
from qbridge.retrying import HEADER_ATTEMPTS_SINCE
from qbridge.worker.resending import headers_of, losses_of, put_off, queue_of, send_again
from qbridge.worker.unlocking import received

__all__ = ["DeadLetters"]

logger = get_logger(__name__)

_AGAIN = 5.0  # seconds until the message is looked at again if the broker did not take the copy


class DeadLetters:
    """Keeps copies of the messages that a worker gives up.

    Args:
        consumer: the worker's.
    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._app: Any = consumer.app

    def keep(
        self,
        message: Any,
        reason: Reason,
        error: BaseException | None,
        again: Callable[[Any], Any],
        *,
        attempts: int = 0,
        crashes: int | None = None,
        traceback: str = "",
        late: bool = True,
    ) -> bool:
        """Write a message to its queue's dead letters.

        Args:
            message: as it was received, and not acknowledged.
            reason: why it is given up.
            error: what handling it raised.
            again: called with the message after a while if the broker takes nothing now.
            attempts: runs of its task.
            crashes: losses that count; None: as the message has it.
            traceback: of the error.
            late: False for a message that was acknowledged before its task ran.

        Returns:
            True if the message may leave its queue: the broker has the copy, or what it takes to write it later. False
            if it stays there.
        """
        if not self._app.safe or (late and message.acknowledged):
            return True  # Celery's own way; or it was dealt with before what failed
        channel = message.channel
        if late and getattr(channel, "connection", None) is None and not getattr(channel, "stays", False):
            return False  # its channel is gone: the broker delivers it again
        came = received(message)
        queue, headers = queue_of(self._consumer, message), headers_of(came)
        record = headers.get(HEADER_DEAD_LETTER)
        if not is_record(record):
            record = record_of(
                queue=queue,
                reason=reason,
                error=error,
                traceback=traceback,
                worker=str(self._consumer.hostname),
                attempts=attempts,
                crashes=losses_of(message) if crashes is None else crashes,
                first_at=headers.get(HEADER_ATTEMPTS_SINCE),
                content_type=came.content_type,
                content_encoding=came.content_encoding,
                priority=message.properties.get("priority"),
            )
        try:
            self._send(message, queue, record)
        except Exception as trouble:  # noqa: BLE001 - it is not acknowledged, whatever it was
            if late:
                return self._put_off(message, queue, record, trouble, again)
            name = name_of(queue)
            logger.warning("%s does not take a message of %s that was given up (%s): %s", name, queue, reason, trouble)
            return True
        logger.warning("A message of %s was given up (%s) and is kept in %s", queue, reason, name_of(queue))
        return True

    def _send(self, message: Any, queue: str, record: str) -> None:
        amqp = self._consumer.connection.transport.driver_type == "amqp"
        arguments = {"x-queue-type": "classic"} if amqp else None
        name = name_of(queue)
        send_again(
            self._app,
            message,
            with_record(headers_of(received(message)), record),
            "",
            name,
            declare=[Queue(name, Exchange(""), name, durable=True, queue_arguments=arguments)],
            priority=None,
        )

    def _put_off(self, message: Any, queue: str, record: str, trouble: Exception, again: Callable[[Any], Any]) -> bool:
        logger.warning(
            "Cannot write a dead letter to %s, the message stays in %s; trying again in %g s: %s",
            name_of(queue), queue, _AGAIN, trouble,
        )  # fmt: skip
        try:
            marked = with_record(headers_of(received(message)), record)
            left = put_off(self._consumer, message, _AGAIN, marked)
        except Exception as error:  # noqa: BLE001 - then it stays with us, not acknowledged
            logger.warning("The broker takes nothing at all: %s", error)
            left = False
        if not left:
            self._consumer.timer.call_after(_AGAIN, again, (message,))
        return left
