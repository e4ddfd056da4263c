"""Counts, claims and revocations that somebody else has damaged in a result backend: do the others keep theirs?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from qbridge.backends.claims import Wanted, claim_store
from qbridge.backends.database import DatabaseResults
from qbridge.backends.database.tables import Layout, ResultTables
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.servers import MariaDBServer

TIMEOUT = 8.0  # seconds


class Engine:
    """Somebody else at the same database: called with a statement, it runs that and returns the rows."""

    def __init__(self, url: str) -> None:
        self.engine = sa.create_engine(DatabaseResults(url=url).sqlalchemy_url(), isolation_level="AUTOCOMMIT")

    def __call__(self, statement: str) -> Any:
        with self.engine.connect() as connection:
            found = connection.exec_driver_sql(statement)
            return found.fetchall() if found.returns_rows else []

    def close(self) -> None:
        self.engine.dispose()


@contextmanager
def somewhere(kind: str, request: pytest.FixtureRequest | None, folder: Path) -> Iterator[tuple[Contract, Any]]:
    """A bridge on a file with results in a database or in Redis, and somebody else there."""
    with ExitStack() as stack:
        if kind == "sqlite":
            url = f"sqlite:///{folder / 'results.db'}"
        else:
            assert request is not None
            url = stack.enter_context(request.getfixturevalue(f"qbridge_{kind}").heal().fresh())
        contract = stack.enter_context(closing(Contract(f"embedded://{folder / 'bridge.db'}", url, folder)))
        yield contract, stack.enter_context(closing(redis.Redis.from_url(url) if kind == "redis" else Engine(url)))


# -- numbers of rows that somebody has used up

NUMBERS_USED_UP = {
    "sqlite": ["INSERT INTO celery_taskmeta (id, task_id, status) VALUES (9223372036854775807, 'evil', 'SUCCESS')"],
    "sqlite, a row that is gone": [
        "INSERT INTO celery_taskmeta (id, task_id, status) VALUES (9223372036854775807, 'evil', 'SUCCESS')",
        "DELETE FROM celery_taskmeta WHERE task_id = 'evil'",
    ],
    "postgresql": [
        ("INSERT INTO celery_taskmeta (id, task_id, status) "
        "SELECT last_value + n, 'evil' || n, 'SUCCESS' FROM task_id_sequence, generate_series(1, 100) n"),
    ],
    "postgresql, a sequence beyond the column": ["SELECT setval('task_id_sequence', 2147483647)"],
    "postgresql, a sequence at its end": ["SELECT setval('task_id_sequence', 9223372036854775807)"],
    "mariadb": [
        ("INSERT INTO celery_taskmeta (id, task_id, status)"
        " SELECT seq, CONCAT('evil', seq), 'SUCCESS' FROM seq_2_to_100")
    ],
    "mariadb, a sequence beyond the column": ["SELECT SETVAL(task_id_sequence, 2147483647)"],
    "mariadb, a sequence at its end": ["SELECT SETVAL(task_id_sequence, 9223372036854775806)"],
    "mariadb, no sequence": [
        "DROP SEQUENCE task_id_sequence",
        "ALTER TABLE celery_taskmeta MODIFY id INTEGER NOT NULL AUTO_INCREMENT",
        "INSERT INTO celery_taskmeta (id, task_id, status) VALUES (2147483647, 'evil', 'SUCCESS')",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS_USED_UP)
def test_numbers_that_are_used_up_cost_no_task_its_outcome(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Each runs once and is heard of, the row of somebody else stays what it was, and the log says what to do."""
    with somewhere(name.partition(",")[0], request, tmp_path) as (contract, sql):
        note = contract.tasks.note.using(queue="fragile")
        with contract.worker_of("fragile", pool="solo") as worker:
            assert note.delay(str(contract.path()), "first").get(timeout=TIMEOUT) == "first"
            for statement in NUMBERS_USED_UP[name]:
                sql(statement)
            paths = [contract.path() for _ in range(3)]
            results = [note.delay(str(path), "w") for path in paths]
            assert [result.get(timeout=TIMEOUT) for result in results] == ["w"] * len(paths)
            assert [len(runs(path)) for path in paths] == [1] * len(paths)
            assert "celery_taskmeta has no number for a new row, or another row has it" in worker.log.read_text()
        assert not contract.bridge.dead_letters.list("fragile")
        backend = contract.bridge.celery.backend
        backend.store_result(results[0].id, "other", "SUCCESS")  # nothing is written over a success
        assert backend.get_task_meta(results[0].id)["result"] == "w"
        assert {tuple(row) for row in sql("SELECT result FROM celery_taskmeta WHERE task_id LIKE 'evil%%'")} <= {
            (None,)
        }


