"""Does anything wait in the queues that a worker consumes? Asked by the worker itself, on a connection of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qbridge.backends.base import QueueDepth
from qbridge.backends.deadline import deadline
from qbridge.backends.rabbitmq.depth import queue_depths

__all__ = ["queues_with_messages"]


def queues_with_messages(app: Any, names: Iterable[str], *, timeout: float) -> list[QueueDepth]:
    """Return those of some queues in which messages are ready to be delivered.

    Args:
        app: the bridge's app.
        names: of queues.
        timeout: seconds for all of it.

    Raises:
        Exception: whatever the broker's client raises if it does not answer in time.
    """
    with deadline(timeout), app.pool.acquire(block=True, timeout=timeout) as connection:
        connection.ensure_connection(max_retries=1)
        if connection.transport.driver_type == "amqp":
            depths = queue_depths(connection, names)
        else:
            channel = connection.default_channel
            depths = [QueueDepth(name, int(channel._size(name))) for name in names]
    return [depth for depth in depths if depth.waiting]
