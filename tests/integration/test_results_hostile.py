"""Results that somebody else has put in the result backend, or damaged there: each fails its own waiter, at once."""

# long because: it is everything that can be wrong with a stored result, on each backend, by each way to wait.

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from kombu import Connection
from kombu.exceptions import DecodeError

from qbridge import Bridge, BridgeConfig, PayloadError, TaskFailed
from qbridge.backends.database import DatabaseResults
from qbridge.exceptions import ResultsUnavailable
from qbridge.serialization.keys import new_key
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.servers import MariaDBServer, PostgreSQLServer, RedisServer
from qbridge.testing.waiting import wait_until

AT_ONCE = 3.0  # seconds; less than any timeout here
TIMEOUT = 8.0


@pytest.fixture
def redis_url(qbridge_redis: RedisServer) -> Iterator[str]:
    """An empty Redis database."""
    with qbridge_redis.heal().fresh() as fresh:
        yield fresh


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    """Somebody else at the same Redis."""
    with closing(redis.Redis.from_url(redis_url)) as client:
        yield client


@pytest.fixture
def on_redis(redis_url: str, tmp_path: Path) -> Iterator[Contract]:
    """A bridge on a file, with results in Redis."""
    with closing(Contract(f"embedded://{tmp_path / 'bridge.db'}", redis_url, tmp_path)) as made:
        yield made


@pytest.fixture
def on_rpc(redis_url: str, tmp_path: Path) -> Iterator[Contract]:
    """A bridge whose results come back over its broker."""
    with closing(Contract(redis_url, "rpc://", tmp_path)) as made:
        yield made


def key_of(task_id: str) -> str:
    return f"celery-task-meta-{task_id}"


def forged(task_id: Any, **changes: Any) -> bytes:
    meta = {"task_id": task_id, "status": "SUCCESS", "result": 1, "traceback": None, "children": [], **changes}
    return json.dumps({name: value for name, value in meta.items() if value != "left out"}).encode()


def failure(module: str, name: str) -> dict[str, Any]:
    return {"status": "FAILURE", "result": {"exc_type": name, "exc_module": module, "exc_message": []}}


# -- what lies where a task's outcome is to be stored


def put_hash(client: Any, key: str) -> None:
    client.hset(key, "a", "b")


def put_list(client: Any, key: str) -> None:
    client.lpush(key, "x")


def put_text(client: Any, key: str) -> None:
    client.set(key, "[1]")


def put_damaged(client: Any, key: str) -> None:
    client.set(key, b"\x00celery-compressed\x00application/x-gzip\x00nonsense")


def put_no_status(client: Any, key: str) -> None:
    client.set(key, forged(key, status="left out"))


def test_what_lies_under_a_tasks_key_in_redis_gives_way_to_its_outcome(on_redis: Contract, client: Any) -> None:
    """Each task runs once, and the log says what was replaced."""
    put = [put_hash, put_list, put_text, put_damaged, put_no_status]
    paths = [on_redis.path() for _ in put]
    results = [on_redis.tasks.note.using(queue="fragile").delay(str(path), "w") for path in paths]
    for lay, result in zip(put, results, strict=True):
        lay(client, key_of(result.id))
    last = on_redis.tasks.note.using(queue="fragile").delay(str(on_redis.path()), "last")
    with on_redis.worker_of("fragile", pool="solo") as worker:
        assert last.get(timeout=TIMEOUT) == "last"
        assert [result.get(timeout=TIMEOUT) for result in results] == ["w"] * len(put)
        assert [len(runs(path)) for path in paths] == [1] * len(put)
        log = worker.log.read_text()
    assert log.count("held no string: it is somebody else's, and the task's result replaces it") == 2
    assert log.count("cannot be read, and its new state replaces it") == 3


