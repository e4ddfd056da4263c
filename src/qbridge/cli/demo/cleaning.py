"""What does the demo take away again from servers: its queue and exchange, its results, its reply queue."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from qbridge.backends.deadline import deadline
from qbridge.bridge import Bridge
from qbridge.result import TaskResult

__all__ = ["sweep"]

_TIME = 5.0
"""Seconds for results, and again for queues."""


def sweep(bridge: Bridge, results: Iterable[TaskResult[Any]]) -> None:
    """Close the bridge and delete what it made on the servers; what cannot be reached stays.

    What all applications share stays as well: tables of results, Celery's exchanges for remote control, events and
    delays.

    Args:
        bridge: the demo's; nobody else may use its default queue.
        results: the results of all that was sent.
    """
    app = bridge.celery
    rpc = bridge.config.results.kind == "rpc"
    reply_queue = app.thread_oid if rpc else None
    # Cleaning up must not hide what happened before.
    with suppress(Exception), deadline(_TIME):
        if not rpc:
            for result in results:
                result.forget()
    bridge.close()  # first: it consumes the reply queue
    with suppress(Exception), deadline(_TIME), app.connection_for_write() as connection:
        queue = app.amqp.queues[bridge.config.default_queue]
        _try(connection, lambda channel: _delete(channel, queue))
        if connection.transport.driver_type == "amqp":
            _try(connection, lambda channel: channel.exchange_delete(exchange=queue.exchange.name))
        if reply_queue is not None:
            _try(connection, lambda channel: channel.queue_delete(queue=reply_queue))


def _delete(channel: Any, queue: Any) -> None:
    # kombu's virtual transports delete the bindings of a queue only where it was declared on the same connection
    queue.bind(channel).declare()
    channel.queue_delete(queue=queue.name)


def _try(connection: Any, act: Callable[[Any], Any]) -> None:
    # a refusal closes the channel: each has one of its own
    with suppress(*connection.channel_errors), connection.channel() as channel:
        act(channel)
