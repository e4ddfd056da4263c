"""What does the demo take away again from servers: its queue and exchange, its results, its reply queue."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from qbridge.backends.deadline import deadline
from qbridge.bridge import Bridge
from qbridge.result import TaskResult

__all__ = ["sweep"]

_TIME = 6.0
"""Seconds for all of it."""


def sweep(bridge: Bridge, queue: str, results: Iterable[TaskResult[Any]]) -> None:
    """Delete what the demo made on the servers; what cannot be reached stays.

    What all applications share stays as well: Celery's exchanges for remote control, events and delays.

    Args:
        bridge: the demo's.
        queue: its queue.
        results: the results of all that was sent.
    """
    app = bridge.celery
    with suppress(Exception), deadline(_TIME):
        if bridge.config.results.kind != "rpc":
            for result in results:
                result.forget()
        with app.connection_for_write() as connection:
            exchange = app.amqp.queues[queue].exchange.name
            _try(connection, lambda channel: channel.queue_delete(queue=queue))
            if connection.transport.driver_type == "amqp":
                _try(connection, lambda channel: channel.exchange_delete(exchange=exchange))
            if bridge.config.results.kind == "rpc":
                _try(connection, lambda channel: channel.queue_delete(queue=app.thread_oid))


def _try(connection: Any, act: Callable[[Any], Any]) -> None:
    # a refusal closes the channel: each has one of its own
    with suppress(*connection.channel_errors), connection.channel() as channel:
        act(channel)
