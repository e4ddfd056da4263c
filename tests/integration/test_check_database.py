"""``check`` on real databases: each trouble by its name, nothing changed in them, no secret said."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from qbridge import Bridge, BridgeConfig
from qbridge.backends.base import Finding
from qbridge.backends.database import DatabaseResults
from qbridge.backends.database.claim_store import claim_table
from qbridge.backends.database.tables import ResultTables
from qbridge.testing.servers import DatabaseServer, MariaDBServer

SECRET = "s3cret-password"


@pytest.fixture(params=["postgresql", "mariadb"])
def server(request: pytest.FixtureRequest) -> DatabaseServer:
    """Each database server."""
    found: DatabaseServer = request.getfixturevalue(f"qbridge_{request.param}")
    return found.heal()


@pytest.fixture
def url(server: DatabaseServer) -> Iterator[str]:
    """URL of an empty database on it."""
    with server.fresh() as url:
        yield url


def look(url: str | sa.URL, **fields: Any) -> dict[str, Finding]:
    """Findings by code; their time is bounded and they keep the password to themselves."""
    results = DatabaseResults(url=url, **fields)
    started = time.monotonic()
    findings = list(results.check())
    assert time.monotonic() - started < 2 * results.connect_timeout + results.operation_timeout + 1
    assert SECRET not in repr(findings)
    assert all(finding.todo for finding in findings if finding.level in ("error", "warning"))
    return {finding.code: finding for finding in findings}


def errors(found: dict[str, Finding]) -> Sequence[str]:
    """Codes of what is wrong."""
    return [code for code, finding in found.items() if finding.level == "error"]


@contextmanager
def administrator(url: str) -> Iterator[sa.Connection]:
    """A connection that may do everything, each statement on its own."""
    engine = sa.create_engine(DatabaseResults(url=url).sqlalchemy_url(), isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


@contextmanager
def account(url: str) -> Iterator[tuple[sa.Connection, sa.URL, str]]:
    """An administrator's connection, the URL of a user who may only connect, and its name in GRANT."""
    place = DatabaseResults(url=url).sqlalchemy_url()
    with administrator(url) as connection:
        if connection.dialect.name == "postgresql":
            name = "weak"
            connection.exec_driver_sql(f"CREATE ROLE weak LOGIN PASSWORD '{SECRET}'")
        else:
            name = "weak@'%%'"
            connection.exec_driver_sql(f"CREATE USER {name} IDENTIFIED BY '{SECRET}'")
        try:
            yield connection, place.set(username="weak", password=SECRET), name
        finally:
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("DROP OWNED BY weak")
            connection.exec_driver_sql(f"DROP {'ROLE' if connection.dialect.name == 'postgresql' else 'USER'} {name}")


def make_tables(connection: sa.Connection) -> None:
    """The tables as qbridge and Celery make them."""
    ResultTables().metadata.create_all(connection)
    claim_table().create(connection)


