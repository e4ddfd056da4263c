"""What is in the embedded broker's file now? Read without changing anything: for the command line and ``check``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from qbridge.backends.embedded.database import Database

__all__ = ["QueueState", "queue_states"]


@dataclass(frozen=True)
class QueueState:
    """One queue.

    Args:
        name: its name.
        ready: messages that wait for a consumer.
        delayed: messages that wait for their time.
        claimed: messages that a consumer holds: running tasks, and tasks it has fetched ahead.
        consumers: consumers, of all processes.
        durable: False for queues of replies, events and remote control.
    """

    name: str
    ready: int
    delayed: int
    claimed: int
    consumers: int
    durable: bool


_STATES = """
SELECT queue.name,
       (SELECT count(*) FROM message WHERE message.queue = queue.name AND message.party IS NULL
            AND not_before IS NULL AND (expires_at IS NULL OR expires_at > ?)),
       (SELECT count(*) FROM message WHERE message.queue = queue.name AND not_before IS NOT NULL),
       (SELECT count(*) FROM message WHERE message.queue = queue.name AND message.party IS NOT NULL),
       (SELECT count(*) FROM consumer WHERE consumer.queue = queue.name),
       durable
FROM queue ORDER BY queue.name
"""


def queue_states(path: Path, timeout: float = 1.0) -> list[QueueState]:
    """The queues in the broker's file, by name.

    A consumer that died less than a second ago may still be counted.

    Args:
        path: the file; nothing is made if it does not exist.
        timeout: seconds to wait for it.

    Raises:
        FileUnavailable: if the file does not exist or cannot be read.
    """
    database = Database(path.absolute(), timeout, create=False)
    try:
        rows = database.read(_STATES, (time.time(),))
    finally:
        database.close()
    return [
        QueueState(name, ready, delayed, claimed, consumers, bool(durable))
        for name, ready, delayed, claimed, consumers, durable in rows
    ]
