"""A folder with an application in it, and the real programs that run there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from qbridge import Bridge, BridgeConfig
from qbridge.testing.waiting import wait_until

SHOP = """
import os
import time

from qbridge import Bridge, Retry, TaskContext

bridge = Bridge()
app = bridge.celery


@bridge.task
def add(a: int, b: int) -> int:
    return a + b


@bridge.task(queue="reports", retry=Retry(on=(ConnectionError, OSError), attempts=4), time_limit=60)
def render(pages: list[str]) -> dict[str, int]:
    return {page: os.getpid() for page in pages}


@bridge.task(context=True)
def slow(run: TaskContext, steps: int) -> int:
    for step in range(steps):
        run.progress(step + 1, steps, note=f"step {step + 1}")
        if os.path.exists(".state/enough"):
            return step
        time.sleep(0.1)
    return steps


@bridge.task
async def fail(text: str) -> None:
    raise LookupError(text)
"""


class Folder:
    """A project folder with `shop.py`, its configuration in the environment, and what runs in it."""

    def __init__(self, path: Path, broker: str | None = None, results: str | None = None, shop: str = SHOP) -> None:
        self.path = path
        self.broker = broker or f"embedded://{path}/.state/bridge.db"
        self.results = results or f"sqlite:///{path}/.state/results.db"
        (path / ".state").mkdir(exist_ok=True)
        (path / "shop.py").write_text(shop)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.bridge = Bridge(
            BridgeConfig(broker=self.broker, results=self.results, queues=["reports"], worker={"unknown_task_grace": 0})
        )

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
        return {**kept, "QBRIDGE_BROKER": self.broker, "QBRIDGE_RESULTS": self.results, **more}

    def run(self, *arguments: str, timeout: float = 30, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `qbridge …` to its end."""
        return subprocess.run(
            [sys.executable, "-m", "qbridge", *arguments], cwd=self.path, env=self.environment(**environment),
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    def json(self, *arguments: str) -> Any:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def start(self, *command: str, module: str = "qbridge") -> Program:
        log = self.path / ".state" / f"process{len(self.processes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *command], cwd=self.path, env=self.environment(), stdout=output,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.processes.append(process)
        return Program(process, log)

    def close(self) -> None:
        self.bridge.close()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGQUIT)
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(5)


class Program:
    """A running process and its log."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, timeout: float = 30, times: int = 1) -> str:
        def there() -> bool:
            assert self.process.poll() is None or self.text.count(text) >= times, self.text
            return self.text.count(text) >= times

        wait_until(there, timeout, what=f"{text!r} in the log")
        return self.text

    def ready(self, times: int = 1) -> str:
        return self.wait_for(" ready.", times=times)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout)
