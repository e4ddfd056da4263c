"""What does the embedded broker keep, and which steps change it? Each step is one transaction.

A message is *delayed* until its time, then *ready*, then *claimed* by a party. It is deleted when it is acknowledged,
and not before; it goes back to its old place in the queue when it is returned, or when its party is proven dead. A
party acts only while its row stands: one that was taken for dead (someone deleted its lock file) can neither claim nor
acknowledge any more.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qbridge.backends.base import LATEST
from qbridge.backends.embedded import presence
from qbridge.backends.embedded.database import Database
from qbridge.backends.embedded.errors import FileReplaced
from qbridge.backends.embedded.numbers import check_number, with_numbers
from qbridge.backends.embedded.routing import ExchangeMissing, matches
from qbridge.backends.embedded.topology import PORTION, Topology, drop_queue, drop_queues

__all__ = ["Claim", "Outgoing", "Store", "say_missing"]

logger: logging.Logger = logging.getLogger(__name__)

RELEASED_AT_ONCE = 1000
"""Delayed messages that one transaction makes ready: senders and other consumers wait for it, about 5 ms."""


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A message on its way in."""

    exchange: str
    routing_key: str
    envelope: str
    body: str | bytes | None
    priority: int
    durable: bool = True
    ttl: float | None = None
    """Seconds; None: for ever."""
    not_before: float | None = None
    """UNIX time before which nobody gets it; None: at once."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A message in somebody's hands; ``deliveries`` tells this claim from an earlier one of the same message."""

    id: int
    deliveries: int
    losses: int
    envelope: bytes
    body: bytes | None


