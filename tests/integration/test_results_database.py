"""Results in PostgreSQL, MariaDB and SQLite: beside plain Celery, under concurrency, in children, in bad times."""

# long because: every promise is kept on three databases.

from __future__ import annotations

import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from uuid import uuid4

import celery
import pytest
import sqlalchemy as sa
from celery.backends.database import DatabaseBackend as PlainDatabaseBackend
from celery.exceptions import BackendStoreError
from kombu.exceptions import DecodeError

from qbridge.backends.database.backend import DatabaseBackend
from qbridge.exceptions import ConfigurationError, PayloadError
from qbridge.testing.servers import PostgreSQLServer
from qbridge.testing.waiting import wait_until

OURS = {"db": "qbridge.backends.database.backend:DatabaseBackend"}


def make_app(url: str, *, ours: bool = True, **settings: Any) -> celery.Celery:
    """A plain Celery app whose database results are ours, or Celery's own."""
    app = celery.Celery("t", broker="memory://", set_as_current=False)
    if ours:
        app.loader.override_backends = OURS
    app.conf.update(result_backend=f"db+{url}", **settings)
    return app


@contextmanager
def backend_on(url: str, **settings: Any) -> Iterator[DatabaseBackend]:
    """Our backend, closed at the end."""
    backend = make_app(url, **settings).backend
    assert isinstance(backend, DatabaseBackend)
    with closing(backend):
        yield backend


def plain_on(url: str, **settings: Any) -> PlainDatabaseBackend:
    """Celery's own backend."""
    backend = make_app(url, ours=False, **settings).backend
    assert type(backend) is PlainDatabaseBackend
    return backend


@pytest.fixture
def url(database_url: str) -> str:
    """An empty database."""
    return database_url


