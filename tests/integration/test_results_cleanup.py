"""Results that have expired leave a database although no beat runs: removed by workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from qbridge import Bridge, BridgeConfig, DatabaseResults
from qbridge.testing.waiting import wait_until


@pytest.fixture
def url(database_url: str) -> str:
    """An empty database."""
    return database_url


@pytest.fixture
def make(url: str, tmp_path: Path) -> Iterator[Callable[..., Bridge]]:
    """A bridge whose results are there."""
    made: list[Bridge] = []

    def bridge(**results: float | None) -> Bridge:
        config = BridgeConfig(
            broker=f"embedded://{tmp_path}/broker.db", results=DatabaseResults(url=url, expires=100, **results)
        )
        made.append(Bridge(config))
        return made[-1]

    yield bridge
    for one in made:
        one.close()


def age(bridge: Bridge, task_id: str) -> None:
    """Let a stored result be two hundred seconds old."""
    backend = bridge.celery.backend
    task = backend.tables.task
    when = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=200)
    with backend.engine.begin() as connection:
        connection.execute(sa.update(task).where(task.c.task_id == task_id).values(date_done=when))


def stored(bridge: Bridge) -> set[str]:
    """Ids of stored results."""
    backend = bridge.celery.backend
    with backend.engine.connect() as connection:
        return set(connection.execute(sa.select(backend.tables.task.c.task_id)).scalars())


def test_a_worker_removes_what_has_expired(make: Callable[..., Bridge]) -> None:
    """The old one goes without anybody's asking, the fresh one stays."""
    bridge = make(cleanup_interval=0.2)

    @bridge.task
    def echo(number: int) -> int:
        return number

    with bridge.worker(pool="solo"):
        old, fresh = echo.delay(1), echo.delay(2)
        assert [old.get(timeout=20), fresh.get(timeout=20)] == [1, 2]
        age(bridge, old.id)
        wait_until(lambda: stored(bridge) == {fresh.id}, 20, what="the removal")
        assert echo.delay(3).get(timeout=20) == 3


def test_an_account_that_may_not_delete_is_named_once(
    make: Callable[..., Bridge], caplog: pytest.LogCaptureFixture
) -> None:
    """With the setting that ends it; tasks go on. The table is away, which every database answers with an error."""
    bridge = make(cleanup_interval=0.1)

    @bridge.task(results=False)
    def quiet(number: int) -> None:
        return None

    backend = bridge.celery.backend
    bridge.celery.conf.database_create_tables_at_setup = False
    caplog.set_level(logging.DEBUG)
    with bridge.worker(pool="solo"):
        quiet.delay(1)
        said = "Cannot remove expired results"
        wait_until(
            lambda: sum(said in record.getMessage() for record in caplog.records) >= 3, 30, what="three attempts"
        )
    levels = [record.levelname for record in caplog.records if said in record.getMessage()]
    assert levels.count("WARNING") == 1
    assert "cleanup_interval=None" in next(r.getMessage() for r in caplog.records if said in r.getMessage())
    assert backend.as_uri() in caplog.text


def test_none_leaves_it_to_others(make: Callable[..., Bridge]) -> None:
    """There is no thread that removes anything."""
    from qbridge.worker.cleanup import Cleanup

    bridge = make(cleanup_interval=None)
    cleanup = Cleanup(bridge.celery)
    cleanup.start()
    assert cleanup._thread is None
