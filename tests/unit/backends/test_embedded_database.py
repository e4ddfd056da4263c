"""The embedded broker's file: bounded waits, forks, and a file that goes away."""

from __future__ import annotations

import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbridge.backends.deadline import deadline
from qbridge.backends.embedded.database import Database
from qbridge.backends.embedded.errors import FileReplaced, FileUnavailable

# As qbridge wrote it before there were delays.
FORMAT_1 = """
CREATE TABLE exchange (name TEXT PRIMARY KEY, type TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE queue (
    name TEXT PRIMARY KEY,
    durable INTEGER NOT NULL,
    auto_delete INTEGER NOT NULL,
    party TEXT,
    message_ttl REAL,
    expires REAL,
    used_at REAL NOT NULL
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
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    queue TEXT NOT NULL,
    priority INTEGER NOT NULL,
    expires_at REAL,
    party TEXT,
    deliveries INTEGER NOT NULL DEFAULT 0,
    losses INTEGER NOT NULL DEFAULT 0,
    envelope TEXT NOT NULL,
    body BLOB
);
CREATE INDEX message_ready ON message (queue, priority DESC, id) WHERE party IS NULL;
CREATE INDEX message_claimed ON message (party) WHERE party IS NOT NULL;
CREATE INDEX message_expiring ON message (expires_at) WHERE expires_at IS NOT NULL;
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "bridge.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    database = Database(path, timeout=0.3)
    database.open()
    yield database
    database.close()


def exchanges(database: Database) -> list[str]:
    return [row[0] for row in database.read("SELECT name FROM exchange ORDER BY name")]


def add(database: Database, name: str, *, durable: bool = False) -> None:
    with database.write(durable=durable) as sql:
        sql.execute("INSERT INTO exchange VALUES (?, 'direct')", (name,))


def test_the_folder_is_made_for_this_user_only(database: Database, path: Path) -> None:
    """Tasks carry their arguments: nobody else's business."""
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_locked_file_is_an_error_within_the_bound(database: Database, path: Path) -> None:
    """Waiting ends on time, and the message names the file; afterwards everything works again."""
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with pytest.raises(FileUnavailable, match=r"bridge\.db was locked by another process for more than 0\.3 s"):
        add(database, "a")
    assert 0.25 < time.monotonic() - began < 1.0
    assert exchanges(database) == []  # reading is never locked out
    holder.execute("ROLLBACK")
    holder.close()
    add(database, "a")
    assert exchanges(database) == ["a"]


def test_a_waiting_writer_gets_the_file_when_it_is_free(database: Database, path: Path) -> None:
    """Busy is not an error before the time is up."""
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.1, holder.execute, ("ROLLBACK",))
    timer.start()
    add(database, "a")
    timer.join()
    holder.close()
    assert exchanges(database) == ["a"]


def test_the_deadline_of_the_call_counts_if_it_is_nearer(database: Database, path: Path) -> None:
    """A send is bounded as a whole, not per step."""
    database.timeout = 30.0
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    began = time.monotonic()
    with deadline(0.2), pytest.raises(FileUnavailable):
        add(database, "a")
    assert time.monotonic() - began < 1.0
    holder.close()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_is_raised_in_a_transaction_undoes_it_and_frees_the_file(
    database: Database, path: Path, error: type[BaseException]
) -> None:
    """A time limit's signal can strike anywhere: no half a transaction, no lock left behind."""

    def interrupted() -> None:
        with database.write() as sql:
            sql.execute("INSERT INTO exchange VALUES ('a', 'direct')")
            raise error

    with pytest.raises(error):
        interrupted()
    other = Database(path, timeout=0.1)
    add(other, "b")
    other.close()
    assert exchanges(database) == ["b"]


def test_a_deleted_file_is_noticed_and_made_again(database: Database, path: Path) -> None:
    """Writing into a deleted file would lose messages in silence: one error, then a new file."""
    add(database, "a")
    for file in path.parent.glob("bridge.db*"):
        file.unlink()
    with pytest.raises(FileReplaced):
        add(database, "b")
    add(database, "c")
    assert exchanges(database) == ["c"]


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    """A path typed wrong must not put our tables into somebody's data."""
    path = tmp_path / "theirs.db"
    theirs = sqlite3.connect(path)
    theirs.execute("CREATE TABLE customers (name TEXT)")
    theirs.close()
    with pytest.raises(FileUnavailable, match="another program"):
        Database(path, timeout=0.1).open()


def test_a_file_that_is_no_database_is_an_error_that_says_so(tmp_path: Path) -> None:
    """Text is not a database."""
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to look like one " * 40)
    with pytest.raises(FileUnavailable, match="Another program made this file"):
        Database(path, timeout=0.1).open()


