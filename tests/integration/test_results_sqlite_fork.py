"""SQLite results across a fork: what the child commits is there."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

from celery import Celery

from qbridge.backends.database.backend import DatabaseBackend

FORKS = 20


def test_a_row_of_a_forked_child_outlives_the_parents_connections(tmp_path: Path) -> None:
    """The parent has used the database, forks, and closes; a third party opens and closes; the child's row stays."""
    file = tmp_path / "results.db"
    app = Celery(set_as_current=False, broker="memory://")
    backend = DatabaseBackend(app=app, url=f"sqlite:///{file}")
    backend.store_result("parent", 1, "SUCCESS")
    go_reader, go_writer = os.pipe()
    done_reader, done_writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            backend.store_result("child", 2, "SUCCESS")
            os.write(done_writer, b"1")
            os.read(go_reader, 1)  # the parent has closed, and somebody else has opened and closed the file
            backend.store_result("again", 3, "SUCCESS")
            os.write(done_writer, b"1")
        finally:
            os._exit(0)
    assert os.read(done_reader, 1) == b"1"
    backend.close()
    look = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('pragma user_version').fetchone(); c.close()"
    )
    subprocess.run([sys.executable, "-c", look, str(file)], check=True, timeout=30)
    os.write(go_writer, b"1")
    assert os.read(done_reader, 1) == b"1"
    os.waitpid(pid, 0)
    with sqlite3.connect(file) as reader:
        found = {row[0] for row in reader.execute("select task_id from celery_taskmeta")}
    reader.close()
    for descriptor in (go_reader, go_writer, done_reader, done_writer):
        os.close(descriptor)
    assert found == {"parent", "child", "again"}


def test_a_child_forked_while_threads_use_sqlite_can_use_it_too(tmp_path: Path) -> None:
    """SQLite's own locks are never inherited held: without care, a child in twenty waited for ever to open the file."""
    app = Celery(set_as_current=False, broker="memory://")
    backend = DatabaseBackend(app=app, url=f"sqlite:///{tmp_path / 'results.db'}")
    ended = threading.Event()
    turns: list[int] = []

    def use(number: int) -> None:
        while not ended.is_set():
            backend.get_many_meta([str(number)])
            turns.append(number)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    codes = []
    for number in range(FORKS):
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)  # ends a child that is stuck
            code = 1
            try:
                backend.store_result(f"child-{number}", number, "SUCCESS")
                code = 0
            finally:
                os._exit(code)
        codes.append(os.waitpid(pid, 0)[1])
    ended.set()
    for thread in threads:
        thread.join(10)
    backend.close()
    assert codes == [0] * FORKS
    assert set(turns) == {0, 1, 2}
