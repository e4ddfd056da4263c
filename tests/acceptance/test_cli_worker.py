"""`qbridge worker` and `qbridge beat` as real processes: what they say, run, refuse, and how they end."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.acceptance.cli_programs import SHOP, Folder

from qbridge.testing.servers import RabbitMQServer
from qbridge.testing.waiting import wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    place = Folder(tmp_path)
    yield place
    place.close()


def test_a_worker_says_what_it_is_runs_tasks_and_ends_warmly(folder: Folder) -> None:
    """SIGTERM lets the running task end: its result arrives, and the exit code is 0."""
    worker = folder.start("worker", "-A", "shop:bridge", "--concurrency", "2", "--name", "w1@test")
    text = worker.ready()
    assert "qbridge" in text.splitlines()[0]
    assert "worker w1@test" in text.splitlines()[0]
    assert re.search(r"broker +embedded://", text)
    assert re.search(r"queues +default, reports", text)
    assert re.search(r"pool +process × 2", text)
    assert "shop.add(a: int, b: int) -> int" in text
    assert "shop.slow(steps: int) -> int" in text
    assert "SecurityWarning" not in text
    assert folder.bridge.send("shop.add", (1, 2)).get(timeout=20) == 3

    running = folder.bridge.send("shop.slow", (15,))
    wait_until(lambda: running.progress() is not None, 20, what="the task to run")
    assert worker.stop() == 0
    assert running.get(timeout=5) == 15


def test_options_choose_the_pool_and_the_queues(folder: Folder) -> None:
    """A worker of one queue runs its tasks only; `-A` takes the module alone, and may stand before the command."""
    (folder.path / "shop.py").write_text(SHOP.replace(", time_limit=60", ""))
    worker = folder.start("-A", "shop", "worker", "-P", "thread", "-c", "3", "-Q", "reports", "-l", "warning")
    text = worker.wait_for("shop.slow")
    assert re.search(r"queues +reports$", text, re.MULTILINE)
    assert re.search(r"pool +thread × 3", text)
    waiting = folder.bridge.send("shop.add", (1, 2))
    pages = folder.bridge.send("shop.render", (["a"],), queue="reports").get(timeout=20)
    assert pages == {"a": worker.process.pid}
    assert not waiting.ready()
    assert worker.stop() == 0
    assert "received" not in worker.text, "level warning"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("-A", "shop", "--pool", "thread"), "cannot enforce the time limits of shop.render"),
        (("-A", "shop", "-Q", "report"), "Did you mean 'reports'?"),
        (("-A", "shop", "-Q", ""), "names no queue"),
        (("-A", "shop", "-Q", " , "), "names no queue"),
        (("-A", "shop:brigde"), "Did you mean shop:bridge?"),
        (("-A", "shop:app"), "not a Bridge"),
        (("-A", "shopp"), "Did you mean 'shop'?"),
        (("-A", "shop.py"), "-A shop:bridge"),
        (("-A", "wrong"), "did you mean 'broker'"),
        (("-A", "shop", "-P", "solo", "-c", "2"), "one task at a time"),
        (("-A", "shop", "-n", "%z x"), "%h is the host's name"),
        ((), "Missing option '-A'"),
    ],
)
def test_what_cannot_start_is_said_without_a_traceback(folder: Folder, arguments: tuple[str, ...], says: str) -> None:
    """One clean message on standard error, and exit code 2."""
    (folder.path / "wrong.py").write_text(
        "from qbridge import *\nbridge = Bridge(BridgeConfig(brokr='redis://:pw1234@h'))"
    )
    done = folder.run("worker", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert "pw1234" not in done.stderr


def test_a_failing_import_shows_the_modules_own_traceback(folder: Folder) -> None:
    """The frames of the import machinery and of qbridge are left out."""
    (folder.path / "broken.py").write_text("def make():\n    return absent\n\n\nbridge = make()\n")
    done = folder.run("worker", "-A", "broken")
    assert done.returncode == 2
    assert re.findall(r'File "[^"]*?([^"/]+)", line (\d+)', done.stderr) == [("broken.py", "5"), ("broken.py", "2")]
    assert "importing broken failed: NameError: name 'absent' is not defined" in done.stderr


def test_a_worker_waits_for_its_broker(tmp_path: Path) -> None:
    """Nothing listens: a log line for each attempt, no password in it, and SIGTERM ends the worker."""
    folder = Folder(tmp_path, broker="amqp://shop:pw1234@127.0.0.1:9//")
    try:
        worker = folder.start("worker", "-A", "shop")
        worker.wait_for("Trying again")
        assert worker.stop() == 0
        assert "pw1234" not in worker.text
    finally:
        folder.close()


def test_a_worker_that_is_refused_asks_again_in_peace(tmp_path: Path, qbridge_rabbitmq: RabbitMQServer) -> None:
    """A wrong password: one line per attempt, each later than the one before, no traceback; SIGTERM ends it."""
    with qbridge_rabbitmq.fresh() as url:
        folder = Folder(tmp_path, broker=re.sub("guest:[^@]*@", "guest:pw1234@", url))
        try:
            worker = folder.start("worker", "-A", "shop")
            text = worker.wait_for("refuses this worker", times=2)
            assert "ACCESS_REFUSED" in text
            assert "Trying again in 2 seconds" in text
            assert "Trying again in 4 seconds" in text
            assert "Traceback" not in text
            assert worker.stop() == 0
            assert "pw1234" not in worker.text
        finally:
            folder.close()


def test_reload_starts_the_worker_again_when_a_file_changes(folder: Folder) -> None:
    """The new code runs, also after a file that could not be imported; the end of the program ends the worker."""
    (folder.path / "shop.py").write_text(SHOP.replace(", time_limit=60", ""))
    program = folder.start("worker", "-A", "shop", "-P", "thread", "-c", "1", "--reload")
    program.ready()
    first = int(re.findall(r"\(process (\d+)\)", program.text)[-1])
    assert folder.bridge.send("shop.add", (1, 2)).get(timeout=20) == 3

    (folder.path / "shop.py").write_text("def :")
    program.wait_for("waiting for a change")
    assert "SyntaxError" in program.text
    assert not _alive(first)

    (folder.path / "shop.py").write_text(SHOP.replace(", time_limit=60", "").replace("a + b", "a * 100 + b"))
    program.ready(times=2)
    second = int(re.findall(r"\(process (\d+)\)", program.text)[-1])
    assert folder.bridge.send("shop.add", (1, 2)).get(timeout=20) == 102
    assert program.stop() == 0
    assert not _alive(second)


def test_beat_sends_what_is_due(folder: Folder) -> None:
    """Celery's beat runs on the bridge's app; its messages are in the bridge's queue."""
    schedule = "app.conf.beat_schedule = {'often': {'task': 'shop.add', 'schedule': 0.5, 'args': (1, 2)}}\n"
    (folder.path / "shop.py").write_text(SHOP + schedule)
    beat = folder.start("beat", "-A", "shop", "-s", str(folder.path / ".state" / "beat"))
    beat.wait_for("Sending due task", times=2)
    queues = {queue["name"]: queue for queue in folder.json("queues", "-A", "shop")["queues"]}
    assert queues["default"]["waiting"] >= 1
    assert beat.stop() == 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