def test_a_newer_format_is_refused(database: Database, path: Path) -> None:
    """An older qbridge does not guess at a newer file."""
    with database.write() as sql:
        sql.execute("PRAGMA user_version=99")
    database.close()
    with pytest.raises(FileUnavailable, match="format 99"):
        database.open()


def structure(path: Path) -> tuple[set[object], ...]:
    sql = sqlite3.connect(path)
    tables = [row[0] for row in sql.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    columns = {(table, *row[1:]) for table in tables for row in sql.execute(f"PRAGMA table_info({table})")}
    indexes = set(sql.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'index'").fetchall())
    version = set(sql.execute("PRAGMA user_version").fetchall())
    sql.close()
    return columns, indexes, version


def test_a_file_of_format_1_becomes_one_of_the_present_format(database: Database, path: Path, tmp_path: Path) -> None:
    """With what is in it, and even where two processes come at once; afterwards it is as a new one."""
    old = tmp_path / "old.db"
    sql = sqlite3.connect(old)
    sql.executescript(f"PRAGMA journal_mode=WAL; {FORMAT_1} PRAGMA user_version=1; PRAGMA application_id=0x71627267;")
    sql.execute("INSERT INTO message (queue, priority, envelope, body) VALUES ('work', 5, '{}', 'kept')")
    sql.commit()
    sql.close()
    databases = [Database(old, timeout=5.0) for _ in range(4)]
    threads = [threading.Thread(target=each.open) for each in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.read("SELECT body, not_before FROM message") for each in databases] == [[("kept", None)]] * 4
    for each in databases:
        each.close()
    assert structure(path) == structure(old)


def test_reading_makes_no_file(tmp_path: Path) -> None:
    """Looking at a broker that was never used leaves no trace."""
    path = tmp_path / "never" / "bridge.db"
    with pytest.raises(FileUnavailable):
        Database(path, timeout=0.1, create=False).open()
    assert not path.parent.exists()


def test_several_threads_make_the_file_at_once(path: Path) -> None:
    """Whoever comes first makes the tables, the others find them."""
    databases = [Database(path, timeout=5.0) for _ in range(8)]
    start = threading.Barrier(len(databases))

    def work(number: int) -> None:
        start.wait()
        add(databases[number], f"{number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(databases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exchanges(databases[0]) == sorted(str(number) for number in range(len(databases)))
    for database in databases:
        database.close()


def test_synced_and_unsynced_transactions_alternate(database: Database) -> None:
    """The pragma follows each transaction's wish."""
    add(database, "a", durable=True)
    assert database.read("PRAGMA synchronous") == [(2,)]
    add(database, "b")
    assert database.read("PRAGMA synchronous") == [(1,)]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 and later
def test_no_connection_crosses_a_fork(database: Database, path: Path) -> None:
    """Both sides go on with connections of their own, also while other threads are writing."""
    stop = threading.Event()
    written = 0

    def work() -> None:
        nonlocal written
        while not stop.is_set():
            add(database, f"parent {written}")
            written += 1

    database.timeout = 10.0
    thread = threading.Thread(target=work)
    thread.start()
    for child in range(5):
        pid = os.fork()
        if pid == 0:  # pragma: no cover - in the child
            try:
                inherited = database._connection
                add(database, f"child {child}")
                os._exit(0 if inherited is None else 3)
            except BaseException:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    stop.set()
    thread.join()
    assert len(exchanges(database)) == written + 5
    assert database.read("PRAGMA integrity_check") == [("ok",)]


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1000000000) SELECT count(*) FROM n"


def test_a_step_that_takes_too_long_is_an_error_within_the_bound(database: Database) -> None:
    """Whatever somebody has put into the file; a write is undone, and the next steps work."""
    began = time.monotonic()
    with deadline(0.3), pytest.raises(FileUnavailable, match="took too long"):
        database.read(ENDLESS)

    def write() -> None:
        with deadline(0.3), database.write() as sql:
            sql.execute("INSERT INTO exchange VALUES ('a', 'direct')")
            sql.execute(ENDLESS)

    with pytest.raises(FileUnavailable, match="took too long"):
        write()
    assert time.monotonic() - began < 3
    assert exchanges(database) == []


def test_a_signal_in_a_long_step_comes_through(database: Database) -> None:
    """What its handler raises is what the caller gets, not that SQLite was interrupted."""

    class Struck(Exception):
        pass

    def strike(*_: object) -> None:
        raise Struck

    # some million steps of SQLite's machine, in which it looks at the clock many times
    short = ENDLESS.replace("1000000000", "3000000")
    before = signal.signal(signal.SIGALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Struck):
            database.read(short)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
