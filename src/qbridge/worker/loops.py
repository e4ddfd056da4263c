"""The blocking loop for green pools, without Celery's wait of 0.1 s per message."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from celery.worker.loops import synloop

__all__ = ["green_loop"]


def green_loop(obj: Any, connection: Any, *args: Any, **kwargs: Any) -> None:
    """Run Celery's ``synloop``; heartbeats of the event connection are read by a timer.

    Celery 5.7 waits up to 0.1 s for them after every message, which limits gevent to about 14 tasks/s.
    """
    dispatcher = obj.event_dispatcher
    events = dispatcher.connection if dispatcher is not None else None
    entry = None
    if obj.amqheartbeat and events is not None and events.supports_heartbeats:
        entry = obj.timer.call_repeatedly(max(1.0, float(obj.amqheartbeat) / 4), _read_pending, (events,))
    heartbeat, obj.amqheartbeat = obj.amqheartbeat, None
    try:
        synloop(obj, connection, *args, **kwargs)
    finally:
        obj.amqheartbeat = heartbeat
        if entry is not None:
            entry.cancel()


def _read_pending(connection: Any) -> None:
    """Read what has arrived on a connection; a broken one is noticed by its heartbeat check."""
    with suppress(OSError):
        while True:
            connection.drain_events(timeout=0.001)
