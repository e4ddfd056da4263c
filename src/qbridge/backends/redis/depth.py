"""How much waits in Redis's lists? One LLEN per queue and priority; Redis knows no consumers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qbridge.backends.base import QueueDepth

__all__ = ["held_by_workers", "queue_depths"]


def queue_depths(connection: Any, names: Iterable[str]) -> list[QueueDepth]:
    """Ask for each queue; an empty list does not exist in Redis, so a queue that was never used is empty as well.

    Args:
        connection: an open kombu connection; its own bounds apply.
        names: of queues.
    """
    channel = connection.default_channel
    return [QueueDepth(name, int(channel._size(name))) for name in names]


def held_by_workers(connection: Any) -> int:
    """Count the messages that workers have taken and not acknowledged, of all queues of the database together.

    Args:
        connection: an open kombu connection.
    """
    channel = connection.default_channel
    return int(channel.client.hlen(channel.unacked_key))