def test_a_stored_success_is_not_written_over(on_redis: Contract) -> None:
    """What gives way is what nobody can read, not an outcome."""
    backend = on_redis.bridge.celery.backend
    backend.store_result("id-1", 1, "SUCCESS")
    backend.store_result("id-1", 2, "SUCCESS")
    assert backend.get_task_meta("id-1")["result"] == 1


def test_a_message_that_goes_back_for_its_outcomes_sake_rests_first(on_redis: Contract, client: Any) -> None:
    """A result backend that refuses at once does not make a task run in a circle as fast as its worker can."""
    path = on_redis.path()
    with on_redis.worker_of("fragile", pool="solo"):
        client.config_set("maxmemory", "1")
        try:
            result = on_redis.tasks.note.using(queue="fragile").delay(str(path), "w")
            wait_until(lambda: len(runs(path)) > 1, 10, what="two runs")  # no claim keeps the second from running
        finally:
            client.config_set("maxmemory", "0")
        assert result.get(timeout=30) == "w"
    began = [when for _, when, _ in runs(path)]
    assert all(later - earlier > 0.9 for earlier, later in pairwise(began))


# -- rows that cannot be read

ROWS = [
    ("sqlite", "'SUCCESS'", "'nonsense'"),
    ("sqlite", "'SUCCESS'", "5"),
    ("sqlite", "'SUCCESS'", "CAST(x'ff' AS TEXT)"),
    ("sqlite", "NULL", "NULL"),
    ("postgresql", "'SUCCESS'", "'infinity'"),
    ("postgresql", "NULL", "NULL"),
    ("mariadb", "NULL", "NULL"),
]


