"""What becomes of a task that runs in a thread when its worker's connection to Redis breaks? It stays that worker's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.proxy import TcpProxy
from qbridge.testing.servers import RedisServer
from qbridge.testing.waiting import wait_until

LEASE = 1.5
QUEUE = "fragile"


@pytest.fixture
def server(qbridge_redis: RedisServer) -> Iterator[str]:
    """An empty Redis."""
    with qbridge_redis.heal().fresh() as url:
        yield url


@pytest.fixture
def proxy(server: str) -> Iterator[TcpProxy]:
    """What the first worker's connections go through."""
    with TcpProxy.to(server) as proxy:
        yield proxy


@pytest.fixture
def contract(server: str, tmp_path: Path) -> Iterator[Contract]:
    """A bridge and workers."""
    contract = Contract(server, server, tmp_path)
    try:
        yield contract
    finally:
        contract.close()


def through(contract: Contract, proxy: TcpProxy) -> dict[str, str]:
    """Settings of a worker whose connection can be cut."""
    return {
        "QBRIDGE_BROKER": proxy.url(contract.bridge.config.broker.celery_url()),
        "QBRIDGE_BROKER__LEASE": str(LEASE),
    }


def rescuer(contract: Contract) -> Any:
    """Another worker, in this process."""
    bridge = contract.another_bridge(broker={"lease": LEASE})
    contract.declare_on(bridge)
    return bridge.worker(pool="thread", concurrency=2, queues=[QUEUE])


def test_a_thread_keeps_its_message_when_the_connection_breaks(contract: Contract, proxy: TcpProxy) -> None:
    """Beside an idle worker the task runs once, for longer than the lease; then its message is acknowledged."""
    path, release = contract.path(), contract.path("release")
    with contract.worker_of(QUEUE, pool="thread", concurrency=2, settings=through(contract, proxy)) as worker:
        held = [contract.tasks.hold.using(queue=QUEUE).delay(str(path), str(release)) for _ in range(2)]
        wait_until(lambda: len(runs(path)) == 2, 20, what="the tasks to run")
        with rescuer(contract):
            for _ in range(2):
                proxy.cut()
                time.sleep(LEASE)  # the length of the fault
            release.touch()
            assert [2, 2] == [result.get(timeout=20) for result in held]
        with RedisServer.at(contract.bridge.config.broker.celery_url()).client() as client:
            wait_until(lambda: not client.hlen("qbridge.claims"), 10, what="the acknowledgements")
            assert not client.hlen("unacked")
            wait_until(lambda: client.zcard("qbridge.holders") <= 2, 10, what="the goodbyes")
        worker.ask_to_stop()
        assert worker.wait(20) == 0
    assert 2 == len(runs(path))


@pytest.mark.parametrize("pool", ["thread", "process"])
def test_a_connection_that_is_lost_without_a_word_is_noticed_within_the_lease(
    pool: str, contract: Contract, proxy: TcpProxy
) -> None:
    """No FIN and no reset comes; the worker connects again, and runs what is sent; kombu looks after 26 to 51 s."""
    settings = {**through(contract, proxy), "QBRIDGE_BROKER__LEASE": "8", "QBRIDGE_BROKER__PUBLISH_TIMEOUT": "4"}
    with contract.worker_of(QUEUE, pool=pool, concurrency=2, settings=settings):
        path = contract.path()
        contract.tasks.note.using(queue=QUEUE).delay(str(path), "before").get(timeout=20)
        proxy.lose()
        lost = time.monotonic()
        contract.tasks.note.using(queue=QUEUE).delay(str(path), "after").get(timeout=60)
        assert time.monotonic() - lost < 8
    assert 2 == len(runs(path))


def test_a_frozen_server_is_not_left(contract: Contract, proxy: TcpProxy) -> None:
    """It answers nobody: a new connection would not help, and a task of a process would be ended for nothing."""
    path, release = contract.path(), contract.path("release")
    with contract.worker_of(QUEUE, pool="process", concurrency=1, settings=through(contract, proxy)) as worker:
        result = contract.tasks.hold.using(queue=QUEUE).delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        proxy.stall()
        time.sleep(4)  # the length of the fault: longer than an answer may be late
        proxy.resume()
        time.sleep(2)  # in which it would connect again
        release.touch()
        assert 1 == result.get(timeout=20)
        assert "onnecting again" not in worker.log.read_text()
    assert 1 == len(runs(path))


def test_a_kept_message_is_taken_over_when_its_worker_dies(contract: Contract, proxy: TcpProxy) -> None:
    """The lease on it is as short as any: a worker that is killed after a broken connection loses it in time."""
    path, release = contract.path(), contract.path("release")
    with contract.worker_of(QUEUE, pool="thread", concurrency=2, settings=through(contract, proxy)) as worker:
        result = contract.tasks.hold.using(queue=QUEUE).delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        proxy.cut()
        wait_until(lambda: "keep 1 messages claimed" in worker.log.read_text(), 10, what="the message to be kept")
        with rescuer(contract):
            time.sleep(2 * LEASE)  # nobody takes it while the worker lives
            assert 1 == len(runs(path))
            os.kill(worker.pid, signal.SIGKILL)
            wait_until(lambda: len(runs(path)) == 2, LEASE + 5, what="the second run")
            release.touch()
            assert 2 == result.get(timeout=20)
