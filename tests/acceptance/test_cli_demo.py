"""`qbridge demo` as a stranger starts it: true, tidy, and over in time, whatever happens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from kombu import Connection

from qbridge.testing.servers import RabbitMQServer, RedisServer
from qbridge.testing.waiting import wait_until

STEPS = 7


class Demo:
    """A run of the demo in an empty folder, with a temporary folder of its own."""

    def __init__(self, path: Path, *arguments: str, **environment: str) -> None:
        self.work, self.temp = path / "work", path / "temp"
        self.work.mkdir()
        self.temp.mkdir()
        # a project's configuration that would break everything if it were read
        (self.work / "qbridge.toml").write_text('broker = "amqp://127.0.0.1:9//"')
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
        self.output = path / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "qbridge", "demo", *arguments], cwd=self.work, stdout=output,
                stderr=subprocess.STDOUT,
                env={**kept, "TMPDIR": str(self.temp), "PYTHONUNBUFFERED": "1", **environment},
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, found: Callable[[str], object], what: str) -> None:
        wait_until(lambda: found(self.text), 40, what=what)

    def worker(self) -> int:
        """Wait for the worker and return its process id."""
        pattern = re.compile(r"process (\d+), ready")
        self.wait_for(pattern.search, "the worker")
        found = pattern.search(self.text)
        assert found is not None
        return int(found[1])

    def end(self, timeout: float = 70) -> int:
        return self.process.wait(timeout)

    def left_behind(self) -> list[str]:
        """Return what lies in the working and the temporary folder, but for the project's file."""
        return [str(path) for folder in (self.work, self.temp) for path in folder.iterdir() if path.suffix != ".toml"]


def _rows(text: str) -> tuple[int, int]:
    """Count the true and the false rows of the final table."""
    table = text.partition("What you have seen")[2]
    return len(re.findall(r"^(?:✓|ok) ", table, re.MULTILINE)), len(re.findall(r"^(?:✗|FAILED) ", table, re.MULTILINE))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_demo_needs_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    """In a pipe, without a server: all rows true, plain text in 80 columns, no file left, no process left."""
    demo = Demo(tmp_path)
    pid = demo.worker()
    assert demo.end() == 0, demo.text
    assert (STEPS, 0) == _rows(demo.text)
    assert "\x1b" not in demo.text
    assert "\r" not in demo.text
    assert [line for line in demo.text.splitlines() if len(line) > 80 and str(demo.temp) not in line] == []
    assert "a: Input should be a valid integer" in demo.text
    assert "raise OutOfStock" in demo.text, "the remote traceback"
    assert "500/500" in demo.text
    assert demo.left_behind() == []
    assert not _alive(pid)


def test_the_demo_speaks_ascii_where_it_must(tmp_path: Path) -> None:
    """An output that cannot show the signs does not end the demo."""
    demo = Demo(tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert demo.end() == 0, demo.text
    assert (STEPS, 0) == _rows(demo.text)
    assert demo.text.isascii()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_ends_its_worker(tmp_path: Path, number: int) -> None:
    """Ctrl-C in the middle: the worker is gone, nothing is left, the exit code is not 0."""
    demo = Demo(tmp_path)
    pid = demo.worker()
    demo.wait_for(lambda text: "6. " in text, "the middle of the story")
    demo.process.send_signal(number)
    assert demo.end(20) == 1
    assert not _alive(pid)
    assert demo.left_behind() == []


def test_a_demo_without_a_worker_says_so(tmp_path: Path) -> None:
    """The worker is killed in the middle: exit code 1 at once, the end of its log, and the log is kept."""
    demo = Demo(tmp_path)
    pid = demo.worker()
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    assert demo.end(40) == 1
    assert time.monotonic() - began < 15
    assert "the worker ended with exit code -9" in demo.text
    assert "celery@" in demo.text.partition("The end of the worker's log")[2]
    log = re.search(r"The whole log: (\S+)", demo.text)
    assert log is not None
    assert "ready." in Path(log[1]).read_text()


def test_a_demo_without_a_broker_says_so(tmp_path: Path) -> None:
    """What `qbridge check` would say, the password masked, and no worker is started."""
    demo = Demo(tmp_path, "--broker", "amqp://shop:pw1234@127.0.0.1:9//", "--results", "rpc://")
    assert demo.end(20) == 1
    assert "nothing listens at 127.0.0.1:9" in demo.text
    assert "amqp://shop:**@127.0.0.1:9/" in demo.text
    assert "pw1234" not in demo.text
    assert "Traceback" not in demo.text
    assert demo.left_behind() == []


def test_the_demo_cleans_up_on_redis(tmp_path: Path, qbridge_redis: RedisServer) -> None:
    """Every key with the demo's name and every result is gone."""
    with qbridge_redis.fresh() as url:
        demo = Demo(tmp_path, "--broker", url, "--results", url)
        assert demo.end() == 0, demo.text
        assert (STEPS, 0) == _rows(demo.text)
        assert url in demo.text or ":**@" in demo.text
        with Connection(url) as connection:
            keys = [key.decode() for key in connection.default_channel.client.keys("*")]
        assert [key for key in keys if "demo" in key or "celery-task-meta" in key] == []


def test_the_demo_cleans_up_on_rabbitmq(tmp_path: Path, qbridge_rabbitmq: RabbitMQServer) -> None:
    """Its queue, its exchange and its queue of replies are gone."""
    with qbridge_rabbitmq.vhost() as url:
        demo = Demo(tmp_path, "--broker", url, "--results", "rpc://")
        assert demo.end() == 0, demo.text
        assert (STEPS, 0) == _rows(demo.text)
        vhost = urlsplit(url).path.removeprefix("/")
        names = [
            found["name"]
            for kind in ("queues", "exchanges")
            for found in qbridge_rabbitmq.api("GET", f"/api/{kind}/{vhost}")
        ]
        assert [name for name in names if not name.startswith(("amq.", "celery"))] == [""], "the default exchange"