@pytest.mark.parametrize(("kind", "status", "done"), ROWS)
def test_a_row_that_cannot_be_read_fails_its_own_waiter_at_once(
    kind: str, status: str, done: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The error names the task; others that wait in the same process get their results."""
    if kind == "sqlite":
        unreadable_row(f"sqlite:///{tmp_path / 'results.db'}", status, done, tmp_path)
        return
    server: PostgreSQLServer | MariaDBServer = request.getfixturevalue(f"qbridge_{kind}")
    with server.heal().fresh() as url:
        unreadable_row(url, status, done, tmp_path)


def unreadable_row(url: str, status: str, done: str, folder: Path) -> None:
    engine = sa.create_engine(DatabaseResults(url=url).sqlalchemy_url())
    with closing(Contract(f"embedded://{folder / 'bridge.db'}", url, folder)) as contract:
        note = contract.tasks.note.using(queue="idle")
        bad, *good = [note.delay(str(contract.path())) for _ in range(6)]
        backend = contract.bridge.celery.backend
        assert bad.state == "PENDING"  # the tables are there
        with ThreadPoolExecutor(8) as threads:
            waiting = [threads.submit(result.get, timeout=TIMEOUT) for result in good]
            with engine.begin() as connection:
                connection.exec_driver_sql(
                    "INSERT INTO celery_taskmeta (id, task_id, status, result, date_done) "
                    f"VALUES (99999, '{bad.id}', {status}, NULL, {done})"
                )
            began = time.monotonic()
            with pytest.raises(PayloadError, match=bad.id):
                bad.get(timeout=TIMEOUT)
            assert time.monotonic() - began < AT_ONCE
            with pytest.raises(PayloadError, match=bad.id):
                _ = bad.state
            with pytest.raises((PayloadError, DecodeError)):
                backend.get_task_meta(bad.id)
            assert not any(each.done() for each in waiting)
            for result in good:
                backend.store_result(result.id, "w", "SUCCESS")
            assert [each.result(AT_ONCE) for each in waiting] == ["w"] * len(good)
        found = backend.get_many_meta([bad.id, *(result.id for result in good)])
        assert {id_ for id_, meta in found.items() if isinstance(meta, Exception)} == {bad.id}
        assert len(found) == 6
    engine.dispose()


def test_a_wait_for_a_backend_that_is_away_ends_in_time(tmp_path: Path) -> None:
    """Also if the backend was never seen; only a timeout shorter than a first look is stretched."""
    with closing(Contract(f"embedded://{tmp_path / 'bridge.db'}", "redis://127.0.0.1:1/0", tmp_path)) as contract:
        result = contract.tasks.note.using(queue="idle").delay(str(contract.path()))
        began = time.monotonic()
        with pytest.raises(ResultsUnavailable):
            result.get(timeout=1.2)
        assert time.monotonic() - began < 1.7


# -- metas that are none

DAMAGED: list[dict[str, Any]] = [
    {"status": "left out"},
    {"status": ["SUCCESS"]},
    {"status": {}},
    {"status": None},
    {"status": "FAILURE", "result": [1]},
    {"status": "FAILURE", "result": "text"},
    {"status": "FAILURE", "result": 5},
]
SIGNALS = [
    ("builtins", "StopIteration"),
    ("builtins", "StopAsyncIteration"),
    ("celery.exceptions", "Ignore"),
    ("celery.exceptions", "Reject"),
    ("celery.exceptions", "Retry"),
    ("qbridge.backends.storing", "OutcomeNotStored"),
]


@pytest.fixture(params=["key", "channel", "rpc"])
def forge(request: pytest.FixtureRequest, client: Any, redis_url: str) -> Callable[[dict[str, Any]], Callable[[], Any]]:
    """Send a task that nobody runs, put something in place of its outcome, and return its ``get``."""
    contract: Contract = request.getfixturevalue("on_rpc" if request.param == "rpc" else "on_redis")

    def make(changes: dict[str, Any]) -> Callable[[], Any]:
        result = contract.tasks.note.using(queue="idle").delay(str(contract.path()))
        body = forged(result.id, **changes)
        if request.param == "key":
            client.set(key_of(result.id), body)
        elif request.param == "channel":

            def publish() -> None:
                wait_until(lambda: client.publish(key_of(result.id), body), TIMEOUT, what="a waiter")

            threading.Thread(target=publish).start()
        else:
            reply(contract, redis_url, result.id, body)
        return lambda: result.get(timeout=TIMEOUT)

    return make


def reply(contract: Contract, url: str, task_id: str, body: bytes) -> None:
    with Connection(url) as connection:
        answer(connection, contract.bridge.celery.backend.oid, task_id, body)


def answer(connection: Connection, address: str, task_id: str, body: bytes) -> None:
    connection.Producer().publish(
        body,
        exchange="",
        routing_key=address,
        content_type="application/json",
        content_encoding="utf-8",
        correlation_id=task_id,
    )


def test_a_meta_that_is_none_is_a_payload_error_at_once(
    forge: Callable[[dict[str, Any]], Callable[[], Any]],
) -> None:
    """Without a status, or with a failure that is no mapping."""
    for changes in DAMAGED:
        get = forge(changes)
        began = time.monotonic()
        with pytest.raises(PayloadError, match="cannot be read"):
            get()
        assert time.monotonic() - began < AT_ONCE, changes


def test_a_stored_signal_is_not_raised_in_who_waits(
    forge: Callable[[dict[str, Any]], Callable[[], Any]],
) -> None:
    """StopIteration would end the caller's generator, Ignore its task; other builtin types come as they are."""
    for module, name in SIGNALS:
        with pytest.raises(TaskFailed) as caught:
            forge(failure(module, name))()
        assert caught.value.type_name.endswith(name)
    with pytest.raises(KeyError):
        forge(failure("builtins", "KeyError"))()


def test_what_is_told_of_an_attempt_or_of_progress_may_be_nonsense(on_redis: Contract, client: Any) -> None:
    """Then nothing is known of it."""
    result = on_redis.tasks.note.using(queue="idle").delay(str(on_redis.path()))
    for told in ({}, {"attempt": [], "next_at": 1}, {"attempt": 1, "next_at": 1e300}, {"attempt": 1, "next_at": "x"}):
        client.set(key_of(result.id), forged(result.id, status="RETRY", result={"exc_type": "X", "retry": told}))
        assert result.retrying() is None
    for told in ({"done": "x", "total": 2}, {"done": 1, "total": []}, {"done": 1}):
        client.set(key_of(result.id), forged(result.id, status="PROGRESS", result=told))
        assert result.progress() is None


# -- Celery's own ways to wait, where one thread may read what another one waits for

READY: dict[str, Any] = {
    "no JSON": b"{",
    "no mapping": b"[1]",
    "no status": {"status": "left out"},
    "children that are a number": {"children": 5},
    "children that are none": {"children": [[]]},
    "pairs in pairs without an end": {"children": [[["x", [["y", None]] * 3], [["z"]]]]},
}
"""What is stored, or what of a meta is otherwise."""


def wait_for_a_waiter(client: Any, *task_ids: str) -> None:
    keys = [key_of(task_id) for task_id in task_ids]
    wait_until(lambda: all(number for _, number in client.pubsub_numsub(*keys)), TIMEOUT, what="somebody to wait")


def damaged(task_id: str, what: Any) -> bytes:
    return what if isinstance(what, bytes) else forged(task_id, **what)


@pytest.mark.parametrize("where", ["key", "channel", "both"])
def test_a_damaged_outcome_in_redis_ends_the_wait_of_no_other(on_redis: Contract, client: Any, where: str) -> None:
    """Its own waiter gets the error at once, whoever has read it."""
    app, note = on_redis.bridge.celery, on_redis.tasks.note.using(queue="idle")
    good = note.delay(str(on_redis.path())).id
    with ThreadPoolExecutor(8) as threads:
        others = [threads.submit(app.AsyncResult(good).get, timeout=60) for _ in range(2)]
        for what in READY.values():
            bad = note.delay(str(on_redis.path())).id
            waiting = threads.submit(app.AsyncResult(bad).get, timeout=TIMEOUT)
            wait_for_a_waiter(client, bad)
            if where != "channel":
                client.set(key_of(bad), damaged(bad, what))
            if where != "key":
                client.publish(key_of(bad), damaged(bad, what))
            assert isinstance(waiting.exception(AT_ONCE), DecodeError), what
        assert not any(each.done() for each in others)
        app.backend.store_result(good, "w", "SUCCESS")
        assert [each.result(AT_ONCE) for each in others] == ["w", "w"]


def test_what_is_said_on_a_tasks_channel_is_said_of_that_task(on_redis: Contract, client: Any) -> None:
    """Whatever id it has, and also if it has none."""
    app, note = on_redis.bridge.celery, on_redis.tasks.note.using(queue="idle")
    good = note.delay(str(on_redis.path())).id
    with ThreadPoolExecutor(4) as threads:
        other = threads.submit(app.AsyncResult(good).get, timeout=60)
        for told in (good, "left out", [good], 5):
            for where in ("channel", "key"):
                bad = note.delay(str(on_redis.path())).id
                waiting = threads.submit(app.AsyncResult(bad).get, timeout=TIMEOUT)
                wait_for_a_waiter(client, bad)
                (client.publish if where == "channel" else client.set)(key_of(bad), forged(told))
                assert waiting.result(AT_ONCE) == 1
        assert not other.done()
        app.backend.store_result(good, "w", "SUCCESS")
        assert other.result(AT_ONCE) == "w"


def test_a_subscription_is_made_again_whatever_is_stored(on_redis: Contract, client: Any) -> None:
    """Celery reads what its waiters wait for then, before it goes on."""
    app, note = on_redis.bridge.celery, on_redis.tasks.note.using(queue="idle")
    good, bad = (note.delay(str(on_redis.path())).id for _ in range(2))
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(app.AsyncResult(each).get, timeout=TIMEOUT) for each in (bad, good)]
        wait_for_a_waiter(client, bad, good)
        with client.pipeline() as pipe:
            pipe.set(key_of(bad), b"{")
            pipe.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            pipe.execute()
        assert isinstance(waiting[0].exception(AT_ONCE), DecodeError)
        app.backend.store_result(good, "w", "SUCCESS")
        assert waiting[1].result(AT_ONCE) == "w"


