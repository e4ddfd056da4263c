"""`celery -A shop worker|inspect` with `app = bridge.celery` is the same worker as `qbridge worker`."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.acceptance.cli_programs import SHOP, Folder

from qbridge.testing.waiting import wait_until


@pytest.fixture(params=["embedded", "redis"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    """A project on a broker of its own."""
    if request.param == "embedded":
        place = Folder(tmp_path)
        yield place
        place.close()
        return
    with request.getfixturevalue("qbridge_redis").fresh() as url:
        place = Folder(tmp_path, broker=url, results=url)
        yield place
        place.close()


def _celery(folder: Folder, *arguments: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", "shop", *arguments], cwd=folder.path, env=folder.environment(),
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def test_celery_worker_is_a_bridge_worker(folder: Folder) -> None:
    """Configured pool, queues and safety come from the bridge; remote control works; SIGTERM is warm."""
    worker = folder.start("-A", "shop", "worker", "-l", "INFO", "-c", "2", "-n", "w1@test", module="celery")
    text = worker.ready()
    assert text.splitlines()[0].startswith("qbridge "), "our banner"
    assert re.search(r"queues +default, reports", text)
    assert re.search(r"pool +process × 2", text)
    assert "mingle" not in text
    assert folder.bridge.send("shop.add", (1, 2)).get(timeout=20) == 3
    with pytest.raises(LookupError, match="nothing"):
        folder.bridge.send("shop.fail", ("nothing",)).get(timeout=20)

    ping = _celery(folder, "inspect", "ping", "--timeout", "5")
    assert ping.returncode == 0, ping.stdout + ping.stderr
    assert "pong" in ping.stdout
    registered = _celery(folder, "inspect", "registered", "--timeout", "5").stdout
    assert {"shop.add", "shop.fail", "shop.render", "shop.slow"} <= set(re.findall(r"shop\.\w+", registered))
    stats = _celery(folder, "inspect", "stats", "--timeout", "5", "--json").stdout
    assert '"prefetch_count": 2' in stats, "one message per process"

    running = folder.bridge.send("shop.slow", (15,))
    wait_until(lambda: running.progress() is not None, 20, what="the task to run")
    assert worker.stop() == 0
    assert running.get(timeout=5) == 15


def test_celery_worker_takes_the_pool_of_the_configuration(tmp_path: Path) -> None:
    """Its own default, prefork, does not override what the bridge says."""
    configured = SHOP.replace(", time_limit=60", "").replace(
        "Bridge()", 'Bridge(BridgeConfig(worker=WorkerConfig(pool="thread", concurrency=3)))'
    )
    imports = "from qbridge import Bridge, BridgeConfig, Retry, TaskContext, WorkerConfig"
    folder = Folder(tmp_path, shop=configured.replace("from qbridge import Bridge, Retry, TaskContext", imports))
    try:
        worker = folder.start("-A", "shop", "worker", "-l", "INFO", module="celery")
        assert re.search(r"pool +thread × 3", worker.ready())
        assert folder.bridge.send("shop.render", (["a"],), queue="reports").get(timeout=20) == {"a": worker.process.pid}
        assert worker.stop() == 0
    finally:
        folder.close()


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_celery_worker_refuses_a_pool_that_cannot_enforce_time_limits(tmp_path: Path, pool: str) -> None:
    """A clean message that names the task, and an exit code that is not 0."""
    folder = Folder(tmp_path)
    done = _celery(folder, "worker", "-P", pool)
    folder.close()
    assert done.returncode == 1
    assert "cannot enforce the time limits of shop.render" in done.stderr
    assert "Traceback" not in done.stderr


def test_celery_beat_runs(tmp_path: Path) -> None:
    """`celery beat` sends what is due into the bridge's queue."""
    schedule = "app.conf.beat_schedule = {'often': {'task': 'shop.add', 'schedule': 0.5, 'args': (1, 2)}}\n"
    folder = Folder(tmp_path, shop=SHOP + schedule)
    try:
        beat = folder.start(
            "-A", "shop", "beat", "-l", "INFO", "-s", str(tmp_path / ".state" / "beat"), module="celery"
        )
        beat.wait_for("Sending due task", times=2)
        queues = {queue["name"]: queue for queue in folder.json("queues", "-A", "shop")["queues"]}
        assert queues["default"]["waiting"] >= 1
        assert beat.stop() == 0
    finally:
        folder.close()
