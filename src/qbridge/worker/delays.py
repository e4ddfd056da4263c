"""What does a worker do with a task whose time has not come? It gives it back to whoever keeps delays on disk.

What a bridge sends arrives when it is due. A plain Celery producer leaves the ETA to the workers, and Celery's worker
holds such a message in its memory, unacknowledged: on Redis until another worker takes it for lost and it runs twice,
on RabbitMQ until ``consumer_timeout`` closes the channel, and where the prefetch count cannot grow (quorum queues) in
the place of tasks that could run now.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from celery.utils.log import get_logger
from celery.utils.time import maybe_iso8601
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from kombu.common import Broadcast
from kombu.transport.native_delayed_delivery import bind_queue_to_native_delayed_delivery_exchange

from qbridge.backends.base import TAKEN_FROM
from qbridge.backends.deadline import deadline
from qbridge.worker.resending import PATIENCE, send_again

__all__ = ["HELD", "Delays", "NativeDelivery"]

logger = get_logger(__name__)

HELD = 2.0
"""Seconds before its time for which a worker holds a task: RabbitMQ's delays are whole seconds, the rest is ours."""

_AGAIN = 5.0  # seconds until the next attempt to give it back


class Delays:
    """Gives tasks back that are not due.

    Args:
        consumer: the worker's.
    """

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._app: Any = consumer.app

    def put_back(self, message: Any, again: Any) -> bool:
        """Give a message back to the broker's schedule, and acknowledge it there once that has the copy.

        Args:
            message: as it was received; if it is due, its ETA is taken off, so that it runs without Celery's timer.
            again: called with the message after a while if the broker does not take it now.

        Returns:
            True if it was dealt with; False if the worker has to go on with it.
        """
        headers = message.headers
        eta = headers.get("eta") if isinstance(headers, Mapping) else None
        if eta is None or "task" not in headers:
            return False
        moment = self._moment(eta)
        if moment is None:
            return False  # Celery says what is wrong with it
        if getattr(message.channel, "connection", None) is None:
            return True  # its channel is gone: the broker delivers it again
        ahead = moment.timestamp() - time.time()
        if ahead <= 0:
            message.headers = {**headers, "eta": None}
        if ahead <= HELD or self._ends_anyway(headers):
            return False
        try:
            with deadline(PATIENCE):
                where = self._schedule_of(message, ahead)
            if where is None:
                return False
            send_again(self._app, message, {**headers, "eta": moment.isoformat()}, *where)
        except Exception as error:  # noqa: BLE001 - it stays unacknowledged, whatever it was
            logger.warning(
                "Cannot give the task %s[%s] back until it is due, trying again in %g s: %s",
                headers["task"], headers.get("id"), _AGAIN, error,
            )  # fmt: skip
            self._consumer.timer.call_after(_AGAIN, again, (message,))
            return True
        message.ack_log_error(logger, self._consumer.connection_errors)
        return True

    def _moment(self, eta: Any) -> datetime | None:
        try:
            moment: datetime | None = maybe_iso8601(eta)
            if moment is None:
                return None
            if moment.tzinfo is None:
                moment = moment.replace(tzinfo=self._app.timezone)
            moment.timestamp()
        except (TypeError, ValueError, OverflowError):
            return None
        return moment

    def _ends_anyway(self, headers: Mapping[str, Any]) -> bool:
        """Return whether the task is refused at once: it is revoked, or has expired."""
        task_id = headers.get("id")
        if task_id in self._consumer.revocations or task_id in self._consumer.controller.state.revoked:
            return True
        expires = headers.get("expires")
        moment = None if expires is None else self._moment(expires)
        return moment is not None and moment.timestamp() <= time.time()

    def _schedule_of(self, message: Any, ahead: float) -> tuple[str, str] | None:
        """Return the exchange and routing key under which the broker keeps the message; None: it has no schedule."""
        info = message.delivery_info
        if self._consumer.connection.transport.driver_type != "amqp":
            if TAKEN_FROM in info:
                return "", info[TAKEN_FROM]  # by its own key it could go to more queues than this one
            exchange, key = info.get("exchange"), info.get("routing_key")
            return None if key is None else (exchange or "", key)
        tags: Mapping[str, str] = self._consumer.task_consumer._active_tags
        name = next((queue for queue, tag in tags.items() if tag == info.get("consumer_tag")), None)
        queue = self._app.amqp.queues.get(name) if name is not None else None
        delayed: tuple[str, str] | None = self._app.native_delays.route(queue, ahead) if queue is not None else None
        return delayed


class NativeDelivery(DelayedDelivery):
    """Celery's step that makes RabbitMQ's delays ready; ours leaves out what this worker does not consume.

    Celery binds every queue of the app. One that no worker and no producer has declared yet is an error of the server,
    and a critical one in the log. Such a queue is bound by whoever declares it: its worker here, a producer before its
    first delayed message.
    """

    def _bind_queues(self, app: Any, connection: Any) -> None:
        for queue in app.amqp.queues.consume_from.values():
            if not isinstance(queue, Broadcast):  # it has no name that a message could be sent to
                bind_queue_to_native_delayed_delivery_exchange(connection, queue)
