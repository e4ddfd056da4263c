"""One pooled engine per process: connected late, shared by threads, left alone by forked children, never stuck.

Celery's own ``SessionManager`` makes an engine and a connection per operation outside billiard's children, and alters
tables when it is first used. Nothing of it runs here.
"""

from __future__ import annotations

import functools
import os
import socket
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import QueuePool

from qbridge.backends.database.quiet import before_quiet_fork
from qbridge.backends.deadline import passed
from qbridge.backends.forking import begin_anew_after_fork
from qbridge.exceptions import ConfigurationError

__all__ = ["Guard", "PooledEngine"]

_STEPS = 20_000
"""Of SQLite's machine between two looks at the clock: some milliseconds."""


class Guard:
    """Ends database calls that a server never answers, by shutting down the connection's socket.

    Drivers such as psycopg have no timeout of their own once connected, and a frozen server does not enforce its
    own. The driver then reports a lost connection, as for any other.

    Args:
        seconds: how long one use of a connection may take.
    """

    _idle = 5.0

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._watched: OrderedDict[int, tuple[float, int]] = OrderedDict()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def watch(self, connection: Any, *_: Any) -> None:
        """Begin to watch a driver's connection; one without a file descriptor is not watched."""
        try:
            descriptor = connection.fileno()
        except Exception:  # noqa: BLE001
            # No such method, or closed already: each driver says it in its own way.
            return
        with self._changed:
            if not self._watched:
                self._changed.notify()
            self._watched[id(connection)] = (time.monotonic() + self.seconds, descriptor)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="qbridge-database-guard", daemon=True)
                self._thread.start()

    def release(self, connection: Any, *_: Any) -> None:
        """End to watch it."""
        with self._changed:
            self._watched.pop(id(connection), None)

    def _run(self) -> None:
        with self._changed:
            while True:
                if not self._watched:
                    if not self._changed.wait(self._idle) and not self._watched:
                        self._thread = None
                        return
                    continue
                # All have the same bound, so the first is the oldest.
                key, (end, descriptor) = next(iter(self._watched.items()))
                left = end - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                del self._watched[key]
                # A duplicate, because closing a socket object would close the driver's descriptor.
                with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as line:
                    line.shutdown(socket.SHUT_RDWR)


_sqlite_engines: WeakSet[Engine] = WeakSet()


def _cut_off(connection: Any) -> None:
    """In a forked child: have a driver's connection end in nothing, so that the parent's is the last copy of it.

    A server sees the end of a connection when the last copy of its socket is closed: else one whose process was killed
    would live as long as the last of its children. The driver keeps a descriptor, and may close it when it likes.
    """
    with suppress(Exception):  # a driver that shows no descriptor, or a connection that is closed
        sock = getattr(connection, "_sock", None)  # PyMySQL's
        descriptor = (connection if sock is None else sock).fileno()
        nothing = os.open(os.devnull, os.O_RDWR)
        try:
            os.dup2(nothing, descriptor, inheritable=False)
        finally:
            os.close(nothing)


def _close_sqlite_connections() -> None:
    """Close idle SQLite connections just before a fork.

    A child inherits SQLite's table of locks without the kernel's locks behind it: with a WAL connection of the parent
    open across the fork, a row that the child commits on a connection of its own is gone once others close the file.
    """
    for engine in list(_sqlite_engines):
        with suppress(Exception):  # the fork comes anyway
            engine.dispose()


before_quiet_fork(_close_sqlite_connections)


