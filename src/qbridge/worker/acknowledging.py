"""When is a message acknowledged, by the side of its task and of other messages? The part of the consumer that knows.

Late ones of a solo worker go together, where the transport can do that: ``hold_acks`` of RabbitMQ's connection and of
the embedded broker's transport, and the keeper of Redis. Early ones (``at_most_once``) go alone, on every pool.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from celery.concurrency import solo
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer

__all__ = ["AcknowledgingConsumer"]

logger = get_logger(__name__)


class AcknowledgingConsumer(Consumer):
    """Celery's consumer, whose acknowledgements in the loop itself wait for no timer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._acks_inline = isinstance(self.pool, solo.TaskPool)
        self._settle_before_a_run: Callable[[], None] | None = None
        if self._acks_inline:
            ours: Any = self
            self._begin = ours.on_task_request
            ours.on_task_request = self._begin_settled

    def _begin_settled(self, request: Any) -> Any:
        """Run a task in the loop; one that a timer begins may come between an acknowledgement and what it waits for."""
        if self._settle_before_a_run is not None:
            self._settle_before_a_run()
        return self._begin(request)

    def call_soon_ack(self, p: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Acknowledge or reject: at once where the task runs in the loop itself, else as Celery does.

        What is acknowledged before its task runs waits for no other acknowledgement: it would be run again if it took
        its worker with it.
        """
        message: Any = getattr(p, "__self__", None)
        if message is not None and not self._is_late(message):
            p = partial(_alone, p, message, self.connection_errors)
        if not self._acks_inline:
            return super().call_soon_ack(p, *args, **kwargs)
        return p(*args, **kwargs)

    def _is_late(self, message: Any) -> bool:
        app: Any = self.app
        task = app.tasks.get((message.headers or {}).get("task"))
        return bool(getattr(task, "acks_late", False))

    def hold_acks(self) -> None:
        """Have acknowledgements go together that are made one after the other in the loop itself."""
        self._settle_before_a_run = None
        connection: Any = self.connection
        if not self._acks_inline or not connection:
            return
        for holder in (connection._connection, connection.transport):
            hold = getattr(holder, "hold_acks", None)
            if hold is not None:
                hold(self.initial_prefetch_count)
                self._settle_before_a_run = getattr(holder, "settle_waiting", None)


def _alone(acknowledge: Callable[..., Any], message: Any, errors: tuple[type[Exception], ...], *args: Any) -> None:
    acknowledge(*args)
    settle = getattr(message.channel, "settle_now", None)
    if settle is not None:
        try:
            settle()
        except errors as error:
            logger.warning("Cannot acknowledge task %s before it runs: %s", (message.headers or {}).get("id"), error)