@pytest.fixture(params=["postgresql", "sqlite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database with Celery's tables, and none of ours."""
    if request.param == "postgresql":
        with request.getfixturevalue("qbridge_postgresql").heal().fresh() as url, administrator(url) as connection:
            ResultTables().metadata.create_all(connection)
            yield url
        return
    url = f"sqlite:///{tmp_path}/results.db"
    with administrator(url) as connection:
        ResultTables().metadata.create_all(connection)
    yield url


def run(url: str, todo: str) -> None:
    """Do what a finding says."""
    with administrator(url) as connection:
        for statement in todo.split("\n", 1)[1].split(";"):
            if statement.strip():
                connection.exec_driver_sql(statement)


def test_claims_have_a_table_of_their_own(place: str) -> None:
    """Where it is missing, the first use makes it; where somebody else makes tables, its SQL is there and suffices."""
    found = look(place)
    assert [] == errors(found)
    assert "qbridge_claim" in found["results.tables_missing"].what
    assert "first use" in found["results.tables_missing"].what
    assert "celery_taskmeta" in found["results.tables"].what
    found = look(place, create_tables=False)
    assert ["results.tables_missing"] == errors(found)
    assert "celery_taskmeta" not in found["results.tables_missing"].todo
    run(place, found["results.tables_missing"].todo)
    found = look(place, create_tables=False)
    assert [] == errors(found)
    assert "results.tables_missing" not in found
    assert "qbridge_claim" in found["results.tables"].what
    with Bridge(
        BridgeConfig(results=f"db+{place}", broker="amqp://nowhere")
    ) as bridge:  # and it is the one that is used
        claims: Any = bridge.celery.backend.claim_store()
        claims.revoke("an id")
        assert claims.is_revoked("an id")


def test_a_table_of_claims_with_other_columns_is_refused(place: str) -> None:
    """Before the first claim fails of it; the SQL makes it anew."""
    with administrator(place) as connection:
        claim_table().create(connection)
        connection.exec_driver_sql("ALTER TABLE qbridge_claim DROP COLUMN note")
    found = look(place)
    assert ["results.columns_missing"] == errors(found)
    assert "has no column note" in found["results.columns_missing"].what
    run(place, found["results.columns_missing"].todo)
    assert "qbridge_claim" in look(place)["results.tables"].what


def test_tables_that_the_first_use_will_make_are_no_error(url: str) -> None:
    """And are not made by looking."""
    found = look(url)
    assert [] == errors(found)
    assert "first use" in found["results.tables_missing"].what
    assert "results.server" in found
    with administrator(url) as connection:
        assert [] == sa.inspect(connection).get_table_names()


def test_tables_that_others_must_make_come_with_their_sql(url: str) -> None:
    """Which is all that it takes."""
    finding = look(url, create_tables=False)["results.tables_missing"]
    assert "error" == finding.level
    with administrator(url) as connection:
        for statement in finding.todo.split("\n", 1)[1].split(";"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    found = look(url, create_tables=False)
    assert [] == errors(found)
    assert "results.tables" in found


def test_other_names_are_looked_for(url: str) -> None:
    """``table_names`` and ``table_schemas`` count here too."""
    with administrator(url) as connection:
        make_tables(connection)
    assert "results.tables" in look(url)
    assert "'" not in look(url, table_names={"task": "mine"})["results.tables_missing"].what
    assert "mine" in look(url, table_names={"task": "mine"})["results.tables_missing"].what


def test_columns_of_an_older_celery_may_be_missing(url: str) -> None:
    """Results are stored without them; the SQL that adds them is there."""
    with administrator(url) as connection:
        make_tables(connection)
        connection.exec_driver_sql("ALTER TABLE celery_taskmeta DROP COLUMN children")
        found = look(url)
        assert [] == errors(found)
        assert "children" in found["results.columns_missing"].what
        connection.exec_driver_sql(found["results.columns_missing"].todo.split("\n", 1)[1].rstrip(";"))
        assert "results.columns_missing" not in look(url)


def test_a_table_of_something_else_is_refused(url: str) -> None:
    """Without its result there is no result."""
    with administrator(url) as connection:
        make_tables(connection)
        connection.exec_driver_sql("ALTER TABLE celery_taskmeta DROP COLUMN result")
    assert ["results.columns_missing"] == errors(look(url))


def test_missing_privileges_are_named_and_can_be_granted(url: str, server: DatabaseServer) -> None:
    """What the findings say to grant is granted here, until there is nothing left to say."""
    with account(url) as (connection, weak, name):
        make_tables(connection)
        if isinstance(server, MariaDBServer):
            # MySQL's catalogue shows a user its own tables only
            for table in ("celery_taskmeta", "celery_tasksetmeta", "qbridge_claim"):
                connection.exec_driver_sql(f"GRANT SELECT ON {table} TO {name}")
        else:
            connection.exec_driver_sql("GRANT SELECT ON celery_taskmeta TO weak")
        findings = [f for f in DatabaseResults(url=weak).check() if f.level == "error"]
        assert "INSERT, UPDATE, DELETE on celery_taskmeta" in findings[0].what
        for finding in findings:
            for statement in finding.todo.split(";"):
                if statement.strip():
                    connection.exec_driver_sql(statement.replace("%", "%%"))
        found = look(weak)
        assert [] == errors(found)
        assert "results.tables" in found


def test_a_user_who_may_not_make_tables_is_told_the_sql(url: str) -> None:
    """Before the first result, not at it."""
    with account(url) as (connection, weak, _):
        finding = next(f for f in look(weak).values() if f.level == "error")
        if connection.dialect.name == "postgresql":
            assert "may not create tables" in finding.what
            assert "CREATE TABLE celery_taskmeta" in finding.todo
        else:
            assert finding.code in ("results.permission", "results.tables_missing")


def test_wrong_accounts_and_databases_are_named(url: str) -> None:
    """A wrong password, an unknown user, a database that is not there."""
    place = DatabaseResults(url=url).sqlalchemy_url()
    assert ["results.credentials"] == errors(look(place.set(password=SECRET)))
    assert ["results.credentials"] == errors(look(place.set(username="nobody_here", password=SECRET)))
    (missing,) = look(place.set(database="nowhere")).values()
    assert "results.database_missing" == missing.code
    assert "CREATE DATABASE nowhere" in missing.todo


def test_a_frozen_server_is_named_in_time(url: str, server: DatabaseServer) -> None:
    """It accepts, and does not answer."""
    server.freeze()
    try:
        assert ["results.frozen"] == errors(look(url, connect_timeout=2, statement_timeout=2))
    finally:
        server.heal()


def test_nobody_there_is_named(url: str) -> None:
    """Refused, or not known to the name service."""
    place = DatabaseResults(url=url).sqlalchemy_url()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert "refused" in look(place.set(port=closed.getsockname()[1]))["results.unreachable"].what
    assert "name service" in look(place.set(host="no.such.host.invalid"))["results.unreachable"].what


def test_a_mute_server_is_named_in_time(url: str) -> None:
    """Something listens, and it is no database."""
    place = DatabaseResults(url=url).sqlalchemy_url()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        found = look(place.set(port=mute.getsockname()[1]), connect_timeout=2, statement_timeout=2)
    assert ["results.frozen"] == errors(found)


# SQLite.


def test_an_sqlite_file_is_not_made_by_looking(tmp_path: Path) -> None:
    """Nor is its folder."""
    url = f"sqlite:///{tmp_path}/folder/results.db"
    assert [] == errors(look(url))
    assert ["results.tables_missing"] == errors(look(url, create_tables=False))
    assert [] == list(tmp_path.iterdir())


def test_an_sqlite_file_is_looked_at(tmp_path: Path) -> None:
    """Also one with a name that a URL would read otherwise."""
    url = sa.URL.create("sqlite", database=str(tmp_path / "a #%3f.db"))
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        make_tables(connection)
    engine.dispose()
    before = (tmp_path / "a #%3f.db").read_bytes()
    found = look(url)
    assert [] == errors(found)
    assert "results.tables" in found
    assert before == (tmp_path / "a #%3f.db").read_bytes()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    """It is not written over."""
    path = tmp_path / "notes.txt"
    path.write_text("no database at all" * 100)
    assert ["results.database_missing"] == errors(look(f"sqlite:///{path}"))


def test_a_folder_that_cannot_be_one_is_named(tmp_path: Path) -> None:
    """A file where the folder should be."""
    (tmp_path / "file").write_text("")
    assert ["results.permission"] == errors(look(f"sqlite:///{tmp_path}/file/results.db"))


def test_columns_of_plain_celery_that_are_small_are_named_with_the_sql(qbridge_mariadb: MariaDBServer) -> None:
    """MySQL's BLOB and TEXT; once the SQL was run, and in tables of ours, there is nothing to be said."""
    with qbridge_mariadb.heal().fresh() as url, administrator(url) as connection:
        ResultTables().metadata.create_all(connection)
        assert "results.columns_small" not in look(url)
        connection.exec_driver_sql("ALTER TABLE celery_taskmeta MODIFY result BLOB")
        found = look(url)["results.columns_small"]
        assert found.level == "warning"
        assert "65,535 bytes of result:" in found.what
        _, sql = found.todo.split("\n", 1)
        assert sql == "ALTER TABLE celery_taskmeta MODIFY result LONGBLOB;"
        connection.exec_driver_sql(sql)
        assert "results.columns_small" not in look(url)