class Store(Topology):
    """The broker's state in its file.

    Args:
        path: absolute path of the file.
        timeout: seconds that a step may wait for the file before ``FileUnavailable``.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self.database: Database = Database(path, timeout)
        self.folder: Path = presence.folder_of(path)

    # Messages

    def publish(self, messages: Sequence[Outgoing], timeout: float | None = None) -> list[int]:
        """Put the messages into the queues that they are routed to, all of them or none, and wake the consumers.

        A queue that is sent to by name through the default exchange is made if it is missing.

        Returns:
            For each message, how many queues took it.

        Raises:
            ExchangeMissing: if a message names an exchange that was never declared; nothing is stored then.
            FileUnavailable: if the file is not had within ``timeout`` seconds; nothing is stored then.
        """
        return with_numbers(self.database, lambda: self._publish(messages, timeout))

    def _publish(self, messages: Sequence[Outgoing], timeout: float | None) -> list[int]:
        routed: list[int] = []
        touched: set[str] = set()
        known: dict[tuple[str, str], list[tuple[str, float | None]]] = {}
        with self.database.write(timeout, durable=any(message.durable for message in messages)) as sql:
            now = time.time()
            earliest = None
            if any(message.not_before is not None for message in messages):
                earliest = sql.execute(_EARLIEST).fetchone()[0]
            for message in messages:
                address = message.exchange, message.routing_key
                if address not in known:
                    known[address] = _route(sql, *address)
                for queue, queue_ttl in known[address]:
                    ttls = [ttl for ttl in (message.ttl, queue_ttl) if ttl is not None]
                    expires_at = now + min(ttls) if ttls else None
                    due = None if message.not_before is None or message.not_before <= now else message.not_before
                    row = queue, message.priority, expires_at, message.envelope, message.body, due
                    check_number(sql, sql.execute(_INSERT, row).lastrowid)
                    if due is None or earliest is None or due < earliest:
                        touched.add(queue)  # the consumers have something to take, or must wake up earlier
                routed.append(len(known[address]))
            parties = _parties(sql, touched)
        presence.wake(self.folder, parties)
        return routed

    def has_route(self, exchange: str, routing_key: str) -> bool:
        """False if a message sent there now would reach no queue: asked before writing, for events nobody watches."""
        rows = self.database.read(
            "SELECT binding.routing_key, exchange.type FROM exchange"
            " LEFT JOIN binding ON binding.exchange = exchange.name WHERE exchange.name = ?",
            (exchange,),
        )
        return not rows or any(key is not None and matches(kind, key, routing_key) for key, kind in rows)

    def has_ready(self, queue: str) -> bool:
        """Return whether there is something to claim; reading takes no lock: looking is free, also for many."""
        return bool(self.database.read(_NEXT, (queue, time.time())))

    def claim(
        self,
        queue: str,
        party: str,
        *,
        keep: bool,
        timeout: float | None = None,
        settled: Sequence[tuple[int, int]] = (),
    ) -> Claim | None:
        """Claim the next message of the queue, if there is one: highest priority first, then oldest first.

        Args:
            queue: its name; ask first whether it has something ready, which costs others nothing.
            party: who claims it.
            keep: False to delete it at once, for consumers that never acknowledge.
            timeout: seconds to wait for the file; None means the store's own.
            settled: messages to acknowledge in the same transaction, by id and deliveries.
        """
        where = (queue, time.time())
        with self.database.write(timeout) as sql:
            missing = len(settled) - _acknowledge(sql, party, settled) if settled else 0
            if keep:
                rows = sql.execute(_CLAIM, (party, *where, party)).fetchall()
            else:
                rows = sql.execute(_TAKE, (*where, party)).fetchall()
        say_missing(missing)
        return Claim(*rows[0]) if rows else None

    def acknowledge(self, party: str, claims: Iterable[tuple[int, int]], timeout: float | None = None) -> int:
        """Delete claimed messages, given by id and deliveries; return how many were still this party's."""
        with self.database.write(timeout) as sql:
            return _acknowledge(sql, party, claims)

    def give_back(self, party: str, claims: Iterable[tuple[int, int]], timeout: float | None = None) -> int:
        """Make claimed messages ready again, at their old place; return how many were still this party's."""
        queues: set[str] = set()
        with self.database.write(timeout) as sql:
            count = 0
            for id_, deliveries in claims:
                rows = sql.execute(
                    "UPDATE message SET party = NULL WHERE id = ? AND party = ? AND deliveries = ? RETURNING queue",
                    (id_, party, deliveries),
                ).fetchall()
                count += len(rows)
                queues.update(row[0] for row in rows)
            parties = _parties(sql, queues)
        presence.wake(self.folder, parties)
        return count

    def release_due(self, timeout: float | None = None) -> float | None:
        """Make delayed messages ready whose time has come, a bounded number at once, and wake their consumers.

        Returns:
            The UNIX time when the next one is due: in the past if more are due already. None: there is none.
        """
        earliest = self._earliest()
        if earliest is None or earliest > time.time():  # asked at every turn: reading takes no lock
            return earliest
        with self.database.write(timeout) as sql:
            rows = sql.execute(_RELEASE, (time.time(), RELEASED_AT_ONCE)).fetchall()
            rows += sql.execute(_RELEASE_ODD, (RELEASED_AT_ONCE,)).fetchall()
            parties = _parties(sql, {row[0] for row in rows})
        presence.wake(self.folder, parties)
        return self._earliest()

    def _earliest(self) -> float | None:
        due: float | None = self.database.read(_EARLIEST)[0][0]
        return due

    # Parties

    def join(self, party: str) -> None:
        """Write down a party whose lock is held already."""
        with self.database.write() as sql:
            sql.execute("INSERT INTO party VALUES (?, ?, ?)", (party, os.getpid(), time.time()))
        presence.remove_litter(self.folder, set(self._known_parties()))

    def leave(self, party: str) -> None:
        """Remove a party in good order: its claims are ready again at once, and not counted as losses."""
        with self.database.write() as sql:
            parties = _remove_party(sql, party, lost=False)
        presence.wake(self.folder, parties)

    def stay(self, party: str, claims: Iterable[tuple[int, int]]) -> None:
        """Let a party stand for some of its claims, by id and deliveries; whatever else it has ends as if it left."""
        kept, queues = set(claims), set[str]()
        with self.database.write() as sql:
            for claim in sql.execute("SELECT id, deliveries FROM message WHERE party = ?", (party,)).fetchall():
                if claim not in kept:
                    rows = sql.execute("UPDATE message SET party = NULL WHERE id = ? RETURNING queue", claim[:1])
                    queues.update(row[0] for row in rows.fetchall())
            _end_consuming(sql, party)
            parties = _parties(sql, queues)
        presence.wake(self.folder, parties)

    def add_consumer(self, party: str, queue: str, tag: str) -> None:
        """From now on ``party`` is woken for messages in ``queue``."""
        with self.database.write() as sql:
            sql.execute("INSERT OR REPLACE INTO consumer VALUES (?, ?, ?)", (queue, party, tag))

    def remove_consumer(self, party: str, queue: str, tag: str) -> None:
        """Undo ``add_consumer``; an auto-delete queue goes with its last consumer."""
        with self.database.write() as sql:
            sql.execute("DELETE FROM consumer WHERE (queue, party, tag) = (?, ?, ?)", (queue, party, tag))
            _after_consumers_left(sql, [queue])

    def touch(self, queue: str) -> None:
        """Note that a queue is used by reading it, so that it does not expire."""
        if self.database.read("SELECT 1 FROM queue WHERE name = ? AND expires IS NOT NULL", (queue,)):
            with self.database.write() as sql:
                sql.execute("UPDATE queue SET used_at = ? WHERE name = ?", (time.time(), queue))

    def sweep(self, party: str | None = None, timeout: float | None = None) -> None:
        """Take over what dead parties held, and delete expired messages and queues.

        Args:
            party: who sweeps; checked to be standing still.
            timeout: seconds to wait for the file; None means the store's own.

        Raises:
            FileReplaced: if ``party`` was taken for dead.
        """
        known = self._known_parties()
        if party is not None and party not in known:
            raise FileReplaced(
                f"This consumer was taken for dead: its lock file in {self.folder} was deleted. It registers again"
            )
        if not all(map(presence.is_party, known)):
            self._remove_foreign_parties(timeout)
        for other in filter(presence.is_party, known):
            with presence.dead(self.folder, other) as is_dead:
                if is_dead:
                    with self.database.write(timeout) as sql:
                        woken = _remove_party(sql, other, lost=True)
                    presence.wake(self.folder, woken)
        now = time.time()
        if self.database.read("SELECT 1 FROM message WHERE expires_at <= ? AND party IS NULL LIMIT 1", (now,)):
            with self.database.write(timeout) as sql:
                sql.execute(_EXPIRE, (now, PORTION))  # more than that at the next sweep
        if self.database.read(f"{_EXPIRED} LIMIT 1", (now,)):
            with self.database.write(timeout) as sql:
                drop_queues(sql, _EXPIRED, now)

    def _remove_foreign_parties(self, timeout: float | None) -> None:
        """Remove parties that none of us can be, and let others have what is claimed by nobody then."""
        with self.database.write(timeout) as sql:
            rows = sql.execute("SELECT id, CAST(id AS BLOB), typeof(id) FROM party").fetchall()
            foreign = [row[1:] for row in rows if not presence.is_party(row[0])]
            sql.executemany("DELETE FROM party WHERE (CAST(id AS BLOB), typeof(id)) = (?, ?)", foreign)
            # Not their queues: somebody else may have messages there.
            sql.execute("UPDATE queue SET party = NULL WHERE party NOT IN (SELECT id FROM party)")
            sql.execute("DELETE FROM consumer WHERE party NOT IN (SELECT id FROM party)")
            freed = sql.execute(_FREE).fetchall()
            parties = _parties(sql, {row[0] for row in freed})
        logger.error("Removed %d parties from the embedded broker's file whose names no qbridge has made", len(foreign))
        presence.wake(self.folder, parties)

    def _known_parties(self) -> list[str]:
        return [row[0] for row in self.database.read("SELECT id FROM party")]


