"""How does a process hold the broker's SQLite file safely: locking, time bounds, forks, and a file that goes away.

One ``Database`` is one SQLite connection behind one lock, usable from any thread.

- WAL mode: readers never wait; one writer at a time. A busy file is tried again every few milliseconds, with the lock
  let go in between, until the time bound; SQLite's own busy handler would sleep up to 100 ms at a time, and would
  block a whole gevent hub.
- A step that has begun has an end too, whatever triggers, views and rows somebody else has put into the file. Where
  Python can say so (3.12), triggers and views mean nothing here.
- A transaction marked ``durable`` is synced to the disk before it returns (``synchronous=FULL``), the others are not
  (``NORMAL``). Both survive the death of any process, because the kernel has the bytes; only a power cut tells them
  apart. Measured on ext4: 106 µs per synced insert, 30 µs otherwise. A sent task is synced, a claim or an
  acknowledgement is not: what a power cut takes away from those makes a task run again and loses nothing.
- Forks: SQLite forbids carrying a connection across ``fork``, and even opening a *new* one in the child goes wrong
  while the parent's is open: the child inherits SQLite's table of locks held, but not the kernel's locks behind it.
  So every connection is closed just before a fork and opens again when it is next used, in both processes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sqlite3
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qbridge.backends.deadline import passed, remaining
from qbridge.backends.embedded.errors import FileReplaced, FileUnavailable, is_busy, translate

__all__ = ["Database"]

_LONGEST = 10.0
"""Seconds that one step may take in all, if its wait for a lock may not be longer, and no send is to end earlier."""
_STEPS = 20_000
"""Of SQLite's machine between two looks at the clock: some milliseconds; most of our statements take fewer than 100."""

APPLICATION_ID = 0x71627267  # "qbrg": tells our file from any other SQLite file
SCHEMA_VERSION = 2

SCHEMA = """
CREATE TABLE exchange (name TEXT PRIMARY KEY, type TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE queue (
    name TEXT PRIMARY KEY,
    durable INTEGER NOT NULL,       -- 0: replies, events, remote control
    auto_delete INTEGER NOT NULL,   -- gone with its last consumer
    party TEXT,                     -- exclusive: gone with this party
    message_ttl REAL,               -- seconds
    expires REAL,                   -- seconds without a consumer after which it is gone
    used_at REAL NOT NULL           -- UNIX time of the last declaration, consumer or get
) WITHOUT ROWID;
CREATE TABLE binding (
    exchange TEXT NOT NULL, routing_key TEXT NOT NULL, queue TEXT NOT NULL, PRIMARY KEY (exchange, routing_key, queue)
) WITHOUT ROWID;
CREATE INDEX binding_of_queue ON binding (queue);
CREATE TABLE party (id TEXT PRIMARY KEY, pid INTEGER NOT NULL, since REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE consumer (
    queue TEXT NOT NULL, party TEXT NOT NULL, tag TEXT NOT NULL, PRIMARY KEY (queue, party, tag)
) WITHOUT ROWID;
CREATE TABLE message (
    id INTEGER PRIMARY KEY AUTOINCREMENT,   -- never used twice, so that a late acknowledgement cannot hit another
    queue TEXT NOT NULL,
    priority INTEGER NOT NULL,              -- 0 to 9, 9 first
    expires_at REAL,                        -- UNIX time
    party TEXT,                             -- who has claimed it; NULL: ready
    deliveries INTEGER NOT NULL DEFAULT 0,  -- how often it was handed out
    losses INTEGER NOT NULL DEFAULT 0,      -- how often the process that had claimed it died
    envelope TEXT NOT NULL,                 -- JSON: headers, properties, content type and encoding
    body BLOB,
    not_before REAL                         -- UNIX time of a delayed message; NULL: due
);
CREATE INDEX message_ready ON message (queue, priority DESC, id) WHERE party IS NULL AND not_before IS NULL;
CREATE INDEX message_delayed ON message (not_before) WHERE not_before IS NOT NULL;
CREATE INDEX message_claimed ON message (party) WHERE party IS NOT NULL;
CREATE INDEX message_expiring ON message (expires_at) WHERE expires_at IS NOT NULL;
"""

MIGRATIONS = {
    1: """
ALTER TABLE message ADD COLUMN not_before REAL;
DROP INDEX message_ready;
CREATE INDEX message_ready ON message (queue, priority DESC, id) WHERE party IS NULL AND not_before IS NULL;
CREATE INDEX message_delayed ON message (not_before) WHERE not_before IS NOT NULL;
""",
}
"""What leads from a format to the next one. A process of the older qbridge that has the file open goes on working."""


