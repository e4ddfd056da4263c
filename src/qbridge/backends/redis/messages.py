"""Is an item of a list a message? What kombu put there, with what it needs, or an error in the log."""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["FAULTS", "envelope", "thrown_away"]

logger: logging.Logger = logging.getLogger(__name__)

FAULTS = (LookupError, TypeError, ValueError, AttributeError, RecursionError, ArithmeticError)
"""Errors that are the item's fault."""


def envelope(item: Any, queue: str) -> dict[str, Any]:
    """Return what kombu put on the list, with what it needs.

    Raises:
        TypeError, KeyError: if nothing of kombu's put it there.
    """
    properties = item["properties"]
    if not isinstance(properties["delivery_tag"], str):
        raise TypeError("its delivery_tag is not a text")
    properties.setdefault("delivery_info", {"exchange": "", "routing_key": queue})
    if not {"exchange", "routing_key"} <= properties["delivery_info"].keys():
        raise KeyError("exchange, routing_key")
    found: dict[str, Any] = item
    return found


def thrown_away(queue: str, error: Exception) -> None:
    """Log that an item was thrown away.

    Args:
        queue: its name; empty: not known.
        error: what was wrong.
    """
    logger.error(
        "Threw away an item of %s that is no message of kombu's (%s). Only Celery and kombu may push on its lists.",
        f"the Redis queue {queue!r}" if queue else "a Redis queue",
        type(error).__name__,
    )