def test_numbers_of_groups_that_are_used_up_lose_no_group(tmp_path: Path) -> None:
    """Its results can be restored."""
    with somewhere("sqlite", None, tmp_path) as (contract, sql):
        app = contract.bridge.celery
        group = app.GroupResult("group-1", [app.AsyncResult("task-1")])
        group.save()
        sql("INSERT INTO celery_tasksetmeta (id, taskset_id) VALUES (9223372036854775807, 'evil')")
        app.GroupResult("group-2", [app.AsyncResult("task-1")]).save()
        assert [app.GroupResult.restore(id_).results[0].id for id_ in ("group-1", "group-2")] == ["task-1", "task-1"]


def test_a_number_of_another_tasks_row_leaves_that_row_alone_in_mariadb(qbridge_mariadb: MariaDBServer) -> None:
    """MySQL takes it for the row that is to be changed: with servers that give such a number out, an error."""
    with qbridge_mariadb.heal().fresh() as url, closing(Engine(url)) as sql:
        tables = ResultTables()
        tables.metadata.create_all(sql.engine)
        upsert = Layout.find(sql.engine, tables, False).upsert
        assert upsert is not None
        values = {f"new_{name}": None for name in ("result", "date_done", "traceback", "children")}
        mine, other = ({**values, "new_task_id": name, "new_status": "SUCCESS", "new_id": 7} for name in ("a", "b"))
        with sql.engine.begin() as connection:
            statement = upsert.values(id=sa.bindparam("new_id"))
            connection.execute(statement, mine)
            connection.execute(statement, mine)
            with pytest.raises(sa.exc.DBAPIError, match="1690"):
                connection.execute(statement, other)
        assert [tuple(row) for row in sql("SELECT id, task_id FROM celery_taskmeta")] == [(7, "a")]


def test_a_table_without_an_upsert_gets_rows_under_numbers_that_are_free(tmp_path: Path) -> None:
    """Whose task_id is not unique, as somebody else has made it."""
    with somewhere("sqlite", None, tmp_path) as (contract, sql):
        sql(
            "CREATE TABLE celery_taskmeta (id INTEGER PRIMARY KEY, task_id TEXT, status TEXT, result BLOB,"
            " date_done DATETIME, traceback TEXT, children BLOB)"
        )
        sql(
            "CREATE TABLE celery_tasksetmeta (id INTEGER PRIMARY KEY, taskset_id TEXT, result BLOB, date_done DATETIME)"
        )
        sql(
            "CREATE TRIGGER t BEFORE INSERT ON celery_taskmeta WHEN NEW.id >= 0 OR NEW.id IS NULL"
            " BEGIN SELECT RAISE(ABORT, 'taken'); END"
        )
        backend = contract.bridge.celery.backend
        backend.store_result("id-1", 1, "SUCCESS")
        assert backend.get_task_meta("id-1")["result"] == 1


def test_a_trigger_in_sqlite_holds_a_store_no_longer_than_its_bound(tmp_path: Path) -> None:
    """Its error says that the database was interrupted."""
    bridge_file, results = f"embedded://{tmp_path / 'bridge.db'}", f"sqlite:///{tmp_path / 'results.db'}"
    with closing(Contract(bridge_file, results, tmp_path)) as contract, closing(Engine(results)) as sql:
        app = contract.another_bridge(results={"statement_timeout": 1.0}).celery
        app.backend.store_result("id-1", 1, "SUCCESS")
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1000000000) SELECT i FROM n"
        sql(f"CREATE TRIGGER t BEFORE INSERT ON celery_taskmeta BEGIN SELECT count(*) FROM ({endless}); END")
        began = time.monotonic()
        with pytest.raises(Exception, match=r"interrupted|store result"):
            app.backend.store_result("id-2", 1, "SUCCESS")
        assert time.monotonic() - began < 4  # twice the bound, as with a lock, and time to spare


