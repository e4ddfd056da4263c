"""Is an item of a list a message? What kombu put there, with what it needs, or an error in the log."""

from __future__ import annotations

import json
import logging
import re
from base64 import b64encode
from typing import Any

from qbridge.backends.base import HEADER_NOT_BEFORE, HEADER_UNREADABLE, TAKEN_FROM, is_time
from qbridge.serialization.header_limits import is_deeper

__all__ = ["FAULTS", "NO_LIST", "earlier", "envelope", "marked", "thrown_away"]

logger: logging.Logger = logging.getLogger(__name__)

FAULTS = (LookupError, TypeError, ValueError, AttributeError, RecursionError, ArithmeticError)
"""Errors that are the item's fault."""

NO_LIST = (
    "The Redis key %r is no list, so nothing can be taken from its queue or sent to it: somebody else has written it. "
    "Delete it. The other queues go on."
)
"""What is said of such a key."""

_DEPTH = 500
"""Levels that a message may have. Python reads twice as many, and then cannot write them as a dead letter."""

_EARLIER = re.compile(rb"(\d{1,9}) (\d{1,9})")


def envelope(item: Any, queue: str) -> dict[str, Any]:
    """Return what kombu put on the list, with what it needs.

    Raises:
        TypeError, KeyError: if nothing of kombu's put it there.
    """
    properties = item["properties"]
    if not isinstance(properties["delivery_tag"], str):
        raise TypeError("its delivery_tag is not a text")
    properties.setdefault("delivery_info", {"exchange": "", "routing_key": queue})
    info = properties["delivery_info"]
    # names of tables in kombu and Celery, where a list cannot be looked up; no name at all can
    if not all(info[name] is None or isinstance(info[name], str) for name in ("exchange", "routing_key")):
        raise TypeError("its exchange or routing_key is not a text")
    info[TAKEN_FROM] = queue
    found: dict[str, Any] = item
    return found


def marked(item: Any, raw: bytes) -> Any:
    """Return a message, with a mark by which a worker refuses it and keeps it as a dead letter if headers are bad.

    Raises:
        ValueError: if it could not even be written as one.
    """
    found = item.get("headers")
    headers: dict[str, Any] = found if isinstance(found, dict) else {}
    deep: set[str] = set()
    if raw.count(b"[") + raw.count(b"{") > _DEPTH:  # of nearly all, two looks at the memory say that they are not
        deep = {name for name, value in headers.items() if is_deeper(value, _DEPTH)}
        if is_deeper({**item, "headers": None if headers else found}, _DEPTH):
            raise ValueError("it has too many levels")
    # else than a time: nothing that a worker writes, and nothing by which the server could keep it
    bad = deep if is_time(headers.get(HEADER_NOT_BEFORE) or 0) else deep | {HEADER_NOT_BEFORE}
    if not bad:
        return item
    kept = {name: value for name, value in headers.items() if name not in deep}
    kept[HEADER_UNREADABLE] = b64encode(json.dumps(sorted(bad)).encode()).decode()
    return {**item, "headers": kept}


def earlier(before: bytes) -> tuple[int, int]:
    """Return how often a message was delivered and how often it was lost, as a claim answers it.

    What is no such pair was written by somebody else: the message is as good as it was, and was delivered before.
    """
    found = _EARLIER.fullmatch(before)
    return (int(found[1]), int(found[2])) if found else (1, 0)


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
