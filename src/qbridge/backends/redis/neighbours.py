"""Does somebody else use this Redis database? Then they may write tasks and results, and empty it with theirs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from redis.exceptions import ResponseError

from qbridge.backends.base import Finding
from qbridge.backends.redis.explain import Part

__all__ = ["shared"]

_KNOWN = (
    b"celery-task-meta-", b"celery-taskset-meta-", b"chord-unlock-", b"_kombu.binding.", b"unacked", b"qbridge-",
    b"qbridge.",
)  # fmt: skip
"""What is in the keys of Celery, of kombu and of ours, behind a prefix if there is one; but for queues."""
_LOOKS = 4
_KEYS = 500


def shared(client: Any, part: Part, db: int) -> Iterator[Finding]:
    """Look at a sample of the keys for some that are neither Celery's nor kombu's nor ours.

    Args:
        client: redis-py's, whose answers are bytes.
        part: what the database is for.
        db: its number.
    """
    try:
        foreign = _foreign(client)
    except ResponseError:
        return  # an account, or a proxy, that does not let us look around
    if foreign:
        what = "tasks" if part == "broker" else "results"
        some = ", ".join(sorted({repr(_stem(key)) for key in foreign})[:3])
        yield Finding(
            "warning",
            f"{part}.shared",
            f"database {db} holds other keys too (such as {some}): whoever writes them may write {what}, and whoever "
            f"empties it takes the {what} along",
            f"Give the {part} a database (db) of its own, or a key_prefix and an account that may use no other keys.",
        )


def _foreign(client: Any) -> list[str]:
    found: list[str] = []
    cursor = 0
    for _ in range(_LOOKS):
        cursor, keys = client.scan(cursor, count=_KEYS)
        unknown = [key for key in keys if not any(known in key for known in _KNOWN)]
        with client.pipeline(transaction=False) as pipe:
            for key in unknown:
                pipe.type(key)
            kinds = zip(unknown, pipe.execute(), strict=True)
        # a list may be a queue, whose name is anything
        found += [key.decode(errors="replace") for key, kind in kinds if kind not in (b"list", b"none")]
        if not cursor:
            break
    return found


def _stem(key: str) -> str:
    """The beginning of a key that names its kind; the rest may be somebody's session."""
    stem = re.split(r"[^A-Za-z_]", key, maxsplit=1)[0][:20]
    return f"{stem}…"