@pytest.mark.parametrize("results", ["redis", "rpc"])
def test_with_keys_a_forged_outcome_ends_the_wait_of_no_other(redis_url: str, client: Any, results: str) -> None:
    """Also if it is read where another one is waited for."""
    keys = {"signing_keys": [new_key("sign")]}
    results = redis_url if results == "redis" else "rpc://"
    with Bridge(BridgeConfig(broker=redis_url, results=results, serialization=keys)) as bridge:

        @bridge.task(name="idle", queue="idle")
        def idle() -> None: ...

        app, good, bad = bridge.celery, idle.delay().id, idle.delay().id
        heard: list[Any] = []
        app.AsyncResult(bad).then(heard.append, on_error=heard.append)
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(app.AsyncResult(good).get, timeout=TIMEOUT)
            if results == "rpc://":
                with Connection(redis_url) as connection:
                    answer(connection, app.backend.oid, bad, forged(bad))
                    wait_until(lambda: heard, TIMEOUT, what="the forged reply")
                    signed = app.backend._reply(good, "SUCCESS", "w", None, None)
                    answer(connection, app.backend.oid, good, json.dumps(signed).encode())
            else:
                wait_for_a_waiter(client, good, bad)
                client.publish(key_of(bad), forged(bad))
                wait_until(lambda: heard, TIMEOUT, what="the forged outcome")
                app.backend.store_result(good, "w", "SUCCESS")
            assert other.result(AT_ONCE) == "w"
        assert [(bad, "FAILURE", PayloadError)] == [(each.id, each.state, type(each.result)) for each in heard]


