"""Row 18: does a broken connection start a second run of a task beside the one that goes on?"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.proxy import TcpProxy
from qbridge.testing.waiting import wait_until

LONG = 25  # longer than a worker takes to start on a busy machine


def begun(path: Path) -> int:
    """How many runs there have been."""
    return sum(word == "begin" for _, _, word in runs(path))


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and was not waited for does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_plain_celery_on_rabbitmq_runs_it_beside_itself(on_rabbitmq: Place) -> None:
    """The server delivers again at once what was not acknowledged; the thread goes on."""
    plain = on_rabbitmq.plain(quorum=True, task_acks_late=True, worker_prefetch_multiplier=1)
    path = on_rabbitmq.path()
    with TcpProxy.to(on_rabbitmq.url) as proxy, plain.worker("threads", broker=proxy.url(on_rabbitmq.url)):
        plain.send("nap", path, LONG)
        wait_until(lambda: begun(path) == 1, 20, what="the run")
        with plain.worker("threads"):
            proxy.cut()
            wait_until(lambda: begun(path) == 2, LONG, what="a second run")
            assert not any(word == "end" for _, _, word in runs(path)), "the first run had not ended"


def test_plain_celery_on_redis_runs_it_beside_itself(on_redis: Place) -> None:
    """The worker itself gives back what it holds when it connects again; the thread goes on."""
    plain = on_redis.plain(task_acks_late=True, worker_prefetch_multiplier=1)
    path = on_redis.path()
    with TcpProxy.to(on_redis.url) as proxy, plain.worker("threads", broker=proxy.url(on_redis.url)):
        plain.send("nap", path, LONG)
        wait_until(lambda: begun(path) == 1, 20, what="the run")
        with plain.worker("threads"):
            proxy.cut()
            wait_until(lambda: begun(path) == 2, LONG, what="a second run")
            assert not any(word == "end" for _, _, word in runs(path)), "the first run had not ended"


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_ours_goes_on_alone_in_a_thread(broker: str, request: pytest.FixtureRequest) -> None:
    """The copy waits for the run (RabbitMQ), or the message stays leased (Redis); it runs once."""
    place: Place = request.getfixturevalue(f"on_{broker}")
    ours, path = place.ours(), place.path()
    with TcpProxy.to(place.url) as proxy:
        settings = {"QBRIDGE_BROKER": proxy.url(place.url)}
        with ours.worker_of("fragile", pool="thread", settings=settings):
            result = ours.tasks.nap.using(queue="fragile").delay(str(path), LONG)
            wait_until(lambda: begun(path) == 1, 20, what="the run")
            with ours.worker_of("fragile", pool="thread"):
                for _ in range(3):
                    proxy.cut()
                    time.sleep(2)
                assert result.get(timeout=40) == LONG
                wait_until(lambda: not ours.depth_or_none("fragile"), 20, what="the copy to be settled")
    assert [word for _, _, word in runs(path)] == ["begin", "end"]


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_ours_ends_the_process_before_the_task_begins_elsewhere(broker: str, request: pytest.FixtureRequest) -> None:
    """A run that can be ended is ended: when the second begins, the process of the first is gone."""
    place: Place = request.getfixturevalue(f"on_{broker}")
    ours, path = place.ours(), place.path()
    with TcpProxy.to(place.url) as proxy:
        settings = {"QBRIDGE_BROKER": proxy.url(place.url)}
        with ours.worker_of("fragile", pool="process", settings=settings):
            result = ours.tasks.nap.using(queue="fragile").delay(str(path), LONG)
            wait_until(lambda: begun(path) == 1, 20, what="the run")
            time.sleep(1)  # long enough to be claimed
            with ours.worker_of("fragile", pool="process"):
                proxy.cut()
                wait_until(lambda: begun(path) == 2, 20, what="the second run", interval=0.001)
                first = runs(path)[0][0]
                assert first != os.getpid()
                assert not is_alive(first)
                assert result.get(timeout=40) == LONG
    assert [word for _, _, word in runs(path)] == ["begin", "begin", "end"]
