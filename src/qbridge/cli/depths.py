"""How is each broker asked for its queues, within which time, and what if it does not answer?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from qbridge.backends.base import QueueDepth
from qbridge.backends.deadline import deadline
from qbridge.backends.embedded import EmbeddedBroker
from qbridge.bridge import Bridge
from qbridge.exceptions import BrokerUnavailable

__all__ = ["Depths", "read_depths"]


@dataclass(frozen=True)
class Depths:
    """What a broker told.

    Args:
        queues: one depth per queue.
        held: messages that workers hold, of all queues together, where only that is known.
    """

    queues: tuple[QueueDepth, ...]
    held: int | None = None


def read_depths(bridge: Bridge, timeout: float) -> Depths:
    """Ask the broker of a bridge.

    Args:
        bridge: a loaded one; every queue that it knows is asked for.
        timeout: seconds for all of it.

    Raises:
        BrokerUnavailable: if it cannot be reached, or not in time.
    """
    names = sorted(bridge.celery.amqp.queues)
    kind = bridge.config.broker.kind
    try:
        with deadline(timeout):
            if kind == "embedded":
                from qbridge.backends.embedded.depth import queue_depths as in_file

                return Depths(tuple(in_file(cast(EmbeddedBroker, bridge.config.broker).path.absolute(), names)))
            with bridge.celery.connection_for_write() as connection:
                if kind == "redis":
                    from qbridge.backends.redis.depth import held_by_workers
                    from qbridge.backends.redis.depth import queue_depths as in_lists

                    return Depths(tuple(in_lists(connection, names)), held_by_workers(connection))
                from qbridge.backends.rabbitmq.depth import queue_depths as in_queues

                connection.ensure_connection(max_retries=1)
                return Depths(tuple(in_queues(connection, names)))
    except Exception as error:
        raise BrokerUnavailable(
            f"the broker {bridge.config.broker.safe_url()} did not tell its queues ({type(error).__name__})",
            "Run `qbridge check` with the same -A: it says what is wrong.",
        ) from error