_INSERT = "INSERT INTO message (queue, priority, expires_at, envelope, body, not_before) VALUES (?, ?, ?, ?, ?, ?)"
_NEXT = (
    "SELECT id FROM message WHERE queue = ? AND party IS NULL AND not_before IS NULL"
    " AND (expires_at IS NULL OR expires_at > ?)"
    " ORDER BY priority DESC, id LIMIT 1"
)
# Columns hold what somebody wrote, of whatever type: no text that is UTF-8, no number where one is meant. As bytes all
# can be read, and what is no number is one after CAST.
_STANDING = (
    "EXISTS (SELECT 1 FROM party WHERE party.id = ?) RETURNING id, CAST(deliveries AS INTEGER),"
    " CAST(losses AS INTEGER), CAST(envelope AS BLOB), CAST(body AS BLOB)"
)
_COUNTED = f"min(CAST(deliveries AS INTEGER), {2**53}) + 1"
_CLAIM = f"UPDATE message SET party = ?, deliveries = {_COUNTED} WHERE id = ({_NEXT}) AND {_STANDING}"  # noqa: S608 - our own words only
_TAKE = f"DELETE FROM message WHERE id = ({_NEXT}) AND {_STANDING}"  # noqa: S608 - our own words only
# Texts and bytes sort after all numbers, so what is no time comes after the latest one: it is due.
_ODD = f"not_before > {LATEST}"
_EARLIEST = (
    f"SELECT CASE WHEN EXISTS (SELECT 1 FROM message WHERE {_ODD}) THEN 0.0"  # noqa: S608 - our own words only
    " ELSE (SELECT min(not_before) FROM message WHERE not_before IS NOT NULL) END"
)
_RELEASE = (
    "UPDATE message SET not_before = NULL WHERE id IN"
    " (SELECT id FROM message WHERE not_before <= ? ORDER BY not_before LIMIT ?) RETURNING queue"
)
_RELEASE_ODD = (
    f"UPDATE message SET not_before = NULL WHERE id IN (SELECT id FROM message WHERE {_ODD} LIMIT ?) RETURNING queue"  # noqa: S608 - our own words only
)
_FREE = (
    "UPDATE message SET party = NULL, losses = losses + 1"
    " WHERE party IS NOT NULL AND party NOT IN (SELECT id FROM party) RETURNING queue"
)
_EXPIRE = "DELETE FROM message WHERE id IN (SELECT id FROM message WHERE expires_at <= ? AND party IS NULL LIMIT ?)"
_EXPIRED = (
    "SELECT name FROM queue WHERE used_at + expires <= ?"
    " AND NOT EXISTS (SELECT 1 FROM consumer WHERE consumer.queue = queue.name)"
)