def in_child(act: Callable[[], Any]) -> Any:
    """Run something in a forked child and return what it returned."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, pickle.dumps(act()))
        except BaseException:
            os.write(writer, pickle.dumps(traceback.format_exc()))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pickle.loads(pipe.read())
    os.waitpid(pid, 0)
    return answer


def test_nothing_is_opened_before_the_first_use(tmp_path: Path) -> None:
    """Making the backend reads no network and makes no file; its first use makes the folder too."""
    file = tmp_path / "a" / "b" / "results.db"
    with backend_on(f"sqlite:///{file}") as backend:
        assert not file.parent.exists()
        backend.store_result("1", 5, "SUCCESS")
        assert file.exists()


@pytest.mark.parametrize("extended", [False, True])
def test_plain_celery_reads_ours_and_we_read_its(url: str, extended: bool) -> None:
    """Values, failures, children and missing results are the same on both sides, whoever made the tables."""
    settings = {"result_extended": extended}
    plain = plain_on(url, **settings)
    with backend_on(url, **settings) as ours:
        request = celery.app.task.Context(task="t.add", args=[1, {"a": 2}], kwargs={}, hostname="w", retries=2)
        request._children = [celery.result.AsyncResult("child", app=ours.app)]
        when = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
        for number, writer in enumerate((ours, plain)):
            writer.store_result(f"value-{number}", {"when": when, "n": [1, None]}, "SUCCESS", request=request)
            writer.store_result(f"error-{number}", LookupError("no", 3), "FAILURE", traceback="Traceback …")
            writer.store_result(f"state-{number}", {"done": 1}, "PROGRESS")
            for name in ("value", "error", "state"):
                mine = ours.get_task_meta(f"{name}-{number}", cache=False)
                theirs = plain.get_task_meta(f"{name}-{number}", cache=False)
                mine = {key: value for key, value in mine.items() if key not in ("result_json", "error_json")}
                assert repr(theirs) == repr({key: mine[key] for key in theirs})
        missing = ours.get_task_meta("never", cache=False)
        assert {key: missing[key] for key in plain.get_task_meta("never", cache=False) if key in missing} == {
            key: value for key, value in plain.get_task_meta("never", cache=False).items() if key in missing
        }


def test_plain_celery_made_the_tables_first(url: str) -> None:
    """Tables that plain Celery 5.7 made serve as they are."""
    plain = plain_on(url)
    plain.store_result("theirs", 1, "SUCCESS")
    with backend_on(url, database_create_tables_at_setup=False) as ours:
        ours.store_result("ours", 2, "SUCCESS")
        assert (1, 2) == (ours.get_result("theirs"), plain.get_result("ours"))


def test_success_is_never_overwritten(url: str) -> None:
    """A second run of a task does not replace its result; other states are replaced."""
    with backend_on(url) as backend:
        for state, value in (
            ("STARTED", None),
            ("RETRY", ValueError("a")),
            ("SUCCESS", 1),
            ("FAILURE", ValueError("b")),
        ):
            backend.store_result("1", value, state)
        backend.store_result("1", 2, "SUCCESS")
        assert ("SUCCESS", 1) == tuple(backend.get_task_meta("1", cache=False)[key] for key in ("status", "result"))


def test_concurrent_writers_of_one_task_agree(url: str) -> None:
    """Many threads store one task at the same time: one row, and the SUCCESS stays."""
    with backend_on(url) as backend:
        backend.store_result("warm", 0, "SUCCESS")
        for round_number in range(5):
            task_id = f"task-{round_number}"
            start = threading.Barrier(8)

            def store(number: int, task_id: str = task_id, start: threading.Barrier = start) -> None:
                start.wait(10)
                backend.store_result(task_id, number, "SUCCESS" if number % 2 else "STARTED")

            threads = [threading.Thread(target=store, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            meta = backend.get_task_meta(task_id, cache=False)
            assert "SUCCESS" == meta["status"]
            with backend.engine.connect() as connection:
                count = connection.execute(
                    sa.text("SELECT COUNT(*) FROM celery_taskmeta WHERE task_id = :id"), {"id": task_id}
                ).scalar()
            assert 1 == count
            backend.store_result(task_id, "late", "SUCCESS")
            assert meta["result"] == backend.get_task_meta(task_id, cache=False)["result"]


def test_without_an_upsert_the_outcome_is_the_same(url: str) -> None:
    """Databases that we know no upsert for are written with update-or-insert, to the same end."""
    with backend_on(url) as backend:
        layout = backend._find_layout()
        backend._layout = type(layout)(**{**layout.__dict__, "upsert": None, "upsert_group": None})
        for state, value in (("STARTED", None), ("SUCCESS", 1), ("FAILURE", ValueError("b"))):
            backend.store_result("1", value, state)
        assert ("SUCCESS", 1) == tuple(backend.get_task_meta("1", cache=False)[key] for key in ("status", "result"))
        start = threading.Barrier(6)

        def store(number: int) -> None:
            start.wait(10)
            backend.store_result("2", number, "SUCCESS")

        threads = [threading.Thread(target=store, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert "SUCCESS" == backend.get_task_meta("2", cache=False)["status"]


def test_connections_are_pooled(url: str) -> None:
    """A thousand operations of eight threads share the connections of one pool."""
    with backend_on(url, database_engine_options={"pool_size": 4, "max_overflow": 0}) as backend:
        opened: list[Any] = []
        sa.event.listen(backend.engine, "connect", lambda *args: opened.append(args))

        def work() -> None:
            for _ in range(60):
                task_id = str(uuid4())
                backend.store_result(task_id, 1, "SUCCESS")
                assert 1 == backend.get_task_meta(task_id, cache=False)["result"]

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(opened) <= 4


def test_older_tables_are_used_as_they_are(url: str) -> None:
    """A Celery 5.6 table lacks columns: it is written and read without them, and never altered."""
    engine = sa.create_engine(url)
    blob = {"postgresql": "BYTEA", "mysql": "BLOB", "sqlite": "BLOB"}[engine.dialect.name]
    serial = {"postgresql": "SERIAL", "mysql": "INTEGER AUTO_INCREMENT", "sqlite": "INTEGER"}[engine.dialect.name]
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.text("CREATE SEQUENCE task_id_sequence"))
            connection.execute(sa.text("CREATE SEQUENCE taskset_id_sequence"))
        if engine.dialect.name == "mysql":
            connection.execute(sa.text("CREATE SEQUENCE task_id_sequence"))
            connection.execute(sa.text("CREATE SEQUENCE taskset_id_sequence"))
        connection.execute(
            sa.text(
                f"CREATE TABLE celery_taskmeta (id {serial} PRIMARY KEY, task_id VARCHAR(155) UNIQUE, "
                f"status VARCHAR(50), result {blob}, date_done TIMESTAMP NULL, traceback TEXT)"
            )
        )
        connection.execute(
            sa.text(
                f"CREATE TABLE celery_tasksetmeta (id {serial} PRIMARY KEY, taskset_id VARCHAR(155) UNIQUE, "
                f"result {blob}, date_done TIMESTAMP NULL)"
            )
        )
    with backend_on(url, database_create_tables_at_setup=False, result_extended=True) as backend:
        backend.store_result("1", {"a": 1}, "SUCCESS")
        assert {"a": 1} == backend.get_task_meta("1", cache=False)["result"]
        assert {"a": 1} == backend.get_many_meta(["1"])["1"]["result"]
    assert 6 == len(sa.inspect(engine).get_columns("celery_taskmeta"))
    engine.dispose()


def test_missing_tables_are_not_made_unasked(url: str) -> None:
    """With ``database_create_tables_at_setup=False`` the error names the tables and the SQL that makes them."""
    with backend_on(url, database_create_tables_at_setup=False) as backend:
        with pytest.raises(ConfigurationError, match=r"celery_taskmeta.*\n.*CREATE (TABLE|SEQUENCE)") as caught:
            backend.get_task_meta("1")
        assert "qbridge:qbridge" not in str(caught.value)
        assert not sa.inspect(backend.engine).has_table("celery_taskmeta")


def test_the_printed_sql_makes_tables_that_plain_celery_uses(url: str) -> None:
    """An administrator runs the SQL of the message; both sides work on what it made."""
    with backend_on(url, database_create_tables_at_setup=False) as backend:
        with backend.engine.connect() as connection:
            sql = backend.tables.statements(backend.engine.dialect)
            for statement in sql.split(";"):
                if statement.strip():
                    connection.execute(sa.text(statement))
        backend.store_result("1", 5, "SUCCESS")
        assert 5 == plain_on(url).get_result("1")


def test_names_and_schemas_of_two_apps_do_not_mix(url: str) -> None:
    """Table names belong to the app (plain Celery renames the tables of the whole process)."""
    with (
        backend_on(url, database_table_names={"task": "my_tasks", "group": "my_groups"}) as one,
        backend_on(url) as other,
    ):
        one.store_result("1", "one", "SUCCESS")
        other.store_result("1", "other", "SUCCESS")
        assert ("one", "other") == (one.get_result("1"), other.get_result("1"))
        assert plain_on(url).get_result("1") == "other"


def make_and_store(url: str, number: int) -> int:
    """Store one result from a new process, making the tables if nobody did."""
    with backend_on(url) as backend:
        backend.store_result(f"from-{number}", number, "SUCCESS")
    return number


def test_processes_that_start_at_once_make_the_tables_once(url: str) -> None:
    """Making the tables is a race that nobody loses."""
    with get_context("spawn").Pool(4) as pool:
        assert [0, 1, 2, 3] == pool.starmap(make_and_store, [(url, number) for number in range(4)])
    with backend_on(url) as backend:
        assert [0, 1, 2, 3] == [backend.get_result(f"from-{number}") for number in range(4)]


def test_a_forked_child_has_connections_of_its_own(url: str) -> None:
    """Parent and child go on beside each other; the child leaves the parent's connections alone, also when it ends."""
    with backend_on(url) as backend:
        backend.store_result("parent", 1, "SUCCESS")

        def child() -> Any:
            for number in range(20):
                backend.store_result(f"child-{number}", number, "SUCCESS")
            backend.close()
            return backend.get_task_meta("parent", cache=False)["result"]

        opened: list[Any] = []
        sa.event.listen(backend.engine, "connect", lambda *args: opened.append(args))
        assert 1 == in_child(child)
        assert [*range(20)] == [backend.get_task_meta(f"child-{n}", cache=False)["result"] for n in range(20)]
        if not url.startswith("sqlite"):  # whose connections are closed before a fork: WAL is not safe across it
            assert [] == opened, "the parent had to connect again"