@pytest.mark.parametrize("what", READY)
def test_a_damaged_reply_reaches_its_own_listener_and_no_other(on_rpc: Contract, redis_url: str, what: str) -> None:
    """Through Celery's ``then``, which is called where replies arrive."""
    app = on_rpc.bridge.celery
    note = on_rpc.tasks.note.using(queue="idle")
    bad, good = note.delay(str(on_rpc.path())), note.delay(str(on_rpc.path()))
    heard: list[Any] = []
    for result in (bad, good):
        app.AsyncResult(result.id).then(heard.append, on_error=heard.append)
    reply(on_rpc, redis_url, bad.id, damaged(bad.id, READY[what]))
    wait_until(lambda: len(heard) == 1, TIMEOUT, what="the damaged reply")
    reply(on_rpc, redis_url, good.id, forged(good.id, result="w"))
    wait_until(lambda: len(heard) == 2, TIMEOUT, what="the good reply")
    assert [(each.id, each.state) for each in heard] == [(bad.id, "FAILURE"), (good.id, "SUCCESS")]


@pytest.mark.parametrize("told", [True, False], ids=["with on_message", "without"])
def test_a_damaged_reply_in_a_group_is_the_failure_of_that_one(on_rpc: Contract, redis_url: str, told: bool) -> None:
    """Also where somebody wants to be told of each message."""
    app, note = on_rpc.bridge.celery, on_rpc.tasks.note.using(queue="idle")
    bad, good = note.delay(str(on_rpc.path())), note.delay(str(on_rpc.path()))
    heard: list[Any] = []
    group = app.GroupResult("g", [app.AsyncResult(bad.id), app.AsyncResult(good.id)])
    reply(on_rpc, redis_url, bad.id, b"[1]")
    reply(on_rpc, redis_url, good.id, forged(good.id, result="w"))
    found = group.get(timeout=TIMEOUT, propagate=False, on_message=heard.append if told else None)
    assert isinstance(found[0], DecodeError)
    assert found[1] == "w"
    assert {(each["task_id"], each["status"]) for each in heard} == (
        {(bad.id, "FAILURE"), (good.id, "SUCCESS")} if told else set()
    )
