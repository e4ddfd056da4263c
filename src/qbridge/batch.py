"""How many messages are sent at once, and what became of each if the broker fails in the middle.

RabbitMQ: a window of unconfirmed messages on one channel. Redis and the embedded broker: kombu's publish batches, a
pipeline or a transaction per group. A group that failed half-way is *uncertain* and is never sent again blindly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qbridge.backends.base import Broker
from qbridge.backends.deadline import deadline
from qbridge.exceptions import BatchError, BrokerUnavailable, QBridgeError
from qbridge.producer import BridgeProducer
from qbridge.sending import Attempts

__all__ = ["GROUP", "send_batch"]

GROUP = 500
"""Messages per group: each group has ``publish_timeout`` of its own."""

Entry = tuple[Any, tuple[Sequence[Any], dict[str, Any]], dict[str, Any]]
"""A typed Celery task, its encoded ``(args, kwargs)``, and its send options with ``task_id``."""


def send_batch(app: Any, broker: Broker, entries: Sequence[Entry]) -> None:
    """Send all entries, or say what became of each.

    Args:
        app: the bridge's app.
        broker: its broker.
        entries: what to send.

    Raises:
        BatchError: if any message is not known to be on the broker.
        PayloadError: if a message of the first group is too large; nothing was sent then.
    """
    groups = [entries[start : start + GROUP] for start in range(0, len(entries), GROUP)]
    confirmed: list[str] = []
    for number, group in enumerate(groups):
        outcome = _Outcome([options["task_id"] for _, _, options in group])
        try:
            with deadline(broker.publish_timeout):
                _send_group(app, broker, group, outcome)
        except Exception as error:
            ours = isinstance(error, QBridgeError) and not isinstance(error, BrokerUnavailable)
            if ours and not confirmed and not outcome.touched:
                raise
            unsent = [*outcome.unsent, *(options["task_id"] for rest in groups[number + 1 :] for _, _, options in rest)]
            confirmed += outcome.confirmed
            reason = " ".join(str(error).split())
            raise BatchError(
                f"of {len(entries)} messages {len(confirmed)} are confirmed, {len(unsent)} were not taken and "
                f"{len(outcome.uncertain)} are uncertain: {reason}",
                "Send those in .unsent again; those in .uncertain only if a second run does no harm.",
                confirmed,
                unsent,
                outcome.uncertain,
            ) from error
        confirmed += outcome.ids


class _Outcome:
    """What is known of each message of one group."""

    def __init__(self, ids: list[str]) -> None:
        self.ids = ids
        self.written: dict[int, str] = {}
        self.pending: set[int] | None = None
        self.refused: frozenset[int] = frozenset()
        self.atomic_started = False

    @property
    def touched(self) -> bool:
        return bool(self.written) or self.atomic_started

    @property
    def uncertain(self) -> list[str]:
        if self.atomic_started:
            return self.ids
        pending = set(self.written) if self.pending is None else self.pending
        return [task_id for tag, task_id in self.written.items() if tag in pending]

    @property
    def confirmed(self) -> list[str]:
        known = {*self.uncertain, *self.unsent}
        return [task_id for task_id in self.ids if task_id not in known]

    @property
    def unsent(self) -> list[str]:
        if self.atomic_started:
            return []
        written = {task_id for tag, task_id in self.written.items() if tag not in self.refused}
        return [task_id for task_id in self.ids if task_id not in written]


def _send_group(app: Any, broker: Broker, group: Sequence[Entry], outcome: _Outcome) -> None:
    def once() -> None:
        with app.producer_or_acquire() as producer:
            connection: Any = producer.connection
            if isinstance(producer, BridgeProducer) and connection.transport.driver_type == "amqp":
                _windowed(producer, connection, group, outcome)
            else:
                _grouped(producer, group, outcome)

    def attempt() -> None:
        try:
            once()
        except Exception as error:
            if outcome.touched:
                raise _Settled(error) from error  # part of it may be there: not to be tried again
            raise

    try:
        Attempts(app, broker).run(attempt)
    except _Settled as settled:
        raise settled.error from None


class _Settled(QBridgeError):
    """Carries an error past the retries."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _windowed(producer: BridgeProducer, connection: Any, group: Sequence[Entry], outcome: _Outcome) -> None:
    """Make all messages, as one may be too large; then publish without waiting, and wait for all confirmations."""
    confirms = connection.confirms()
    outcome.written.clear()
    producer.window, producer.held = len(group), []
    try:
        held, places = producer.held, dict[int, str]()
        for task, (args, kwargs), options in group:
            # an event (task-sent) that goes the same way comes behind its message
            places[len(held)] = options["task_id"]
            task.send_encoded(args, kwargs, producer=producer, retry=False, **options)
        producer.held = None
        for place, write in enumerate(held):
            tag = write()
            if place in places:
                outcome.written[tag] = places[place]
        confirms.settle()
    except Exception as error:
        outcome.pending = set(confirms.pending)
        outcome.refused = getattr(error, "tags", frozenset()) - outcome.pending
        raise
    finally:
        producer.window, producer.held = 0, None


def _grouped(producer: Any, group: Sequence[Entry], outcome: _Outcome) -> None:
    """Publish in one pipeline or transaction."""
    # room for more than the group: kombu would send on its own when the batch is full
    with producer.batch(max_size=2 * len(group) + 1):
        for task, (args, kwargs), options in group:
            task.send_encoded(args, kwargs, producer=producer, retry=False, **options)
        outcome.atomic_started = True
    outcome.atomic_started = False
