"""What does a worker do with a result over rpc that nobody can receive? It drops it at once, and goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbridge import Bridge, BridgeConfig
from qbridge.testing.contracts.kit import WorkerProcess
from qbridge.testing.servers import RabbitMQServer
from qbridge.testing.waiting import wait_until

HERE = Path(__file__).parent


@pytest.fixture
def url(qbridge_rabbitmq: RabbitMQServer) -> Iterator[str]:
    """An empty vhost."""
    with qbridge_rabbitmq.heal().fresh() as fresh:
        yield fresh


@pytest.mark.parametrize("pool", ["solo", "thread", "process"])
def test_a_result_that_nobody_waits_for_keeps_no_task(url: str, pool: str, tmp_path: Path) -> None:
    """A task that sends another one has no reply queue: for as long as its result was offered, nothing else ran."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "QBRIDGE_BROKER": url, "QBRIDGE_RESULTS": "rpc://"}
    command = [sys.executable, "-m", "qbridge", "worker", "-A", "nested_app:bridge", "--pool", pool, "-c", "1"]
    worker = WorkerProcess(command, environment, tmp_path)
    try:
        with Bridge(BridgeConfig(broker=url, results="rpc://")) as bridge:
            assert worker.name
            sent = [bridge.send("nested.fan", (number,)) for number in range(4)]
            assert [0, 1, 2, 3] == [result.get(timeout=15) for result in sent]
            wait_until(lambda: "Nobody waits for the result" in worker.log.read_text(), 15, what="the word of that")
    finally:
        worker.kill()