class Database:
    """One SQLite connection to the broker's file, opened at first use and after every fork.

    Args:
        path: absolute path of the file; its folder is made (for this user only) if ``create``.
        timeout: seconds that an operation may wait for a lock before ``FileUnavailable``.
        create: False to read a file that must exist.
    """

    def __init__(self, path: Path, timeout: float, *, create: bool = True) -> None:
        self.path = path
        self.timeout = timeout
        self._create = create
        self.lock: Any = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._synced = False
        _registry.add(self)

    @contextlib.contextmanager
    def write(self, timeout: float | None = None, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """One write transaction: all or nothing, whatever is raised in it, and wherever (a time limit's signal too).

        Args:
            timeout: seconds to wait for the write lock; None means the database's own.
            durable: sync to the disk before returning.

        Raises:
            FileUnavailable: if the lock is not had in time, the step takes too long, or the file cannot be written.
        """
        end = self._end()
        timeout = self._bounded(timeout)
        deadline = time.monotonic() + timeout
        begun = False
        while True:
            try:
                with self.lock:
                    connection = self._opened()
                    connection.set_progress_handler(passed(end), _STEPS)
                    try:
                        if durable is not self._synced:
                            connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                            self._synced = durable
                        connection.execute("BEGIN IMMEDIATE")
                        begun = True
                        yield connection
                        connection.execute("COMMIT")
                        return
                    finally:
                        if connection.in_transaction:
                            connection.rollback()
            except sqlite3.Error as error:
                if begun:
                    raise translate(error, self.path) from error
                self._pause_or_raise(error, deadline, timeout)

    def read(self, statement: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        """Run one reading statement and return its rows.

        Raises:
            FileUnavailable: if the file cannot be read, or not in time.
        """
        end = self._end()
        timeout = self._bounded(None)
        deadline = time.monotonic() + timeout
        while True:
            try:
                with self.lock:
                    connection = self._opened()
                    connection.set_progress_handler(passed(end), _STEPS)
                    return connection.execute(statement, parameters).fetchall()
            except sqlite3.Error as error:
                self._pause_or_raise(error, deadline, timeout)

    def open(self) -> None:
        """Open the file now, making it if it is missing: a connection that is established has been tried.

        Raises:
            FileUnavailable: if that fails.
        """
        self.read("SELECT 1")

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next use opens it again."""
        with self.lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()

    def _end(self) -> float:
        left = remaining()  # of the send that we are part of
        return time.monotonic() + (max(self.timeout, _LONGEST) if left is None else left)

    def _bounded(self, timeout: float | None) -> float:
        left = remaining()
        timeout = self.timeout if timeout is None else timeout
        return timeout if left is None else min(timeout, left)

    def _pause_or_raise(self, error: sqlite3.Error, deadline: float, timeout: float) -> None:
        if not is_busy(error):
            raise translate(error, self.path) from error
        if time.monotonic() >= deadline:
            raise FileUnavailable(
                f"The embedded broker's file {self.path} was locked by another process for more than {timeout:g} s. "
                "Look for a process that is stopped, or that keeps a transaction open on it"
            ) from error
        time.sleep(random.uniform(0.0005, 0.004))  # noqa: S311 - jitter: writers that wait must not wake in step

    def _opened(self) -> sqlite3.Connection:
        """The open connection, for use under the lock; notices a file that was deleted or replaced."""
        if self._connection is not None:
            if self._identity == self._identify():
                if self._connection.in_transaction:  # a signal hit between two lines of ours
                    self._connection.rollback()
                return self._connection
            self.close()
            raise FileReplaced(f"The embedded broker's file {self.path} was deleted or replaced while in use")
        if self._create:
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # tasks carry their arguments
            except OSError as error:
                raise FileUnavailable(f"The folder of the embedded broker's file {self.path}: {error}") from error
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?mode={'rwc' if self._create else 'rw'}",
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
            uri=True,
        )
        if sys.version_info >= (3, 12):
            connection.setconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_TRIGGER, False)
            connection.setconfig(sqlite3.SQLITE_DBCONFIG_ENABLE_VIEW, False)
        # A text that is no UTF-8 must not stop whoever reads the others. What may come with it is read as bytes.
        connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._identity, self._synced = connection, self._identify(), False
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            foreign = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
            if foreign and connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:  # still not
                raise FileUnavailable(
                    f"The file {self.path} is a SQLite database of another program, not an embedded broker's. "
                    "Name another path"
                )
            if not self._create:
                raise FileUnavailable(f"The file {self.path} is empty: nothing was sent to this embedded broker yet")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("BEGIN IMMEDIATE")
            if not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:  # nobody was faster
                for statement in SCHEMA.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
                connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            connection.execute("COMMIT")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version in MIGRATIONS:
            version = self._migrate(connection)
        if version != SCHEMA_VERSION:
            raise FileUnavailable(
                f"The embedded broker's file {self.path} has format {version}, this qbridge reads {SCHEMA_VERSION}. "
                "Use the qbridge that wrote it, or name another path"
            )
        connection.execute("PRAGMA synchronous=NORMAL")

    def _migrate(self, connection: sqlite3.Connection) -> int:
        """Bring the file to the present format, in one transaction; return the format that it has then."""
        connection.execute("BEGIN IMMEDIATE")
        version: int = connection.execute("PRAGMA user_version").fetchone()[0]  # somebody may have been faster
        while version in MIGRATIONS:
            for statement in MIGRATIONS[version].split(";\n"):
                connection.execute(statement)
            version += 1
            connection.execute(f"PRAGMA user_version={version}")
        connection.execute("COMMIT")
        return version

    def _identify(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_dev, status.st_ino


class _Registry:
    """All databases of this process, closed while it forks.

    Order of locks: the registry's, then each database's; no operation takes the registry's while it holds another.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._databases: weakref.WeakSet[Database] = weakref.WeakSet()
        self._held: list[Database] = []

    def add(self, database: Database) -> None:
        with self.lock:
            self._databases.add(database)

    def before_fork(self) -> None:
        self.lock.acquire()
        self._held = list(self._databases)
        for database in self._held:
            database.lock.acquire()
            with contextlib.suppress(sqlite3.Error):  # the fork comes anyway
                database.close()

    def after_fork_in_parent(self) -> None:
        held, self._held = self._held, []
        for database in held:
            database.lock.release()
        self.lock.release()

    def after_fork_in_child(self) -> None:
        held, self._held = self._held, []
        for database in held:
            database.lock = threading.RLock()  # the old one may have waiters that do not exist here
        self.lock = threading.Lock()


_registry = _Registry()
os.register_at_fork(
    before=_registry.before_fork,
    after_in_parent=_registry.after_fork_in_parent,
    after_in_child=_registry.after_fork_in_child,
)
