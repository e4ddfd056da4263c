"""Do workers whose children are spawned instead of forked know the typed tasks?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbridge import Bridge, BridgeConfig
from qbridge.testing.servers import RedisServer

PROGRAM = """
import os
from qbridge import Bridge, BridgeConfig

url = os.environ["SPAWN_URL"]
raw = {"worker_pool_start_method": "spawn"}
bridge = Bridge(BridgeConfig(broker=url, results=url, defaults=os.environ["SPAWN_DEFAULTS"], celery=raw))
app = bridge.celery

@bridge.task(name="spawn.who")
def who() -> int:
    return os.getpid()

@bridge.task(name="spawn.upper", queue="others")
async def upper(text: str) -> str:
    return text.upper()

@app.task(name="spawn.plain")
def plain(number):
    return number + 1
"""


@pytest.fixture(params=["safe", "celery"])
def sender(request: pytest.FixtureRequest, qbridge_redis: RedisServer, tmp_path: Path) -> Iterator[Bridge]:
    """A bridge that knows the tasks by name, with ``celery worker`` running them in one spawned child."""
    (tmp_path / "spawned.py").write_text(PROGRAM)
    with qbridge_redis.fresh() as url:
        environment = {**os.environ, "SPAWN_URL": url, "SPAWN_DEFAULTS": request.param}
        command = [sys.executable, "-m", "celery", "-A", "spawned:app", "worker", "-c", "1", "-l", "WARNING"]
        with (tmp_path / "log").open("w") as log:
            worker = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        try:
            with Bridge(BridgeConfig(broker=url, results=url, defaults=request.param, queues=["others"])) as made:
                yield made
        finally:
            worker.terminate()
            worker.wait(30)
            print((tmp_path / "log").read_text())


def test_spawned_children_run_typed_and_plain_tasks(sender: Bridge) -> None:
    """The app is found again by its place; a copy of it would know none of them."""
    assert os.getpid() != sender.send("spawn.who").get(timeout=60)
    assert "ABC" == sender.send("spawn.upper", ("abc",), queue="others").get(timeout=20)
    assert 2 == sender.send("spawn.plain", (1,)).get(timeout=20)
