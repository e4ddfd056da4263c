"""How much waits in RabbitMQ's queues, and how many consume them? Asked by passive declares, which change nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from amqp.exceptions import NotFound

from qbridge.backends.base import QueueDepth

__all__ = ["queue_depths"]


def queue_depths(connection: Any, names: Iterable[str]) -> list[QueueDepth]:
    """Ask for each queue.

    Args:
        connection: an open kombu connection; its own bounds apply.
        names: of queues.

    Returns:
        One depth per name; messages held by workers are not told by AMQP.
    """
    return [_one(connection, name) for name in names]


def _one(connection: Any, name: str) -> QueueDepth:
    channel = connection.channel()
    try:
        found = channel.queue_declare(queue=name, passive=True)
    except NotFound:  # the server has closed the channel
        return QueueDepth(name, None)
    channel.close()
    return QueueDepth(name, int(found.message_count), consumers=int(found.consumer_count))
