"""How are dead letters read in the embedded broker's file? Selected, not claimed; what leaves does so in one step."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kombu.utils import json as kombu_json

from qbridge.backends.embedded import envelope as envelopes
from qbridge.backends.embedded import presence
from qbridge.backends.embedded.numbers import check_number, with_numbers
from qbridge.backends.kept import Kept

__all__ = ["open_queue"]

_PAGE = 100
_NEXT = (
    "SELECT id, CAST(envelope AS BLOB), CAST(body AS BLOB) FROM message"
    " WHERE queue = ? AND id > ? AND party IS NULL ORDER BY id LIMIT ?"
)
_NORMAL = 5  # the priority of a message that names none


@contextmanager
def open_queue(connection: Any, name: str) -> Iterator[_Queue]:
    """Open a queue of dead letters for reading; one that does not exist is empty.

    Args:
        connection: a kombu connection with our transport.
        name: of the queue.
    """
    yield _Queue(connection.default_channel.store, name)


class _Queue:
    def __init__(self, store: Any, name: str) -> None:
        self._store = store
        self._name = name

    def look(self) -> Iterator[Kept]:
        """Yield what is there now, oldest first."""
        last = 0
        (end,) = self._store.database.read("SELECT max(id) FROM message")[0]
        while rows := self._store.database.read(_NEXT, (self._name, last, _PAGE)):
            for number, envelope, body in rows:
                if number > end:
                    return
                yield _opened(number, envelope, body)
            last = rows[-1][0]

    def discard(self, kept: Kept) -> bool:
        """Delete a message; False if somebody else has."""
        with self._store.database.write(durable=True) as sql:
            return bool(sql.execute("DELETE FROM message WHERE id = ? AND party IS NULL", (kept.place,)).rowcount)

    def send(self, kept: Kept, queue: str, headers: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
        """Move a message to the end of another queue, in one step."""
        send = functools.partial(self._send, kept, queue, headers, properties)
        return with_numbers(self._store.database, send)

    def _send(self, kept: Kept, queue: str, headers: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
        number = _priority(properties.get("priority"))
        with self._store.database.write(durable=True) as sql:
            rows = sql.execute(
                "SELECT CAST(envelope AS BLOB) FROM message WHERE id = ? AND party IS NULL", (kept.place,)
            ).fetchall()
            if not rows:
                return False
            envelope = _changed(rows[0][0], queue, number, headers, properties)
            sql.execute(
                "INSERT OR IGNORE INTO queue (name, durable, auto_delete, used_at) VALUES (?, 1, 0, ?)",
                (queue, time.time()),
            )
            # a new row: its deliveries and losses begin anew, and it is the last of its queue
            added = sql.execute(
                "INSERT INTO message (queue, priority, envelope, body) SELECT ?, ?, ?, body FROM message WHERE id = ?",
                (queue, number, envelope, kept.place),
            ).lastrowid
            sql.execute("DELETE FROM message WHERE id = ?", (kept.place,))
            check_number(sql, added)
            parties = {row[0] for row in sql.execute("SELECT party FROM consumer WHERE queue = ?", (queue,))}
        presence.wake(self._store.folder, parties)
        return True


def _priority(value: Any) -> int:
    try:
        return _NORMAL if value is None else min(max(int(value), 0), 9)
    except (TypeError, ValueError, OverflowError):
        return _NORMAL


def _opened(number: int, envelope: bytes, body: bytes | None) -> Kept:
    message = envelopes.read(envelope)
    if message is None:  # not written by us; it can be seen and discarded all the same
        message = {"headers": envelopes.unread(envelope)}
    properties = message.get("properties") or {}
    rest = {name: value for name, value in properties.items() if name not in ("delivery_info", "delivery_mode")}
    rest |= {"content_type": message.get("content-type"), "content_encoding": message.get("content-encoding")}
    return Kept(number, body or b"", message.get("headers") or {}, rest)


def _changed(
    envelope: bytes, queue: str, number: int, headers: Mapping[str, Any], properties: Mapping[str, Any]
) -> str:
    message = envelopes.read(envelope) or {}
    stored = {**(message.get("properties") or {}), **properties, "priority": number}
    stored["delivery_info"] = {"exchange": "", "routing_key": queue, "priority": number}
    for name in ("content_type", "content_encoding"):  # kombu keeps them beside the properties
        stored.pop(name, None)
    changed: str = kombu_json.dumps({
        **message,
        "headers": dict(headers),
        "properties": {name: value for name, value in stored.items() if value is not None},
        "content-type": properties.get("content_type"),
        "content-encoding": properties.get("content_encoding"),
    })  # fmt: skip
    return changed
