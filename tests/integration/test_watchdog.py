"""Is a worker noticed that is up and does no work, and what becomes of it?"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qbridge import Bridge, BridgeConfig
from qbridge.probe import fault_of
from qbridge.testing.contracts.kit import WorkerProcess
from qbridge.testing.waiting import wait_until
from qbridge.worker.watchdog import EXIT_CODE

HERE = Path(__file__).parent
PATIENCE = 2.0
#: A busy machine may take that long to start a worker, to find out, and to end it.
LONG = 40.0


class Ward:
    """A broker, a bridge that sends to it, and workers that may be ill."""

    def __init__(self, broker: str, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(HERE),
            "QBRIDGE_BROKER": broker,
            "QBRIDGE_RESULTS": f"sqlite:///{folder}/results.db",
            "QBRIDGE_WORKER__WATCHDOG": str(PATIENCE),
        }
        self.bridge = Bridge(BridgeConfig(broker=broker, results=self.environment["QBRIDGE_RESULTS"]))

    @contextmanager
    def worker(self, illness: str, pool: str, *words: str) -> Iterator[WorkerProcess]:
        command = [sys.executable, "-m", "qbridge", "worker", "-A", "sick_app:bridge", "--pool", pool, "-c", "1"]
        name = ["-n", f"{illness or 'well'}-{pool}@%h"]
        worker = WorkerProcess([*command, *name, *words], {**self.environment, "ILLNESS": illness}, self.folder)
        try:
            _ = worker.name
            yield worker
        finally:
            worker.kill()

    def send(self) -> Any:
        return self.bridge.send("sick.add", (20, 22))


@contextmanager
def ward(broker: str, folder: Path) -> Iterator[Ward]:
    made = Ward(broker, folder)
    with made.bridge:
        yield made


def children(pid: int) -> list[int]:
    """Processes that a process has started and not waited for."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_loop_that_stands_still_ends_the_worker(tmp_path: Path) -> None:
    """It ends with the watchdog's exit code, says why and where it stood, and its message goes to another worker."""
    with ward(f"embedded://{tmp_path}/bridge.db", tmp_path) as place:
        with place.worker("loop", "thread", "--health-file", str(tmp_path / "health")) as worker:
            wait_until(lambda: "stood still" in fault_of(str(tmp_path / "health"), ready=True), LONG)
            assert worker.wait(LONG) == EXIT_CODE
            log = worker.log.read_text()
        assert "its loop has stood still for" in log
        assert "Traceback" in log or "most recent call first" in log
        assert "fall_ill" not in log  # what is shown is where it stands, not where it began
        result = place.send()
        with place.worker("", "thread"):
            assert result.get(timeout=LONG) == 42


def test_a_consumer_that_the_server_has_forgotten_consumes_again(qbridge_rabbitmq: Any, tmp_path: Path) -> None:
    """Messages wait, nothing runs, and none comes: a new connection helps, and the worker stays."""
    with (
        qbridge_rabbitmq.heal().fresh() as url,
        ward(url, tmp_path) as place,
        place.worker("delivery", "thread") as worker,
    ):
        result = place.send()
        assert result.get(timeout=LONG) == 42
        assert "messages wait in default (1), nothing runs here" in worker.log.read_text()
        wait_until(lambda: "This worker works again" in worker.log.read_text(), LONG)
        assert worker.process.exit_code() is None


def test_a_pool_that_begins_nothing_ends_the_worker(tmp_path: Path) -> None:
    """Its processes are there and take nothing: the worker ends, and another one runs the task."""
    with ward(f"embedded://{tmp_path}/bridge.db", tmp_path) as place:
        with place.worker("", "process") as worker:
            stopped = children(worker.pid)
            assert len(stopped) == 1
            os.kill(stopped[0], signal.SIGSTOP)
            result = place.send()
            assert worker.wait(LONG) == EXIT_CODE
            assert "1 task(s) wait for a slot, and 1 of 1 are free" in worker.log.read_text()
            wait_until(lambda: not Path(f"/proc/{stopped[0]}").exists(), LONG, what="the stopped process to be gone")
        with place.worker("", "process"):
            assert result.get(timeout=LONG) == 42


def test_a_worker_that_only_waits_for_its_broker_lives_and_is_not_ready(tmp_path: Path, qbridge_redis: Any) -> None:
    """The port tells both apart: restarting the worker would not bring the broker back."""
    server = qbridge_redis.heal()
    with server.fresh() as url, ward(url, tmp_path) as place:
        port_file = tmp_path / "health"
        with place.worker("", "solo", "--health-port", "0", "--health-file", str(port_file)) as worker:
            wait_until(lambda: "/live and /ready" in worker.log.read_text(), LONG)
            port = worker.log.read_text().partition("http://127.0.0.1:")[2].partition("/")[0]
            wait_until(lambda: asked(port, "ready") == (200, ""), LONG, what="it to be ready")
            assert fault_of(str(port_file), ready=True) == ""
            try:
                server.stop()
                wait_until(lambda: asked(port, "ready")[0] == 503, LONG, what="it not to be ready")
                assert asked(port, "live") == (200, "it is not connected to its broker")
                assert fault_of(str(port_file), ready=False) == ""
                assert fault_of(str(port_file), ready=True) == "it is not connected to its broker"
            finally:
                server.start()
            wait_until(lambda: asked(port, "ready") == (200, ""), LONG, what="it to be ready again")
            assert asked(port, "elsewhere")[0] == 404


def asked(port: str, what: str) -> tuple[int, str]:
    """Status and reason that the port answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{what}", timeout=5) as answer:
            return answer.status, json.load(answer)["reason"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["reason"]


def test_systemd_is_told(tmp_path: Path) -> None:
    """For ``Type=notify`` and ``WatchdogSec=``: the worker says once that it is ready, and often that it lives."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(LONG)
        with ward(f"embedded://{tmp_path}/bridge.db", tmp_path) as place:
            place.environment["NOTIFY_SOCKET"] = str(tmp_path / "notify")
            with place.worker("", "solo"):
                told = ""
                while "READY=1" not in told:
                    told = systemd.recv(1024).decode()
                assert told.splitlines() == ["STATUS=takes tasks", "WATCHDOG=1", "READY=1"]
                again = systemd.recv(1024).decode()
                assert again.splitlines() == ["STATUS=takes tasks", "WATCHDOG=1"]
