"""By when must a task have run, and who inherits that?

A deadline travels in a header. A task past it is not begun, no attempt is scheduled past it, and whatever a task sends
while it runs has the same deadline or an earlier one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

from qbridge.exceptions import ConfigurationError

__all__ = ["HEADER_DEADLINE", "as_deadline", "deadline_of", "inherited", "instant", "limited", "passed"]

HEADER_DEADLINE = "qbridge_deadline"
"""Message header with the deadline (ISO 8601, UTC)."""

_running: ContextVar[datetime | None] = ContextVar("qbridge_due_by", default=None)


def as_deadline(value: Any, zone: tzinfo) -> datetime:
    """Return the deadline that a send option means, in UTC.

    Args:
        value: a datetime, or a timedelta from now.
        zone: time zone of a datetime that has none.

    Raises:
        ConfigurationError: if it is neither.
    """
    if isinstance(value, timedelta):
        return datetime.now(UTC) + value
    if isinstance(value, datetime):
        return (value if value.tzinfo is not None else value.replace(tzinfo=zone)).astimezone(UTC)
    raise ConfigurationError(f"deadline={value!r} is not a time", "Give a datetime, or a timedelta from now.")


def instant(said: Any) -> datetime | None:
    """Return the time that a header names, or None where it names none: it may be somebody else's."""
    if not isinstance(said, str):
        return None
    try:
        found = datetime.fromisoformat(said)
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def deadline_of(headers: Mapping[str, Any] | None) -> datetime | None:
    """Return the deadline that a message has, or None."""
    return instant((headers or {}).get(HEADER_DEADLINE))


def passed(deadline: datetime | None, after: float = 0.0) -> bool:
    """Return whether a deadline will be over ``after`` seconds from now."""
    return deadline is not None and datetime.now(UTC) + timedelta(seconds=after) > deadline


@contextmanager
def limited(deadline: datetime | None) -> Iterator[None]:
    """Let everything that is sent within the block inherit a deadline."""
    token = _running.set(deadline)
    try:
        yield
    finally:
        _running.reset(token)


def inherited(headers: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return a message's headers with the running task's deadline, where theirs is later or missing."""
    running = _running.get()
    if running is None:
        return headers
    own = deadline_of(headers)
    if own is not None and own <= running:
        return headers
    return {**(headers or {}), HEADER_DEADLINE: running.isoformat()}
