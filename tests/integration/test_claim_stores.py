"""Claims in Redis, PostgreSQL, MariaDB and SQLite: one holder at a time, whatever the number of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import celery
import pytest
import sqlalchemy as sa

from qbridge.backends.claims import ANYBODY, ClaimStore, Wanted, claim_store
from qbridge.celery_app import RESULT_BACKENDS
from qbridge.exceptions import ConfigurationError


@contextmanager
def store_on(url: str, **settings: Any) -> Iterator[ClaimStore]:
    """A store of this process, on a result backend that is closed at the end."""
    app = celery.Celery("t", broker="memory://", set_as_current=False)
    app.loader.override_backends = dict(RESULT_BACKENDS)
    app.conf.update(result_backend=url, **settings)
    with closing(app.backend):
        store = claim_store(app.backend)
        assert store is not None
        yield store


@pytest.fixture(params=["redis", "sqlite", "postgresql", "mariadb"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty server or file."""
    if request.param == "sqlite":
        yield f"db+sqlite:///{tmp_path / 'results.db'}"
        return
    with request.getfixturevalue(f"qbridge_{request.param}").heal().fresh() as fresh:
        yield fresh if request.param == "redis" else f"db+{fresh}"


@pytest.fixture
def store(url: str) -> Iterator[ClaimStore]:
    """A store."""
    with store_on(url) as store:
        yield store


def in_processes(number: int, act: Callable[[int], str]) -> list[str]:
    """Run something in forked children at once, and return what each returned."""
    pipes = []
    for index in range(number):
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                os.write(writer, act(index).encode())
            finally:
                os._exit(0)
        os.close(writer)
        pipes.append(reader)
    answers = []
    for reader in pipes:
        with open(reader, "rb") as pipe:
            answers.append(pipe.read().decode())
    for _ in range(number):
        os.wait()
    return answers


def test_one_of_many_processes_gets_a_free_claim(url: str) -> None:
    """Four of them want five keys at once: each key has one holder, and all of them are told the same one."""

    def want(index: int) -> str:
        with store_on(url) as store:
            wanted = [Wanted(f"key-{number}", f"process-{index}", 60) for number in range(5)]
            return " ".join(claim.holder for claim in store.take("run", wanted))

    answers = {tuple(answer.split()) for answer in in_processes(4, want)}
    assert 1 == len(answers)
    assert 5 == len(answers.pop())


def test_a_claim_is_extended_by_its_holder_and_taken_when_it_has_ended(store: ClaimStore) -> None:
    """The token grows with each new holder, and only then; what has ended is anybody's."""
    (first,) = store.take("run", [Wanted("k", "a", 0.3, note="of a")])
    assert ("a", 1, "of a") == (first.holder, first.token, first.note)
    (held,) = store.take("run", [Wanted("k", "b", 60)])
    assert ("a", 1) == (held.holder, held.token)
    assert 0 < held.left <= 0.3
    (extended,) = store.take("run", [Wanted("k", "a", 0.2)])
    assert ("a", 1, "of a") == (extended.holder, extended.token, extended.note)
    time.sleep(0.25)  # the lease
    (taken,) = store.take("run", [Wanted("k", "b", 60)])
    assert ("b", 2, "") == (taken.holder, taken.token, taken.note)
    (late,) = store.take("run", [Wanted("k", "a", 60)])
    assert ("b", 2) == (late.holder, late.token)
    store.release("run", "k", "a")
    found = store.look("run", "k")
    assert found is not None
    assert found.left > 0, "it is not a's any more"
    store.release("run", "k", "b")
    (again,) = store.take("run", [Wanted("k", "c", 60)])
    assert ("c", 3) == (again.holder, again.token)
    assert store.look("once", "k") is None
    assert store.look("run", "other") is None


def test_who_took_it_later_keeps_it(store: ClaimStore) -> None:
    """A holder that acted as if it had the key is told who came after it, even if that one is through."""
    store.take("run", [Wanted("k", "later", 60)])
    store.release("run", "k", "later")
    (refused,) = store.take("run", [Wanted("k", "older", 60, running=30)])
    assert "later" == refused.holder
    (fine,) = store.take("run", [Wanted("k", "newest", 60, running=0)])
    assert ("newest", 2) == (fine.holder, fine.token)


def test_a_claim_is_taken_over_from_whom_one_names(store: ClaimStore) -> None:
    """From that holder and from no other; from anybody, if one says so."""
    store.take("once", [Wanted("k", "a", 60)])
    (kept,) = store.take("once", [Wanted("k", "b", 60, over="c")])
    assert "a" == kept.holder
    (taken,) = store.take("once", [Wanted("k", "b", 60, over="a")])
    assert ("b", 2) == (taken.holder, taken.token)
    (taken,) = store.take("once", [Wanted("k", "c", 60, over=ANYBODY)])
    assert ("c", 3) == (taken.holder, taken.token)


def test_revocations_are_kept(url: str) -> None:
    """Each process sees them all, or those since it last asked."""
    with store_on(url) as store, store_on(url) as other:
        nothing, moment = other.revoked_since(0)
        assert [] == nothing
        store.revoke("one")
        store.revoke("one")
        seen, moment = other.revoked_since(moment)
        assert ["one"] == seen
        time.sleep(0.01)
        store.revoke("two")
        seen, _ = other.revoked_since(moment)
        assert "two" in seen
        assert {"one", "two"} == set(other.revoked_since(0)[0])
        assert other.is_revoked("one")
        assert not other.is_revoked("three")


def test_a_table_that_may_not_be_made_is_asked_for(tmp_path: Path) -> None:
    """With the statement that makes it; a cleanup does not ask."""
    url = f"db+sqlite:///{tmp_path / 'results.db'}"
    settings = {"database_create_tables_at_setup": False}
    with store_on(url, **settings) as store:
        with pytest.raises(ConfigurationError, match="CREATE TABLE qbridge_claim") as caught:
            store.look("run", "k")
        engine = sa.create_engine(url.removeprefix("db+"))
        with engine.begin() as connection:
            for statement in caught.value.todo.partition("\n")[2].split(";"):
                if statement.strip():
                    connection.execute(sa.text(statement))
        engine.dispose()
        assert store.look("run", "k") is None
