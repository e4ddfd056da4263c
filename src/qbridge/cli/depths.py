"""How is each broker asked for its queues, within which time, and what if it does not answer?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

from qbridge.backends.base import QueueDepth
from qbridge.backends.deadline import deadline
from qbridge.backends.embedded import EmbeddedBroker
from qbridge.bridge import Bridge
from qbridge.dead_letters.letter import name_of
from qbridge.exceptions import BrokerUnavailable

__all__ = ["Depths", "read_depths"]


@dataclass(frozen=True)
class Depths:
    """What a broker told.

    Args:
        queues: one depth per queue.
        held: messages that workers hold, of all queues together, where only that is known.
        dead: how many dead letters there are, by the queue that they came from.
    """

    queues: tuple[QueueDepth, ...]
    held: int | None = None
    dead: Mapping[str, int] = field(default_factory=dict)


def read_depths(bridge: Bridge, timeout: float) -> Depths:
    """Ask the broker of a bridge.

    Args:
        bridge: a loaded one; every queue that it knows is asked for.
        timeout: seconds for all of it.

    Raises:
        BrokerUnavailable: if it cannot be reached, or not in time.
    """
    known = sorted(bridge.celery.amqp.queues)
    keeps = bridge.config.defaults == "safe"
    names = [*known, *(name_of(name) for name in known if keeps)]
    kind = bridge.config.broker.kind
    try:
        with deadline(timeout):
            if kind == "embedded":
                from qbridge.backends.embedded.depth import queue_depths as in_file

                path = cast(EmbeddedBroker, bridge.config.broker).path.absolute()
                return _told(known, in_file(path, names))
            with bridge.celery.connection_for_write() as connection:
                if kind == "redis":
                    from qbridge.backends.redis.depth import held_by_workers
                    from qbridge.backends.redis.depth import queue_depths as in_lists

                    return _told(known, in_lists(connection, names), held_by_workers(connection))
                from qbridge.backends.rabbitmq.depth import queue_depths as in_queues

                connection.ensure_connection(max_retries=1)
                return _told(known, in_queues(connection, names))
    except Exception as error:
        raise BrokerUnavailable(
            f"the broker {bridge.config.broker.safe_url()} did not tell its queues ({type(error).__name__})",
            "Run `qbridge check` with the same -A: it says what is wrong.",
        ) from error


def _told(known: list[str], depths: Iterable[QueueDepth], held: int | None = None) -> Depths:
    found = {depth.name: depth for depth in depths}
    dead = {name: found[name_of(name)].waiting or 0 for name in known if name_of(name) in found}
    return Depths(tuple(found[name] for name in known), held, dead)
