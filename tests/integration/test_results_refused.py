"""Outcomes that a database refuses: texts that it cannot hold, values that are too large. None of them is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from qbridge import PayloadError, Retry, TaskFailed
from qbridge.backends.database import DatabaseResults
from qbridge.backends.database.tables import ResultTables
from qbridge.testing.contracts.kit import Contract


@pytest.fixture
def url(database_url: str) -> str:
    """An empty database."""
    return database_url


@pytest.fixture
def contract(url: str, tmp_path: Path) -> Iterator[Contract]:
    """A bridge on a file, with results in a database."""
    made = Contract(f"embedded://{tmp_path / 'bridge.db'}", url, tmp_path)
    yield made
    made.close()


def celerys_columns(url: str) -> None:
    """Make the result tables with the columns that plain Celery gives them on MySQL."""
    engine = sa.create_engine(DatabaseResults(url=url).sqlalchemy_url())
    ResultTables().metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM celery_taskmeta")
        for column, kind in (("result", "BLOB"), ("traceback", "TEXT")):
            connection.exec_driver_sql(f"ALTER TABLE celery_taskmeta MODIFY {column} {kind}")
    engine.dispose()


def alone() -> None:
    raise ValueError("caf\udce9")


def chained() -> None:
    try:
        raise ValueError("caf\udce9")
    except ValueError as error:
        raise LookupError("it was not there") from error


def nul() -> None:
    raise ValueError("a\x00b")


def long() -> None:
    raise ValueError("x" * 70_000)


def long_and_far() -> None:
    raise ValueError("\U0001f600" * 70_000)


# on the others Celery's columns are as ours
PLACES = [("sqlite", False), ("postgresql", False), ("mariadb", False), ("mariadb", True)]


@pytest.mark.parametrize(("database_url", "celerys"), PLACES, indirect=["database_url"])
def test_a_failure_is_stored_whatever_its_text_is(contract: Contract, url: str, celerys: bool) -> None:
    """Lone surrogates, NUL and texts of any length, in tables of ours and in Celery's; the error keeps its type."""
    if celerys:
        celerys_columns(url)
    raising: list[Callable[[], None]] = [alone, chained, nul, long, long_and_far]
    tasks = [contract.bridge.task(name=f.__name__, retry=Retry(on=OSError, attempts=2))(f) for f in raising]
    tracebacks: list[str] = []
    with contract.bridge.worker(pool="thread", concurrency=2):
        results = [task.delay() for task in tasks]
        for result, kind in zip(results, [ValueError, LookupError, ValueError, ValueError, ValueError], strict=True):
            with pytest.raises((kind, TaskFailed)):  # the text may not be that of the exception, as far as it goes
                result.get(timeout=20)
            meta = contract.bridge.celery.backend.get_task_meta(result.id, cache=False)
            assert (meta["status"], meta["error_json"]["exc_type"]) == ("FAILURE", kind.__name__)
            tracebacks.append(meta["traceback"])
    assert "caf\\udce9" in tracebacks[0]
    assert "caf\\udce9" in tracebacks[1]
    assert "LookupError: it was not there" in tracebacks[1]
    assert "a\\x00b" in tracebacks[2]
    assert all("in long" in text and "ValueError" in text for text in tracebacks[3:])


@pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)
def test_a_result_that_is_too_large_for_its_column_says_so(contract: Contract, url: str) -> None:
    """The failure names its size, the column's limit, and the way out; tables of ours have room."""

    def large(size: int) -> str:
        return "x" * size

    task = contract.bridge.task(name="large")(large)
    with contract.bridge.worker(pool="thread", concurrency=1):
        assert len(task.delay(70_000).get(timeout=20)) == 70_000
    celerys_columns(url)
    contract.bridge.celery.backend._layout = None
    with contract.bridge.worker(pool="thread", concurrency=1):
        with pytest.raises(PayloadError, match=r"70,002 bytes.*65,535[\s\S]*ALTER TABLE celery_taskmeta MODIFY result"):
            task.delay(70_000).get(timeout=20)
        assert task.delay(5).get(timeout=20) == "xxxxx"


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
def test_an_outcome_that_the_database_refuses_leaves_a_failure_that_says_so(contract: Contract, url: str) -> None:
    """A column that somebody made too narrow, say."""

    @contract.bridge.task(name="wrong")
    def wrong() -> None:
        raise ValueError("no" * 200)

    with contract.bridge.worker(pool="thread", concurrency=1):
        with pytest.raises(ValueError, match="nono"):
            wrong.delay().get(timeout=20)
        engine = sa.create_engine(DatabaseResults(url=url).sqlalchemy_url())
        modify = "MODIFY traceback VARCHAR(400)" if "m" in url[:1] else "ALTER COLUMN traceback TYPE varchar(400)"
        with engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM celery_taskmeta")
            connection.exec_driver_sql(f"ALTER TABLE celery_taskmeta {modify}")
        engine.dispose()
        result = wrong.delay()
        with pytest.raises(ValueError, match="nono"):
            result.get(timeout=20)
