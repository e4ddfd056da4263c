"""SQLite results across a fork: what the child commits is there."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

from celery import Celery

from qbridge.backends.database.backend import DatabaseBackend


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