# -- claims and revocations that somebody has damaged

CLAIMS = {
    "sqlite": ["token = 'x'", "since = 'x'", "ends = 9e999", "holder = CAST(x'ff' AS TEXT)"],
    "postgresql": [
        "since = -9223372036854775808",
        "ends = -9223372036854775808",
        "token = 9223372036854775807, holder = 'x', ends = 0",
    ],
    "mariadb": ["since = -9223372036854775808", "ends = -9223372036854775808"],
}  # fmt: skip

REDIS_CLAIMS = [{"token": "x"}, {"since": "1e400", "until": "nan"}, {"holder": b"\xff"}, "text"]


@pytest.mark.parametrize("kind", [*CLAIMS, "redis"])
def test_a_damaged_claim_keeps_no_other_one_from_being_renewed(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """It is made anew, and the others are extended, wherever it stands among them."""
    damages: list[Any] = CLAIMS.get(kind) or REDIS_CLAIMS
    column = "`key`" if kind == "mariadb" else "key"
    with somewhere(kind, request, tmp_path) as (contract, sql):
        store = claim_store(contract.bridge.celery.backend)
        assert store is not None
        for number, damage in enumerate(damages):
            keys = [f"{name}-{number}" for name in ("good", "bad", "fair")]
            store.take("run", [Wanted(key, "me", 30.0) for key in keys])
            if kind != "redis":
                sql(f"UPDATE qbridge_claim SET {damage} WHERE {column} = 'bad-{number}'")
            elif damage == "text":
                sql.set(f"qbridge-run-bad-{number}", "x")
            else:
                sql.hset(f"qbridge-run-bad-{number}", mapping=damage)
            claims = store.take("run", [Wanted(key, "me", 60.0) for key in keys])
            assert [claims[0].holder, claims[2].holder] == ["me", "me"]
            assert all(claim.left > 50 for claim in (claims[0], claims[2])), damage
            for key in (keys[0], keys[2]):
                look = store.look("run", key)
                assert look is not None
                assert look.left > 50
            store.take("run", [Wanted(keys[1], "me", 60.0)])


@pytest.mark.parametrize("kind", ["sqlite", "redis", "redis, another type"])
def test_what_is_no_revocation_hides_none(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A worker that starts later does not run what was revoked, nor is it kept from that by what is no id."""
    with somewhere(kind.partition(",")[0], request, tmp_path) as (contract, sql):
        store = claim_store(contract.bridge.celery.backend)
        assert store is not None
        if kind == "sqlite":
            store.revoke("other")
            sql("INSERT INTO qbridge_claim VALUES ('revoked', CAST(x'ff' AS TEXT), 'x', 1, 9e15, 9e15, '')")
            sql("INSERT INTO qbridge_claim VALUES ('revoked', 'odd', 'x', 'x', 'x', 'x', '')")
            assert store.is_revoked("odd")
        elif kind == "redis":
            sql.zadd("qbridge-revoked", {b"\xff": time.time() * 1000})
        else:
            sql.set("qbridge-revoked", "x")
            assert not store.is_revoked("unwanted")
            assert store.revoked_since(0)[0] == []
        path = contract.path()
        note = contract.tasks.note.using(queue="fragile")
        unwanted = note.delay(str(path), "unwanted")
        unwanted.revoke()
        assert unwanted.id in store.revoked_since(0)[0]
        assert "\ufffd" not in "".join(store.revoked_since(0)[0]) or kind == "sqlite"
        wanted = note.delay(str(path), "wanted")
        with contract.worker_of("fragile", pool="solo"):
            assert wanted.get(timeout=TIMEOUT) == "wanted"
        assert [word for _, _, word in runs(path)] == ["wanted"]
        assert unwanted.state == "REVOKED"