_TTL = "CASE typeof(queue.message_ttl) WHEN 'real' THEN queue.message_ttl END"  # anything else is no number
_TTL_OF = f"SELECT {_TTL} FROM queue WHERE name = ?"  # noqa: S608 - our own words only
_BOUND = (
    f"SELECT binding.routing_key, binding.queue, {_TTL} FROM binding"  # noqa: S608 - our own words only
    " JOIN queue ON queue.name = binding.queue WHERE binding.exchange = ?"
)


def say_missing(number: int) -> None:
    """Log that messages were settled too late."""
    if number:
        logger.warning("%d message(s) were no longer this consumer's when it settled them", number)


def _acknowledge(sql: sqlite3.Connection, party: str, claims: Iterable[tuple[int, int]]) -> int:
    return sum(
        sql.execute(
            "DELETE FROM message WHERE id = ? AND party = ? AND deliveries = ?", (id_, party, deliveries)
        ).rowcount
        for id_, deliveries in claims
    )


def _route(sql: sqlite3.Connection, exchange: str, routing_key: str) -> list[tuple[str, float | None]]:
    """Names and message TTLs of the queues that a message goes to."""
    if not exchange:
        row = sql.execute(_TTL_OF, (routing_key,)).fetchone()
        if row is None:
            sql.execute(
                "INSERT INTO queue (name, durable, auto_delete, used_at) VALUES (?, 1, 0, ?)",
                (routing_key, time.time()),
            )
        return [(routing_key, row and row[0])]
    kind = sql.execute("SELECT type FROM exchange WHERE name = ?", (exchange,)).fetchone()
    if kind is None:
        raise ExchangeMissing(exchange)
    rows: list[tuple[str, str, float | None]] = sql.execute(_BOUND, (exchange,)).fetchall()
    return list({queue: (queue, ttl) for key, queue, ttl in rows if matches(kind[0], key, routing_key)}.values())


def _parties(sql: sqlite3.Connection, queues: Iterable[str]) -> set[str]:
    """Parties to wake for messages in ``queues``; read in the transaction that makes them ready, so none is missed."""
    return {row[0] for queue in queues for row in sql.execute("SELECT party FROM consumer WHERE queue = ?", (queue,))}


def _remove_party(sql: sqlite3.Connection, party: str, *, lost: bool) -> set[str]:
    returned = sql.execute(
        "UPDATE message SET party = NULL, losses = losses + ? WHERE party = ? RETURNING queue", (int(lost), party)
    ).fetchall()
    _end_consuming(sql, party)
    sql.execute("DELETE FROM party WHERE id = ?", (party,))
    return _parties(sql, {row[0] for row in returned})


def _end_consuming(sql: sqlite3.Connection, party: str) -> None:
    consumed = sql.execute("DELETE FROM consumer WHERE party = ? RETURNING queue", (party,)).fetchall()
    _after_consumers_left(sql, [row[0] for row in consumed])
    drop_queues(sql, "SELECT name FROM queue WHERE party = ?", party)


def _after_consumers_left(sql: sqlite3.Connection, queues: Iterable[str]) -> None:
    for queue in set(queues):
        sql.execute("UPDATE queue SET used_at = ? WHERE name = ?", (time.time(), queue))
        if sql.execute(
            "SELECT 1 FROM queue WHERE name = ? AND auto_delete"
            " AND NOT EXISTS (SELECT 1 FROM consumer WHERE consumer.queue = queue.name)",
            (queue,),
        ).fetchone():
            drop_queue(sql, queue)
