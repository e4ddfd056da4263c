"""Does a bridge that has sent survive a fork, on both sides of it?"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import billiard
import pytest

from qbridge import Bridge, BridgeConfig

NUMBERS = range(20)


def _os_fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(60)
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"in the child: {type(error).__name__}: {error}\n".encode())
        os._exit(1)


def _process(context: Any) -> Callable[[Callable[[], None]], int]:
    def run(work: Callable[[], None]) -> int:
        process = context.Process(target=work)
        process.start()
        process.join(60)
        return int(process.exitcode)

    return run


FORKS = {
    "os.fork": _os_fork,
    "multiprocessing": _process(multiprocessing.get_context("fork")),
    "billiard": _process(billiard.get_context("fork")),
}


@pytest.fixture(params=[("rabbitmq", "rpc"), ("rabbitmq", "redis"), ("redis", "redis"), ("embedded", "sqlite")])
def bridge(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[Bridge]:
    """A bridge that has sent and got a result, with a worker in a thread of this process."""
    broker, results = request.param
    with (
        request.getfixturevalue("qbridge_rabbitmq").fresh() if broker == "rabbitmq" else _file(tmp_path) as broker_url,
        request.getfixturevalue("qbridge_redis").fresh() if "redis" in request.param else _file(tmp_path) as redis_url,
    ):
        urls = {"redis": redis_url, "rpc": "rpc://", "sqlite": f"sqlite:///{tmp_path}/results.db"}
        config = BridgeConfig(broker=redis_url if broker == "redis" else broker_url, results=urls[results])
        with Bridge(config) as made:

            @made.task
            def double(number: int) -> int:
                return number * 2

            with made.worker(concurrency=1):
                assert 4 == double.delay(2).get(timeout=20)
                yield made


class _file:  # noqa: N801
    """A stand-in for a server's ``fresh()``."""

    def __init__(self, folder: Any) -> None:
        self.url = f"embedded://{folder}/bridge.db"

    def __enter__(self) -> str:
        return self.url

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("how", FORKS)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_parent_and_children_send_and_get(bridge: Bridge, how: str) -> None:
    """Each forked child sends and gets its own results; the parent goes on with the connection that it had."""
    (double,) = bridge.tasks.values()
    with bridge.celery.pool.acquire() as connection:
        lower = connection.connection

    def work() -> None:
        for number in NUMBERS:
            assert number * 2 == double.delay(number).get(timeout=20)

    def child_that_only_exits() -> None:
        pass

    assert 0 == FORKS[how](work)
    assert 0 == FORKS[how](child_that_only_exits)
    work()
    assert lower is connection._connection
    assert connection.connected


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_children_beside_a_busy_parent(bridge: Bridge) -> None:
    """Threads of the parent send while children are forked: nobody reads another's answer, nobody hangs."""
    (double,) = bridge.tasks.values()
    wrong: list[str] = []
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            try:
                if double.delay(21).get(timeout=20) != 42:
                    wrong.append("a result of another task")
            except Exception as error:
                wrong.append(repr(error))

    def work() -> None:
        for number in NUMBERS:
            assert number * 2 == double.delay(number).get(timeout=20)

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        began = time.monotonic()
        assert [0, 0, 0] == [_os_fork(work) for _ in range(3)]
        assert time.monotonic() - began < 60
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert [] == wrong