def test_pickles_in_the_database_are_not_loaded(url: str, tmp_path: Path) -> None:
    """A row that holds a pickle is an error of its reader; nothing runs, and others read on."""
    proof = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (proof,)

    with backend_on(url) as backend:
        backend.store_result("good", 1, "SUCCESS")
        backend.store_result("bad", 1, "SUCCESS")
        backend.store_result("broken", 1, "SUCCESS")
        task = backend.tables.task
        with backend.engine.connect() as connection:
            connection.execute(sa.update(task).where(task.c.task_id == "bad").values(result=pickle.dumps(Attack(), 2)))
            connection.execute(sa.update(task).where(task.c.task_id == "broken").values(result=b"{"))
        with pytest.raises(PayloadError, match="pickle"):
            backend.get_task_meta("bad", cache=False)
        found = backend.get_many_meta(["good", "bad", "broken"])
        assert 1 == found["good"]["result"]
        assert isinstance(found["bad"], PayloadError)
        assert isinstance(found["broken"], DecodeError)
        assert not proof.exists()


def test_many_results_are_read_at_once(url: str) -> None:
    """``get_many_meta`` finds what is ready among any number of ids, with a query per 500."""
    with backend_on(url) as backend:
        ids = [f"id-{number}" for number in range(1_200)]
        for number in range(0, 1_200, 100):
            backend.store_result(ids[number], number, "SUCCESS")
        backend.store_result(ids[1], None, "STARTED")
        queries: list[str] = []
        sa.event.listen(backend.engine, "before_cursor_execute", lambda *args: queries.append(args[2]))
        found = backend.get_many_meta(ids)
        assert {ids[number]: number for number in range(0, 1_200, 100)} == {
            task_id: meta["result"] for task_id, meta in found.items()
        }
        assert 3 == len(queries)
        assert "STARTED" == backend.get_many_meta(ids, ready_only=False)[ids[1]]["status"]


