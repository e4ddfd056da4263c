"""Does every call end in time when a server is stopped, frozen, restarted, emptied; is nothing lost?"""

from __future__ import annotations

import asyncio
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from qbridge import BatchError, Bridge, BridgeConfig, BrokerUnavailable, ResultsUnavailable, ResultTimeout
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract, longest_pause, unblocked
from qbridge.testing.proxy import TcpProxy
from qbridge.testing.waiting import wait_until

PUBLISH_TIMEOUT = 2.0
GET_TIMEOUT = 1.5
#: What a call may take beyond its own bound.
GRACE = 1.0
#: What a loaded machine may add to that.
SLACK = 0.7


def make_bridge(broker: str, results: str = "rpc://", **changes: Any) -> tuple[Bridge, Any]:
    """A bridge with one task and a short publish_timeout."""
    kind: Any = type(BridgeConfig(broker=broker, results="disabled://" if results == "rpc://" else results).broker)
    room = kind.from_url(broker).model_copy(update={"publish_timeout": PUBLISH_TIMEOUT})
    bridge = Bridge(BridgeConfig(broker=room, results=results, **changes))

    @bridge.task(name="faults.add")
    def add(a: int, b: int) -> int:
        return a + b

    return bridge, add


class Trouble:
    """One broker that tests take away and give back."""

    def __init__(self, url: str, stop: Callable[[], None], heal: Callable[[], object]) -> None:
        self.url = url
        self.stop = stop
        self.heal = heal


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process holds the embedded broker's file for writing."""
    script = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN IMMEDIATE'); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "locked\n"
        yield
    finally:
        holder.stdin.close()
        holder.wait(10)
        holder.stdout.close()


@pytest.fixture
def trouble(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Trouble]:
    """A broker that can be stopped, frozen or locked."""
    name, how = request.param
    with ExitStack() as stack:
        if name == "embedded":
            path = tmp_path / "bridge.db"
            held = ExitStack()
            stack.callback(held.close)
            yield Trouble(f"embedded://{path}", lambda: held.enter_context(locked(path)), held.close)
            return
        server = request.getfixturevalue(f"qbridge_{name}")
        stack.callback(server.heal)
        with server.heal().fresh() as url:
            yield Trouble(url, server.stop if how == "stopped" else server.freeze, server.heal)
            server.heal()


def raises_in_time(call: Callable[[], object], *kinds: type[Exception], within: float) -> None:
    began = time.monotonic()
    with pytest.raises(kinds):
        call()
    assert time.monotonic() - began < within + GRACE + SLACK


@pytest.mark.parametrize(
    "trouble",
    [
        ("rabbitmq", "stopped"),
        ("rabbitmq", "frozen"),
        ("redis", "stopped"),
        ("redis", "frozen"),
        ("embedded", "locked"),
    ],
    indirect=True,
    ids="-".join,
)
def test_a_send_without_a_broker_raises_in_time(trouble: Trouble) -> None:
    """BrokerUnavailable within publish_timeout + 1 s: on a new connection and an established one, sync and async."""
    established, established_add = make_bridge(trouble.url, "disabled://")
    fresh, fresh_add = make_bridge(trouble.url, "disabled://")
    fresh_async, fresh_async_add = make_bridge(trouble.url, "disabled://")
    with established, fresh, fresh_async:
        established_add.delay(1, 2)
        asyncio.run(established_add.adelay(1, 2))
        trouble.stop()
        raises_in_time(lambda: established_add.delay(1, 2), BrokerUnavailable, within=PUBLISH_TIMEOUT)
        raises_in_time(lambda: established_add.delay(1, 2), BrokerUnavailable, within=PUBLISH_TIMEOUT)
        raises_in_time(lambda: fresh_add.delay(1, 2), BrokerUnavailable, within=PUBLISH_TIMEOUT)

        async def all_async() -> float:
            async with unblocked() as blocked:
                began = time.monotonic()
                outcomes = await asyncio.gather(
                    established_add.adelay(1, 2), fresh_async_add.adelay(1, 2), return_exceptions=True
                )
                assert time.monotonic() - began < PUBLISH_TIMEOUT + GRACE + SLACK
                assert [type(outcome) for outcome in outcomes] == [BrokerUnavailable, BrokerUnavailable]
            return blocked.longest

        assert longest_pause(lambda: asyncio.run(all_async())) < 0.05
        trouble.heal()
        for add in (established_add, fresh_add, fresh_async_add):
            add.delay(1, 2)


