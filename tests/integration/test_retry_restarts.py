"""Does a policy keep its count and its waits while workers are killed and the broker is restarted?"""

from __future__ import annotations

import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qbridge import Bridge, BridgeConfig
from qbridge.testing.contracts.kit import WorkerProcess
from qbridge.testing.servers import RedisServer
from qbridge.testing.waiting import wait_until

HERE = Path(__file__).parent
WAITS = [1, 2, 4, 4]
#: Seconds from when an attempt is due, and there is a worker with a broker, until it begins on a busy machine.
SLACK = 10.0


@pytest.mark.parametrize("kind", ["embedded", "rabbitmq", "redis"])
def test_five_attempts_are_five_wherever_they_run(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> None:
    """A worker is killed before the fourth, the broker restarted before the fifth: none lost or repeated."""
    log = tmp_path / "runs"
    server: Any = None
    url = f"embedded://{tmp_path}/bridge.db"
    if kind == "rabbitmq":
        server = request.getfixturevalue("qbridge_rabbitmq")
        url = server.create_vhost("retry_restarts")
    elif kind == "redis":
        server = RedisServer(appendonly=True).start()
        url = server.url
    there = [time.time()]  # when there was a worker, or a broker, again
    results = f"sqlite:///{tmp_path}/results.db"
    environment = {**os.environ, "PYTHONPATH": str(HERE), "QBRIDGE_BROKER": url, "QBRIDGE_RESULTS": results}
    command = [sys.executable, "-m", "qbridge", "worker", "-A", "retry_app:bridge", "--pool", "process"]

    def start(name: str) -> WorkerProcess:
        folder = tmp_path / name
        folder.mkdir()
        worker = WorkerProcess([*command, "--concurrency", "1"], environment, folder)
        _ = worker.name
        there.append(time.time())
        return worker

    def waits_after(result: Any, attempt: int) -> bool:
        told = result.retrying()
        return told is not None and told.attempt == attempt

    worker = start("first")
    try:
        with Bridge(BridgeConfig(broker=url, results=results)) as bridge:
            result = bridge.send("retry.steady", (str(log),))
            wait_until(lambda: waits_after(result, 3), 60, what="the third attempt to fail")
            time.sleep(1)  # its message is acknowledged after its state is stored; killed in between it runs again
            worker.kill()
            worker = start("second")
            wait_until(lambda: waits_after(result, 4), 90, what="the fourth attempt to fail")
            if server is not None:
                time.sleep(1)  # likewise
                server.restart()
                there.append(time.time())
            assert result.get(timeout=90) == 5
    finally:
        worker.kill()
        if kind == "rabbitmq":
            server.heal()
            server.delete_vhost("retry_restarts")
        elif server is not None:
            server.close()
    attempts, times = zip(*(line.split() for line in log.read_text().splitlines()), strict=True)
    assert attempts == ("1", "2", "3", "4", "5")
    for wait, (earlier, later) in zip(WAITS, pairwise(map(float, times)), strict=True):
        assert wait - 0.1 <= later - earlier
        assert later <= max(earlier + wait, *(moment for moment in there if moment < later + 1)) + SLACK