def test_groups_are_saved_restored_and_deleted(url: str) -> None:
    """``GroupResult.save`` and ``restore`` work, twice too, and plain Celery sees the same group."""
    with backend_on(url) as backend:
        app = backend.app
        group = app.GroupResult("group", [app.AsyncResult("a"), app.AsyncResult("b")])
        group.save()
        group.save()
        assert ["a", "b"] == [result.id for result in backend.restore_group("group", cache=False).results]
        assert ["a", "b"] == [result.id for result in plain_on(url).restore_group("group").results]
        group.delete()
        assert backend.restore_group("group", cache=False) is None


def test_forgotten_and_expired_results_are_gone(url: str) -> None:
    """``forget`` deletes one; ``cleanup`` deletes what is older than ``result_expires``, unfinished states too."""
    with backend_on(url, result_expires=60) as backend:
        for task_id in ("forgotten", "old", "old-started", "new"):
            backend.store_result(task_id, 1, "STARTED" if "started" in task_id else "SUCCESS")
        backend.forget("forgotten")
        assert "PENDING" == backend.get_task_meta("forgotten", cache=False)["status"]
        task = backend.tables.task
        long_ago = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=61)
        with backend.engine.connect() as connection:
            connection.execute(sa.update(task).where(task.c.task_id.like("old%")).values(date_done=long_ago))
        backend.cleanup()
        assert [False, False, True] == [backend.task_result_exists(name) for name in ("old", "old-started", "new")]


