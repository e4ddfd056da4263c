"""What becomes of a run on RabbitMQ whose worker is cut off, killed or stopped: is there a second one beside it?"""

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
from qbridge.testing.servers import RabbitMQServer, RedisServer
from qbridge.testing.waiting import wait_until

QUEUE = "fragile"


@pytest.fixture
def url(qbridge_rabbitmq: RabbitMQServer) -> Iterator[str]:
    """An empty virtual host."""
    with qbridge_rabbitmq.fresh() as url:
        yield url


@pytest.fixture(params=["redis", "sqlite"])
def contract(
    url: str, request: pytest.FixtureRequest, qbridge_redis: RedisServer, tmp_path: Path
) -> Iterator[Contract]:
    """A bridge and workers, with results that keep claims."""
    with qbridge_redis.heal().fresh() as redis:
        results = redis if request.param == "redis" else f"sqlite:///{tmp_path}/results.db"
        contract = Contract(url, results, tmp_path)
        try:
            yield contract
        finally:
            contract.close()


def rescuer(contract: Contract) -> Any:
    """Another worker, in this process."""
    bridge = contract.another_bridge()
    contract.declare_on(bridge)
    return bridge.worker(pool="thread", concurrency=2, queues=[QUEUE])


def through(proxy: TcpProxy, url: str) -> dict[str, str]:
    """Settings of a worker whose connection can be cut."""
    return {"QBRIDGE_BROKER": proxy.url(url), "QBRIDGE_BROKER__HEARTBEAT": "2"}


@pytest.mark.parametrize("contract", ["redis"], indirect=True)
def test_a_cut_connection_starts_no_second_run(contract: Contract, url: str) -> None:
    """The message goes to the other worker at once, and waits until the run has ended; then it is acknowledged."""
    path, release = contract.path(), contract.path("release")
    with TcpProxy.to(url) as proxy, contract.worker_of(QUEUE, pool="thread", settings=through(proxy, url)):
        result = contract.tasks.hold.using(queue=QUEUE).delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        time.sleep(1)  # long enough to be claimed
        with rescuer(contract):
            proxy.refuse()
            time.sleep(8)  # the length of the fault: longer than the lease, and than a message waits in hand
            assert 1 == len(runs(path))
            proxy.resume()
            release.touch()
            assert 1 == result.get(timeout=20)
            wait_until(lambda: contract.depth(QUEUE) == 0, 20, what="the copy to be settled")
            after = contract.tasks.note.using(queue=QUEUE).delay(str(contract.path()), "after")
            assert "after" == after.get(timeout=20)
        assert 1 == len(runs(path))


@pytest.mark.parametrize("contract", ["sqlite"], indirect=True)
def test_a_killed_holder_is_followed_within_five_seconds(contract: Contract) -> None:
    """A claim that nobody renews is anybody's; whoever runs next has a larger fencing token."""
    path, release = contract.path(), contract.path("release")
    with contract.worker_of(QUEUE, pool="thread") as worker:
        result = contract.tasks.fenced.using(queue=QUEUE).delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        time.sleep(1.5)  # long enough to be claimed, and renewed
        with rescuer(contract):
            worker.kill()
            killed = time.monotonic()
            wait_until(lambda: len(runs(path)) == 2, 20, what="the second run")
            waited = time.monotonic() - killed
            release.touch()
            first, second = result.get(timeout=20)
    assert first < second
    assert waited < 5 + 1, "a second for a busy machine"


@pytest.mark.parametrize("contract", ["redis", "sqlite"], indirect=True)
def test_a_run_that_was_ended_leaves_no_claim(contract: Contract, url: str) -> None:
    """A process is ended when the connection breaks: the message that comes again need not wait for the lease."""
    path, release = contract.path(), contract.path("release")
    settings = through(proxy := TcpProxy.to(url), url)
    with proxy, contract.worker_of(QUEUE, pool="process", concurrency=1, settings=settings) as worker:
        result = contract.tasks.hold.using(queue=QUEUE).delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        time.sleep(2.5)  # long enough to be claimed, and renewed
        proxy.cut()
        wait_until(lambda: "Ending task" in worker.log.read_text(), 20, what="the run to be ended")
        wait_until(lambda: len(runs(path)) == 2, 20, what="the second run")
        assert "while it runs elsewhere" not in worker.log.read_text()
        release.touch()
        assert result.get(timeout=20) == 2


@pytest.mark.parametrize("contract", ["redis"], indirect=True)
def test_a_worker_is_back_when_its_heartbeats_were_missed(contract: Contract, url: str) -> None:
    """A lost connection is not closed in order, and the name that it has at the broker is asked for each second."""
    path = contract.path()
    settings = through(proxy := TcpProxy.to(url), url) | {"QBRIDGE_BROKER__PUBLISH_TIMEOUT": "20"}
    with proxy, contract.worker_of(QUEUE, pool="thread", settings=settings):
        contract.tasks.note.using(queue=QUEUE).delay(str(path), "before").get(timeout=20)
        proxy.lose()
        lost = time.monotonic()
        contract.tasks.note.using(queue=QUEUE).delay(str(path), "after").get(timeout=80)
        # heartbeats of 2 s: two and a half of them, the look at what comes again, and time for a busy machine
        assert time.monotonic() - lost < 2.5 * 2 + 2 + 6


@pytest.mark.parametrize("contract", ["redis"], indirect=True)
def test_a_stopped_holder_cannot_store_its_result(contract: Contract, url: str) -> None:
    """SIGSTOP past the lease: the task runs elsewhere, and what the first run brings in the end is refused."""
    path, release = contract.path(), contract.path("release")
    settings = {"QBRIDGE_BROKER__HEARTBEAT": "2"}
    with contract.worker_of(QUEUE, pool="solo", settings=settings) as worker:
        result = contract.tasks.fenced.using(queue=QUEUE).delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        pid = runs(path)[0][0]
        time.sleep(1)  # long enough to be claimed
        os.kill(pid, signal.SIGSTOP)
        try:
            with rescuer(contract):
                wait_until(lambda: len(runs(path)) == 2, 30, what="the second run")
                os.kill(pid, signal.SIGCONT)
                Path(f"{release}-{pid}").touch()
                wait_until(lambda: "not stored" in worker.log.read_text(), 20, what="the refusal")
                assert "SUCCESS" != result.state
                release.touch()
                assert 2 == len(result.get(timeout=20))
        finally:
            os.kill(pid, signal.SIGCONT)
    assert 2 == len(runs(path))
