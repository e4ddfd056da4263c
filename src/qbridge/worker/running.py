"""Is a message that comes again one that this worker runs already, or has run? Then it is not run a second time.

A broker delivers again what a broken connection had not acknowledged. A thread goes on meanwhile: in Celery the same
worker then runs the task beside itself. Here the copy waits for the first run, and is settled as that is.
"""

from __future__ import annotations

import threading
from typing import Any

from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.request import Request

__all__ = ["AdoptingRequest", "is_taken_over"]

logger = get_logger(__name__)

# A run may end in its thread while the loop hands it a copy.
_lock = threading.Lock()


class AdoptingRequest(Request):
    """A request that settles the copies of its message too."""

    _copies: tuple[tuple[Any, Any], ...] = ()

    def adopt(self, message: Any, consumer: Any) -> bool:
        """Take over a copy of the message; False if the run has ended.

        Args:
            message: the copy.
            consumer: whose loop settles it.
        """
        with _lock:
            if self.acknowledged:
                return False
            self._copies = (*self._copies, (message, consumer))
            return True

    def acknowledge(self) -> None:
        """Acknowledge the message and its copies."""
        with _lock:
            super().acknowledge()
            copies, self._copies = self._copies, ()
        for message, consumer in copies:
            consumer.call_soon_ack(message.ack_log_error, logger, consumer.connection_errors)

    def reject(self, requeue: bool = False) -> None:
        """Reject the message and its copies."""
        with _lock:
            super().reject(requeue=requeue)
            copies, self._copies = self._copies, ()
        for message, consumer in copies:
            consumer.call_soon_ack(message.reject_log_error, logger, consumer.connection_errors, requeue)


def is_taken_over(message: Any, consumer: Any) -> bool:
    """Tell whether a message needs no run of its own: it waits for the run that goes on, or is acknowledged.

    A retry of the task has the same id, but another number, and nobody has had it before.

    Args:
        message: as it came.
        consumer: whose it is.
    """
    if not message.delivery_info.get("redelivered"):
        return False
    headers = message.headers or {}
    task_id = headers.get("id")
    if task_id in state.successful_requests:
        logger.info("Task %s came again although it has succeeded here: its acknowledgement was lost", task_id)
        message.ack_log_error(logger, consumer.connection_errors)
        return True
    request: Any = state.requests.get(task_id)
    if (
        not isinstance(request, AdoptingRequest)
        or request not in state.active_requests
        or request.message.channel is message.channel
        or (request.message.headers or {}).get("retries") != headers.get("retries")
    ):
        return False
    logger.info("Task %s came again while it runs here: the copy waits for its end", task_id)
    return request.adopt(message, consumer)