class PooledEngine:
    """The engine of one backend in this process.

    Args:
        url: SQLAlchemy URL.
        options: ``database_engine_options``: keywords of ``create_engine``.
        callback: called with each new engine (``database_engine_callback``), or None.
        connect_timeout: seconds that connecting may take.
        operation_timeout: seconds that one read or write may take.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any],
        callback: Callable[[Engine], Any] | None = None,
        *,
        connect_timeout: float = 5.0,
        operation_timeout: float = 10.0,
    ) -> None:
        self._url = url
        self._options = dict(options)
        self._callback = callback
        self._connect_timeout = connect_timeout
        self._operation_timeout = operation_timeout
        self._inherited: list[Any] = []
        self._connections: WeakSet[Any] = WeakSet()
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        begin_anew_after_fork(self)

    def after_fork(self) -> None:
        """Leave the parent's connections alone: not to be closed, nor to be closed by the garbage collector."""
        if self._engine is not None:
            self._inherited.append(self._engine)
        for connection in list(self._connections):
            _cut_off(connection)
        self._connections = WeakSet()
        self._engine = None
        self._lock = threading.Lock()

    def _opened(self, connection: Any, *_: Any) -> None:
        with suppress(TypeError):  # a driver in C may not let its connections be referred to weakly
            self._connections.add(connection)

    def _bound_sqlite(self, connection: Any, *_: Any) -> None:
        # The driver's own timeout is for locks only; somebody else's trigger or view may take any time.
        connection.set_progress_handler(passed(time.monotonic() + self._operation_timeout), _STEPS)

    def get(self) -> Engine:
        """The engine; made at first use in this process."""
        engine = self._engine
        if engine is None:
            with self._lock:
                if self._engine is None:
                    self._engine = self._make()
                engine = self._engine
        return engine

    def close(self) -> None:
        """Close all pooled connections; a later use opens new ones."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    def _make(self) -> Engine:
        try:
            url = make_url(self._url)
            engine = create_engine(url, **self._arguments(url))
        except (ArgumentError, ImportError) as exc:
            # The text of some of these quotes the URL.
            raise ConfigurationError(
                f"There is no SQLAlchemy engine for the result database ({type(exc).__name__})",
                "Check the URL's dialect and driver, that the driver is installed, and database_engine_options.",
            ) from exc
        guard = Guard(self._operation_timeout)
        if url.get_backend_name() == "sqlite":
            _make_folder(url)
            event.listen(engine, "connect", _prepare_sqlite)
            if url.get_driver_name() == "pysqlite":
                event.listen(engine, "checkout", self._bound_sqlite)
            _sqlite_engines.add(engine)
        else:
            event.listen(engine, "connect", self._opened)
            event.listen(engine, "checkout", guard.watch)
            event.listen(engine, "checkin", guard.release)
            # An invalidated connection is checked in as None.
            event.listen(engine, "invalidate", guard.release)
            event.listen(engine, "close", guard.release)
        if self._callback is not None:
            self._callback(engine)
        return engine

    def _arguments(self, url: URL) -> dict[str, Any]:
        arguments = dict(self._options)
        # A dead connection is noticed when it is used, and the operation is repeated on a new one: that costs nothing
        # while all is well, and unlike a ping it is bounded.
        arguments.pop("pool_pre_ping", None)
        # Each operation is one statement. Nothing is left open, and no round trips go to BEGIN and COMMIT.
        arguments.setdefault("isolation_level", "AUTOCOMMIT")
        # Errors show the statement, never the values: those are the results.
        arguments.setdefault("hide_parameters", True)
        connect = self._connect_arguments(url)
        connect.update(arguments.get("connect_args") or {})
        arguments["connect_args"] = connect
        if "poolclass" not in arguments and "pool" not in arguments:
            arguments["poolclass"] = QueuePool
            arguments.setdefault("pool_timeout", self._operation_timeout)
            if _in_memory(url):
                # Each connection would be a database of its own.
                arguments.update(pool_size=1, max_overflow=0, pool_recycle=-1)
        return arguments

    def _connect_arguments(self, url: URL) -> dict[str, Any]:
        seconds = max(1, round(self._connect_timeout))
        patience = max(1, round(self._operation_timeout))
        driver = url.get_driver_name()
        if driver in ("psycopg", "psycopg2"):
            return {"connect_timeout": max(2, seconds)}  # libpq takes no less
        if driver in ("pymysql", "mysqldb", "mariadbconnector"):
            names = ("connect_timeout", "read_timeout", "write_timeout")
            return dict(zip(names, (seconds, patience, patience), strict=True))
        if driver == "pg8000":
            return {"timeout": patience}
        if driver == "pysqlite":
            return {"timeout": self._operation_timeout, "check_same_thread": False}
        return {}


def _prepare_sqlite(connection: Any, *_: Any) -> None:
    # A text that is no UTF-8 must not keep whoever reads it from the others.
    connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
    cursor = connection.cursor()
    # Readers do not wait for writers. A folder that cannot hold the log (read-only, network) does without.
    with suppress(sqlite3.OperationalError):
        cursor.execute("PRAGMA journal_mode = WAL")
        # In this mode a crash of a process loses nothing; a power cut may lose the last moment's results.
        cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _in_memory(url: URL) -> bool:
    return url.get_backend_name() == "sqlite" and (
        not url.database or ":memory:" in url.database or url.query.get("mode") == "memory"
    )


def _make_folder(url: URL) -> None:
    if _in_memory(url) or not url.database or url.database.startswith("file:"):
        return
    Path(url.database).parent.mkdir(parents=True, exist_ok=True)
