"""Is a message that comes again one that this worker runs already, or has run? Then it is not run a second time.

A broker delivers again what a broken connection had not acknowledged. A thread goes on meanwhile: in Celery the same
worker then runs the task beside itself. Here the copy waits for the first run, and is settled as that is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.request import Request

from qbridge.standing import comes_again
from qbridge.worker.ending import end_processes

__all__ = ["AdoptingRequest", "end_running", "is_taken_over", "keep_claimed"]

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


def end_running(pool: Any) -> list[Any]:
    """End what runs in the pool's processes, before its messages are given up with the connection.

    Celery gives the connection up first, and another worker may begin the task before the process has ended.

    Args:
        pool: of processes.

    Returns:
        The requests whose runs were ended.
    """
    ended = []
    for request in tuple(state.active_requests):
        if request.task.acks_late and not request.acknowledged:
            logger.warning("Ending task %s: its connection broke, and it will be delivered again", request.id)
            ended.append(request)
            try:
                request.cancel(pool)
            except Exception as error:  # noqa: BLE001 - that it is cancelled is stored, and may not be to be stored
                logger.warning("Cannot say that task %s was cancelled: %s", request.id, error)
    end_processes(request.worker_pid for request in ended if request.worker_pid)
    return ended


def keep_claimed(requests: Iterable[Any]) -> None:
    """Have the messages of running tasks stay with this worker although its connection is given up.

    A broker whose claims are leases can do that (Redis): the run is acknowledged on another connection. RabbitMQ
    delivers again what was not acknowledged on a connection that broke.

    Args:
        requests: whose tasks run on.
    """
    channels: dict[Any, list[Any]] = {}
    for request in requests:
        if not request.acknowledged and hasattr(request.message.channel, "keep"):
            channels.setdefault(request.message.channel, []).append(request.message.delivery_tag)
    for channel, tags in channels.items():
        try:
            channel.keep(tags)
        except Exception as error:  # noqa: BLE001 - then they go back, and may run elsewhere meanwhile
            logger.warning("Cannot keep what %d running tasks have claimed: %s", len(tags), error)


def is_taken_over(message: Any, consumer: Any) -> bool:
    """Tell whether a message needs no run of its own: it waits for the run that goes on, or is acknowledged.

    A retry of the task has the same id, but another number, and nobody has had it before.

    Args:
        message: as it came.
        consumer: whose it is.
    """
    headers = message.headers or {}
    if not comes_again(message.delivery_info, headers):
        return False
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