def test_what_is_stored_while_expired_rows_are_removed_stays(url: str) -> None:
    """A task that ran for longer than results are kept: its old state is found, and its outcome comes just then."""
    with backend_on(url, result_expires=60) as backend:
        backend.store_result("long", None, "STARTED")
        task = backend.tables.task
        long_ago = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=61)
        with backend.engine.connect() as connection:
            connection.execute(sa.update(task).where(task.c.task_id == "long").values(date_done=long_ago))
        stored: list[str] = []

        def store_first(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
            if statement.startswith("DELETE") and not stored:
                stored.append(statement)
                backend.store_result("long", 42, "SUCCESS")

        sa.event.listen(backend.engine, "before_cursor_execute", store_first)
        backend.cleanup()
        assert stored
        assert backend.get_task_meta("long", cache=False)["status"] == "SUCCESS"


def test_async_result_waits_without_half_second_steps(url: str) -> None:
    """``AsyncResult.get`` of plain tasks sees a result some milliseconds after it is stored."""
    with backend_on(url) as backend:
        backend.store_result("warm", 0, "SUCCESS")
        stored: list[float] = []

        def store() -> None:
            stored.append(time.monotonic())
            backend.store_result("1", 5, "SUCCESS")

        timer = threading.Timer(0.02, store)
        timer.start()
        assert 5 == backend.app.AsyncResult("1").get(timeout=10)
        assert time.monotonic() - stored[0] < 0.3
        timer.join()


def test_a_restarted_server_is_found_again(qbridge_postgresql: PostgreSQLServer) -> None:
    """Pooled connections that died with the server cost a repetition, not an error."""
    with qbridge_postgresql.heal().fresh() as url, backend_on(url) as backend:
        backend.store_result("1", 1, "SUCCESS")
        qbridge_postgresql.restart()
        assert 1 == backend.get_task_meta("1", cache=False)["result"]
        qbridge_postgresql.restart()
        backend.store_result("2", 2, "SUCCESS")
        assert 2 == backend.get_result("2")


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_frozen_server_does_not_hang_us(kind: str, request: pytest.FixtureRequest) -> None:
    """Stores and reads against a server that never answers end within their bound, and work after it thaws."""
    server = request.getfixturevalue(f"qbridge_{kind}").heal()
    options = {"operation_timeout": 1.0, "connect_timeout": 1.0}
    with server.fresh() as url, backend_on(url, result_backend_transport_options=options) as backend:
        backend.store_result("1", 1, "SUCCESS")
        server.freeze()
        try:
            started = time.monotonic()
            with pytest.raises(BackendStoreError):
                backend.store_result("2", 2, "SUCCESS")
            with pytest.raises(celery.exceptions.BackendGetMetaError):
                backend.get_task_meta("1", cache=False)
            assert time.monotonic() - started < 12
        finally:
            server.thaw()
        assert 1 == wait_until(lambda: backend.get_task_meta("1", cache=False)["result"], what="the thawed server")


def test_a_stopped_server_is_reported_within_the_bound(qbridge_postgresql: PostgreSQLServer) -> None:
    """A server that refuses connections is an error soon, with nothing secret in it."""
    with qbridge_postgresql.heal().fresh() as url, backend_on(url) as backend:
        backend.store_result("1", 1, "SUCCESS")
        qbridge_postgresql.stop()
        try:
            started = time.monotonic()
            with pytest.raises(BackendStoreError) as caught:
                backend.store_result("secret", {"password": "hunter" * 2}, "SUCCESS")
            assert time.monotonic() - started < 5
            assert "hunterhunter" not in "".join(traceback.format_exception(caught.value))
        finally:
            qbridge_postgresql.heal()
