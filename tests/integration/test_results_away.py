"""What becomes of a finished task whose result server is away? Its outcome is stored later, or it runs again."""

from __future__ import annotations

import os
import re
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from qbridge import Bridge, BridgeConfig
from qbridge.testing.contracts.kit import WorkerProcess
from qbridge.testing.waiting import wait_until

HERE = Path(__file__).parent
#: Redis' own tries take about 20 seconds before anything of this begins.
LONG = 90.0


def runs(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_an_outcome_waits_for_its_server(qbridge_redis: Any, tmp_path: Path) -> None:
    """Processes and threads keep it until the server is back, and the task has run once; a solo worker runs it again.

    Plain Celery stores nothing and acknowledges the message: the caller waits for ever.
    """
    server = qbridge_redis.heal()
    pools = ("process", "thread", "solo")
    with server.fresh() as url, ExitStack() as workers:
        results, started = {}, {}
        for pool in pools:
            broker = f"embedded://{tmp_path}/{pool}.db"
            environment = {
                **os.environ,
                "PYTHONPATH": str(HERE),
                "QBRIDGE_BROKER": broker,
                "QBRIDGE_RESULTS": url,
                "ENDING_WHILE": str(tmp_path / "away"),
            }
            command = [sys.executable, "-m", "qbridge", "worker", "-A", "outcome_app:bridge", "--pool", pool]
            worker = WorkerProcess([*command, "-c", "1", "-n", f"{pool}@%h"], environment, tmp_path)
            workers.callback(worker.kill)
            started[pool] = worker
            bridge = workers.enter_context(Bridge(BridgeConfig(broker=broker, results=url)))
            results[pool] = bridge.send("outcome.tell", (str(tmp_path / f"{pool}.runs"),))
        for pool in pools:
            wait_until(lambda pool=pool: runs(tmp_path / f"{pool}.runs"), LONG, what=f"{pool} to begin")
        server.stop()
        try:
            (tmp_path / "away").touch()  # they end now
            for pool in ("process", "thread"):
                log = started[pool].log
                wait_until(lambda log=log: "does not take its outcome" in log.read_text(), LONG, what=pool)
            wait_until(lambda: len(runs(tmp_path / "solo.runs")) == 2, LONG, what="the solo worker to run it again")
        finally:
            server.start()
        for pool in pools:
            assert results[pool].get(timeout=LONG) == "told"
        assert [len(runs(tmp_path / f"{pool}.runs")) for pool in ("process", "thread")] == [1, 1]
        assert "is stored," in started["thread"].log.read_text()
        assert all(worker.process.exit_code() is None for worker in started.values())


@pytest.fixture(params=["embedded", "rabbitmq"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty place on a broker that keeps delays itself, and on one where workers look what is due."""
    if request.param == "embedded":
        yield f"embedded://{tmp_path}/bridge.db"
    else:
        server: Any = request.getfixturevalue("qbridge_rabbitmq")
        with server.heal().fresh() as url:
            yield url


def test_a_task_whose_outcome_is_refused_for_long_runs_again_more_and_more_rarely(broker: str, tmp_path: Path) -> None:
    """A solo worker must not wait with it: the task, and what it does elsewhere, ran twice a second all the while."""
    database, log = tmp_path / "results.db", tmp_path / "runs"
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "QBRIDGE_BROKER": broker,
        "QBRIDGE_RESULTS": f"sqlite:///{database}",
        "ENDING_WHILE": str(tmp_path),
    }
    command = [sys.executable, "-m", "qbridge", "worker", "-A", "outcome_app:bridge", "--pool", "solo"]
    worker = WorkerProcess(command, environment, tmp_path)
    try:
        _ = worker.name
        with Bridge(BridgeConfig(broker=broker, results=environment["QBRIDGE_RESULTS"])) as bridge:
            assert bridge.send("outcome.tell", (str(tmp_path / "first"),)).get(timeout=LONG) == "told"
            with closing(sqlite3.connect(database, timeout=30)) as direct:
                direct.execute("ALTER TABLE celery_taskmeta RENAME COLUMN status TO other")
                direct.commit()
                result = bridge.send("outcome.tell", (str(log),))
                wait_until(lambda: len(runs(log)) == 3, LONG, what="the third run")
                direct.execute("ALTER TABLE celery_taskmeta RENAME COLUMN other TO status")
                direct.commit()
            assert result.get(timeout=LONG) == "told"
        moments = [float(line) for line in runs(log)]
        pauses = [float(one) for one in re.findall(r"goes back to its queue for ([\d.]+) s", worker.log.read_text())]
        assert pauses[1] > pauses[0]
        assert moments[2] - moments[1] > pauses[1] - 1  # RabbitMQ counts whole seconds
        assert worker.process.exit_code() is None
    finally:
        worker.kill()