@pytest.mark.parametrize("how", ["stopped", "frozen"])
@pytest.mark.parametrize("results", ["redis", "postgresql", "rpc"])
def test_waiting_on_a_sick_result_server_ends_in_time(
    results: str, how: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """``get`` and ``aget`` raise within their timeout + 1 s; the event loop goes on meanwhile."""
    server = request.getfixturevalue("qbridge_rabbitmq" if results == "rpc" else f"qbridge_{results}")
    with server.heal().fresh() as url:
        broker = url if results == "rpc" else f"embedded://{tmp_path / 'bridge.db'}"
        bridge, add = make_bridge(broker, "rpc://" if results == "rpc" else url)
        late, late_add = make_bridge(broker, "rpc://" if results == "rpc" else url)
        with bridge, late:
            with bridge.worker(pool="solo"):
                assert add.delay(1, 2).get(timeout=20) == 3
            waiting = [add.delay(1, 2) for _ in range(2)]
            never_read = late_add.delay(1, 2)
            try:
                server.stop() if how == "stopped" else server.freeze()
                late_kinds = (ResultTimeout, ResultsUnavailable)
                raises_in_time(lambda: waiting[0].get(timeout=GET_TIMEOUT), *late_kinds, within=GET_TIMEOUT)
                raises_in_time(lambda: never_read.get(timeout=GET_TIMEOUT), *late_kinds, within=GET_TIMEOUT)

                async def wait_async() -> float:
                    async with unblocked() as blocked:
                        began = time.monotonic()
                        outcomes = await asyncio.gather(
                            *(result.aget(timeout=GET_TIMEOUT) for result in [*waiting, never_read]),
                            return_exceptions=True,
                        )
                        assert time.monotonic() - began < GET_TIMEOUT + GRACE + SLACK
                        assert {type(outcome) for outcome in outcomes} <= {ResultTimeout, ResultsUnavailable}
                    return blocked.longest

                assert longest_pause(lambda: asyncio.run(wait_async())) < 0.05
            finally:
                server.heal()


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_a_send_after_a_restart_of_the_broker_works(broker: str, request: pytest.FixtureRequest) -> None:
    """Connections that died with the old server are replaced without a word, and the message arrives."""
    server = request.getfixturevalue(f"qbridge_{broker}")
    with server.heal().fresh() as url:
        bridge, add = make_bridge(url, "disabled://")
        with bridge:
            add.delay(1, 2)
            server.restart()
            sent = add.delay(3, 4)
            found = received_ids(url)
            assert sent.id in found


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_a_send_to_a_frozen_broker_says_that_it_may_have_arrived(broker: str, request: pytest.FixtureRequest) -> None:
    """The server reads the message from its socket once it goes on: to send it again without a word runs it twice."""
    server = request.getfixturevalue(f"qbridge_{broker}")
    with server.heal().fresh() as url:
        bridge, add = make_bridge(url, "disabled://")
        with bridge:
            add.delay(1, 2)
            server.freeze()
            try:
                with pytest.raises(BrokerUnavailable) as caught:
                    add.using(task_id="while-frozen").delay(3, 4)
            finally:
                server.heal()
            assert caught.value.may_have_arrived
            # it reads on when it is well, and may have answered us before that
            wait_until(lambda: "while-frozen" in received_ids(url), 20, what="the message to arrive")


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_a_send_whose_answer_was_lost_says_that_it_may_have_arrived(
    broker: str, request: pytest.FixtureRequest
) -> None:
    """Also if the broker could not be reached any more when it was tried again: that is the last failure, not all."""
    server = request.getfixturevalue(f"qbridge_{broker}")
    with server.heal().fresh() as url, TcpProxy.to(url) as proxy:
        bridge, add = make_bridge(proxy.url(url), "disabled://")
        with bridge:
            add.delay(1, 2)
            proxy.stall()
            dying = threading.Timer(0.5, proxy.refuse)
            dying.start()
            with pytest.raises(BrokerUnavailable) as caught:
                add.delay(3, 4)
            dying.join()
            assert caught.value.may_have_arrived


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_a_send_to_a_stopped_broker_says_that_it_was_not_taken(broker: str, request: pytest.FixtureRequest) -> None:
    """Nobody listens there, so it is safe to send again."""
    server = request.getfixturevalue(f"qbridge_{broker}")
    with server.heal().fresh() as url:
        bridge, add = make_bridge(url, "disabled://")
        server.stop()
        try:
            with bridge, pytest.raises(BrokerUnavailable) as caught:
                add.delay(3, 4)
        finally:
            server.heal()
        assert not caught.value.may_have_arrived


def received_ids(url: str) -> list[str]:
    """Take every message off the queue ``default`` with a bridge of its own; return the task ids."""
    reader, _ = make_bridge(url, "disabled://")
    found = []
    with reader, reader.celery.connection_for_read() as connection:
        bound = reader.celery.amqp.queues["default"].bind(connection.default_channel)
        bound.declare()
        while (message := bound.get()) is not None:
            message.ack()
            found.append(message.headers["id"])
    return found


def test_a_send_to_a_deleted_rabbitmq_queue_is_not_lost(qbridge_rabbitmq: Any) -> None:
    """A queue deleted behind the sender's back is declared again, and the message is in it; the exchange likewise."""
    with qbridge_rabbitmq.heal().fresh() as url:
        vhost = url.rpartition("/")[2]
        bridge, add = make_bridge(url, "disabled://")
        with bridge:
            add.delay(1, 2)
            for path in ("queues/{}/default", "exchanges/{}/qbridge.default"):
                qbridge_rabbitmq.api("DELETE", f"/api/{path.format(vhost)}")
                sent = add.delay(3, 4)
                assert received_ids(url)[-1:] == [sent.id]


def test_a_bulk_to_a_deleted_rabbitmq_queue_is_not_lost(qbridge_rabbitmq: Any) -> None:
    """``send_many`` to a deleted queue declares it again or raises; what it calls sent is there."""
    with qbridge_rabbitmq.heal().fresh() as url:
        vhost = url.rpartition("/")[2]
        bridge, add = make_bridge(url, "disabled://")
        with bridge:
            add.delay(1, 2)
            qbridge_rabbitmq.api("DELETE", f"/api/queues/{vhost}/default")
            told = 20
            try:
                sent = {result.id for result in add.send_many([(number, 1) for number in range(20)])}
            except BatchError as error:
                sent = set(error.confirmed)  # what a server returned as unroutable it acknowledges too
                told = len([*error.confirmed, *error.unsent, *error.uncertain])
            assert sent <= set(received_ids(url))
            assert told == 20


def test_a_send_to_an_emptied_redis_is_not_lost(qbridge_redis: Any) -> None:
    """FLUSHDB takes kombu's bindings with it; the next send, single or bulk, is in the queue all the same."""
    with qbridge_redis.heal().fresh() as url:
        bridge, add = make_bridge(url, "disabled://")
        with bridge, redis.Redis.from_url(url) as client:
            add.delay(1, 2)
            client.flushdb()
            sent = add.delay(3, 4)
            assert received_ids(url) == [sent.id]
            client.flushdb()
            many = add.send_many([(1, 1), (2, 2)])
            assert sorted(received_ids(url)) == sorted(result.id for result in many)


def test_a_send_after_the_embedded_file_was_replaced_is_not_lost(tmp_path: Path) -> None:
    """Deleting the file takes the queues with it; the next send makes a new one, and the message is in it."""
    path = tmp_path / "bridge.db"
    bridge, add = make_bridge(f"embedded://{path}", "disabled://")
    with bridge:
        add.delay(1, 2)
        for file in tmp_path.glob("bridge.db*"):
            if file.is_file():
                file.unlink()
        sent = add.delay(3, 4)
        assert received_ids(f"embedded://{path}") == [sent.id]
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.fixture
def on_rabbitmq(qbridge_rabbitmq: Any, tmp_path: Path) -> Iterator[Contract]:
    """A pair on RabbitMQ, with files of its own."""
    with qbridge_rabbitmq.heal().fresh() as url:
        contract = Contract(url, f"sqlite:///{tmp_path / 'results.db'}", tmp_path)
        yield contract
        contract.close()


def drain_rate(contract: Contract, count: int, **worker: Any) -> float:
    """Fill a queue, start a worker, and return how many tasks a second it ran between the first and the last."""
    path = contract.path()
    contract.tasks.jot.using(queue="fragile").send_many([(str(path),)] * count)
    with contract.worker_of("fragile", **worker) as process:
        wait_until(lambda: len(runs(path)) == count, 60, what="the queue to be drained", interval=0.05)
        log = process.log.read_text()
    assert "mingle" not in log  # a second before the first task
    times = [when for _, when, _ in runs(path)]
    return (count - 1) / (max(times) - min(times))


def test_the_solo_pool_does_not_stall_with_a_prefetch_of_one(on_rabbitmq: Contract) -> None:
    """Plain Celery 5.7 runs 2 to 35 tasks a second here."""
    assert drain_rate(on_rabbitmq, 400, pool="solo") > 200


def test_gevent_does_not_wait_for_heartbeats_after_each_message(on_rabbitmq: Contract) -> None:
    """``celery -P gevent`` on ``bridge.celery``; plain Celery 5.7 runs 17 tasks a second here."""
    pytest.importorskip("gevent")
    assert on_rabbitmq.bridge.celery.conf.broker_heartbeat > 0
    assert drain_rate(on_rabbitmq, 300, celery=["-P", "gevent", "-c", "20"]) > 100


def test_a_silent_rabbitmq_is_given_thirty_seconds(qbridge_rabbitmq: Any) -> None:
    """TCP_USER_TIMEOUT is ours: py-amqp's one second ends a publisher under flow control."""
    if not hasattr(socket, "TCP_USER_TIMEOUT"):
        pytest.skip("this system has no TCP_USER_TIMEOUT")
    with qbridge_rabbitmq.heal().fresh() as url:
        bridge, add = make_bridge(url, "disabled://")
        with bridge:
            add.delay(1, 2)
            with bridge.celery.pool.acquire(block=True) as pooled, bridge.celery.connection_for_read() as consuming:
                for connection in (pooled, consuming):
                    sock = connection.connection.transport.sock
                    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
