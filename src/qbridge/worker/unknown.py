"""What does a worker do with a task that it does not know? For a while it leaves it to workers that may.

In a rolling deploy some workers know a new task, or new arguments of one, and some do not yet. Celery deletes the
message at the first that does not. Here it goes back to its queue, to come again after a second, and then after as long
as it has gone around, up to half a minute. When the grace period is over it becomes a dead letter, and its caller gets
``NotRegistered``, or is told of the version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from celery import signals
from celery.exceptions import NotRegistered
from celery.utils.log import get_logger

from qbridge.dead_letters.letter import HEADER_UNKNOWN_SINCE
from qbridge.worker.resending import headers_of, pause_of, put_off, queue_of, send_again

__all__ = ["UnknownTasks"]

logger = get_logger(__name__)

_AGAIN = 5.0  # seconds until the next attempt to give a message back


class UnknownTasks:
    """Gives unknown tasks back for as long as they may become known.

    Args:
        consumer: the worker's.
    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._app: Any = consumer.app

    def put_back(self, message: Any, again: Callable[[Any], Any], what: str = "the task") -> bool:
        """Give a message back to its queue, and acknowledge it there once the broker has the copy.

        Args:
            message: as it was received.
            again: called with the message after a while if the broker does not take it now.
            what: is unknown, for the log.

        Returns:
            False if its time is over.
        """
        headers = headers_of(message)
        since, pause = pause_of(headers, HEADER_UNKNOWN_SINCE)
        left = since + float(self._app.unknown_task_grace) - time.time()
        if left <= 0:
            return False
        if getattr(message.channel, "connection", None) is None:
            return True  # its channel is gone: the broker delivers it again
        pause, first = min(pause, max(1.0, left)), HEADER_UNKNOWN_SINCE not in headers
        headers = {**headers, HEADER_UNKNOWN_SINCE: since}
        try:
            if not put_off(self._consumer, message, pause, headers):
                # a queue without delays: the worker waits itself, and then others have a turn
                self._consumer.timer.call_after(pause, self._send, (message, headers, again))
                return True
        except Exception as error:  # noqa: BLE001 - it stays unacknowledged, whatever it was
            self._not_taken(message, error, again)
            return True
        if first:
            logger.warning(
                "This worker does not know %s %s: [%s] goes back to its queue, for up to %g s",
                what, headers.get("task"), headers.get("id"), left,
            )  # fmt: skip
        message.ack_log_error(logger, self._consumer.connection_errors)
        return True

    def _send(self, message: Any, headers: Mapping[str, Any], again: Callable[[Any], Any]) -> None:
        if getattr(message.channel, "connection", None) is None:
            return
        try:
            send_again(self._app, message, headers, "", queue_of(self._consumer, message))
        except Exception as error:  # noqa: BLE001 - as above
            self._not_taken(message, error, again)
        else:
            message.ack_log_error(logger, self._consumer.connection_errors)

    def _not_taken(self, message: Any, error: Exception, again: Callable[[Any], Any]) -> None:
        logger.warning(
            "Cannot give the unknown task %s back, trying again in %g s: %s",
            headers_of(message).get("task"), _AGAIN, error,
        )  # fmt: skip
        self._consumer.timer.call_after(_AGAIN, again, (message,))

    def end(self, message: Any, error: Exception, what: str = "the task", failure: Exception | None = None) -> None:
        """Take a message that is kept elsewhere off its queue, and tell its caller.

        As Celery does, but that a result backend that is away does not end the worker, and the log has no arguments.

        Args:
            message: as it was received.
            error: what looking for the task raised.
            what: is unknown, for the log.
            failure: what its caller gets; None: ``NotRegistered``.
        """
        told = headers_of(message)
        if "task" not in told:  # protocol 1: headers and arguments in one mapping
            told = message.payload
        task_id, name = told["id"], told["task"]
        failure = NotRegistered(name) if failure is None else failure
        logger.error("No worker has known %s %s: [%s] is given up", what, name, task_id)
        message.reject_log_error(logger, self._consumer.connection_errors)
        request = SimpleNamespace(
            id=task_id,
            name=name,
            chord=None,
            errbacks=None,
            root_id=told.get("root_id"),
            correlation_id=message.properties.get("correlation_id"),
            reply_to=message.properties.get("reply_to"),
        )
        try:
            self._app.backend.mark_as_failure(task_id, failure, request=request)
        except Exception as trouble:  # noqa: BLE001 - whatever the backend does: the message is kept
            logger.warning("Cannot store that the task %s[%s] is unknown: %s", name, task_id, trouble)
        dispatcher = self._consumer.event_dispatcher
        if dispatcher:
            dispatcher.send("task-failed", uuid=task_id, exception=repr(failure))
        signals.task_unknown.send(sender=self._consumer, message=message, exc=error, name=name, id=task_id)
