"""How long may the current call still take: one deadline that every socket wait below it honours.

A send is many steps (acquire a connection, connect, open a channel, declare, publish, confirm), each with a timeout
of its own in kombu and py-amqp, or none. The deadline bounds their sum. It is a context variable: it follows the
call, not the connection, so a worker's own connections are untouched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["bounded", "deadline", "passed", "remaining"]

_deadline: ContextVar[float | None] = ContextVar("qbridge_deadline", default=None)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Bound everything inside to ``seconds`` from now; an outer deadline that ends earlier stays in force."""
    end = time.monotonic() + seconds
    outer = _deadline.get()
    token = _deadline.set(end if outer is None else min(end, outer))
    try:
        yield
    finally:
        _deadline.reset(token)


def remaining() -> float | None:
    """Return the seconds left, never below zero, or None if there is no deadline."""
    end = _deadline.get()
    return None if end is None else max(0.0, end - time.monotonic())


def bounded(timeout: float | None) -> float | None:
    """Return the smaller of ``timeout`` and what is left; None means no bound at all.

    Raises:
        TimeoutError: if the deadline has passed.
    """
    left = remaining()
    if left is None:
        return timeout
    if left <= 0:
        raise TimeoutError("the time for this call is used up")
    return left if timeout is None else min(timeout, left)


def passed(end: float) -> Callable[[], bool]:
    """Return what tells SQLite, as its progress handler, whether a moment of the monotonic clock has passed.

    It is made of nothing that is written in Python: there the handler of a signal would run, and what that raises, a
    time limit for example, SQLite would take for a yes.
    """
    return map(end.__lt__, iter(time.monotonic, None)).__next__
