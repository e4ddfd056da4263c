"""Which exchanges, queues and bindings are there? They live in the file, so all processes see the same ones."""

from __future__ import annotations

import sqlite3
import time

from qbridge.backends.embedded.database import Database
from qbridge.backends.embedded.routing import EXCHANGE_TYPES

__all__ = ["PORTION", "Topology", "drop_queue", "drop_queues"]

PORTION = 20_000
"""Messages that one transaction deletes at most, where it may: senders and consumers wait for it, about 50 ms."""


class Topology:
    """The part of the store that declares and deletes."""

    database: Database

    def declare_exchange(self, name: str, kind: str) -> str:
        """Make the exchange unless it exists; return the type that it has."""
        found = self.exchange_type(name)
        if found not in EXCHANGE_TYPES:  # missing, or something that no qbridge has written
            with self.database.write() as sql:
                sql.execute(_EXCHANGE, (name, kind))
            found = self.exchange_type(name)
        return found or kind

    def exchange_type(self, name: str) -> str | None:
        """Type of the exchange, or None if there is none of that name."""
        rows = self.database.read("SELECT type FROM exchange WHERE name = ?", (name,))
        return rows[0][0] if rows else None

    def delete_exchange(self, name: str, *, if_unused: bool = False) -> None:
        """Delete the exchange and its bindings; not if it has bindings and ``if_unused``."""
        with self.database.write() as sql:
            if if_unused and sql.execute("SELECT 1 FROM binding WHERE exchange = ? LIMIT 1", (name,)).fetchone():
                return
            sql.execute("DELETE FROM binding WHERE exchange = ?", (name,))
            sql.execute("DELETE FROM exchange WHERE name = ?", (name,))

    def declare_queue(
        self,
        name: str,
        *,
        durable: bool = True,
        auto_delete: bool = False,
        party: str | None = None,
        message_ttl: float | None = None,
        expires: float | None = None,
    ) -> None:
        """Make the queue unless it exists; the last declaration says how it lives and ends."""
        row = (name, durable, auto_delete, party, message_ttl, expires)
        known = self.database.read(
            "SELECT 1 FROM queue WHERE (name, durable, auto_delete) = (?, ?, ?)"
            " AND party IS ? AND message_ttl IS ? AND expires IS ?",
            row,
        )
        if known and expires is None:
            return  # nothing to write: hundreds of connections declare the same queues
        with self.database.write() as sql:
            sql.execute("INSERT OR REPLACE INTO queue VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, time.time()))

    def bind(self, queue: str, exchange: str, routing_key: str) -> None:
        """Route what ``exchange`` gets under ``routing_key`` to ``queue`` too."""
        binding = (exchange, routing_key, queue)
        if not self.database.read("SELECT 1 FROM binding WHERE (exchange, routing_key, queue) = (?, ?, ?)", binding):
            with self.database.write() as sql:
                sql.execute("INSERT OR IGNORE INTO binding VALUES (?, ?, ?)", binding)

    def unbind(self, queue: str, exchange: str, routing_key: str) -> None:
        """Undo ``bind``."""
        with self.database.write() as sql:
            sql.execute(
                "DELETE FROM binding WHERE (exchange, routing_key, queue) = (?, ?, ?)", (exchange, routing_key, queue)
            )

    def bindings(self) -> list[tuple[str, str, str]]:
        """All bindings: queue, exchange, routing key."""
        return self.database.read("SELECT queue, exchange, routing_key FROM binding")

    def queue_exists(self, name: str) -> bool:
        """True if the queue was declared, or something was sent to it by name."""
        return bool(self.database.read("SELECT 1 FROM queue WHERE name = ?", (name,)))

    def size(self, queue: str) -> int:
        """Messages ready in the queue."""
        count: int = self.database.read(
            "SELECT count(*) FROM message WHERE queue = ? AND party IS NULL AND not_before IS NULL"
            " AND (expires_at IS NULL OR expires_at > ?)",
            (queue, time.time()),
        )[0][0]
        return count

    def consumers(self, queue: str) -> int:
        """Consumers of the queue."""
        count: int = self.database.read("SELECT count(*) FROM consumer WHERE queue = ?", (queue,))[0][0]
        return count

    def purge(self, queue: str) -> int:
        """Delete the ready and the delayed messages of the queue, in portions; return how many there were."""
        count, deleted = 0, PORTION
        while deleted == PORTION:
            with self.database.write() as sql:
                deleted = sql.execute(_PURGE, (queue, PORTION)).rowcount
            count += deleted
        return count

    def delete_queue(self, queue: str, *, if_unused: bool = False, if_empty: bool = False) -> int:
        """Delete the queue with its bindings and messages; return how many were ready or delayed."""
        with self.database.write() as sql:
            ready: int = sql.execute(
                "SELECT count(*) FROM message WHERE queue = ? AND party IS NULL", (queue,)
            ).fetchone()[0]
            used = sql.execute("SELECT 1 FROM consumer WHERE queue = ? LIMIT 1", (queue,)).fetchone()
            if not (if_empty and ready) and not (if_unused and used):
                drop_queue(sql, queue)
            return ready


_EXCHANGE = (
    "INSERT INTO exchange VALUES (?, ?) ON CONFLICT DO UPDATE SET type = excluded.type"
    " WHERE type NOT IN ('direct', 'topic', 'fanout')"
)
_PURGE = "DELETE FROM message WHERE id IN (SELECT id FROM message WHERE queue = ? AND party IS NULL LIMIT ?)"


def drop_queue(sql: sqlite3.Connection, queue: str) -> None:
    """Delete a queue and all that belongs to it, within a transaction."""
    drop_queues(sql, "SELECT ?", queue)


def drop_queues(sql: sqlite3.Connection, which: str, parameter: object) -> None:
    """Delete queues and all that belongs to them, within a transaction; their names may be no text that Python has.

    Args:
        sql: the connection.
        which: our own statement that selects their names, whatever is deleted of them already.
        parameter: of it.
    """
    for table, column in (("message", "queue"), ("binding", "queue"), ("consumer", "queue"), ("queue", "name")):
        sql.execute(f"DELETE FROM {table} WHERE {column} IN ({which})", (parameter,))  # noqa: S608 - our own words only
