"""What becomes of a task that ends with sys.exit, a MemoryError, a KeyboardInterrupt: may only that task fail?"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbridge import Bridge, BridgeConfig, TaskFailed
from qbridge.cli.depths import read_depths
from qbridge.testing.contracts.kit import WorkerProcess
from qbridge.testing.waiting import wait_until

HERE = Path(__file__).parent


class Place:
    """One worker with room for one task, and a bridge that sends to it."""

    def __init__(self, bridge: Bridge, worker: WorkerProcess, folder: Path) -> None:
        self.bridge = bridge
        self.worker = worker
        self.folder = folder

    def failure(self, task: str, how: str) -> BaseException:
        """Run a task that cannot end well, once, in a worker that is well afterwards; return what its caller gets."""
        log = self.folder / f"{task}-{how}"
        with pytest.raises(Exception) as caught:
            self.bridge.send(task, (str(log), how)).get(timeout=20)
        assert self.bridge.send("hard.add", (20, 22)).get(timeout=20) == 42
        assert len(log.read_text().splitlines()) == 1
        assert self.worker.process.exit_code() is None
        return caught.value


@pytest.fixture(scope="module", params=["process", "thread", "solo"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hard_ends")
    urls = {"broker": f"embedded://{folder}/bridge.db", "results": f"sqlite:///{folder}/results.db"}
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "QBRIDGE_BROKER": urls["broker"],
        "QBRIDGE_RESULTS": urls["results"],
    }
    command = [sys.executable, "-m", "qbridge", "worker", "-A", "hard_ends_app:bridge", "--pool", request.param]
    worker = WorkerProcess([*command, "--concurrency", "1"], environment, folder)
    try:
        _ = worker.name
        with Bridge(BridgeConfig(**urls)) as bridge:  # type: ignore[arg-type]  # URL strings are taken
            yield Place(bridge, worker, folder)
    finally:
        worker.kill()


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("SystemExit", "wrong usage"),
        ("KeyboardInterrupt", ""),
        ("GeneratorExit", ""),
        ("CancelledError", ""),
        ("BaseExceptionGroup", "both"),
        ("OwnBase", "mine"),
    ],
)
def test_an_end_that_is_no_exception_is_the_failure_of_one_task(place: Place, how: str, text: str) -> None:
    """It runs once and has failed, told by type and text; Celery ends a worker, or runs the task again and again."""
    error = place.failure("hard.end", how)
    assert isinstance(error, TaskFailed)
    assert error.type_name.rpartition(".")[2] == how
    assert text in error.message


def test_a_memory_error_is_the_failure_of_one_task(place: Place) -> None:
    """Celery ends the whole worker on it, and the message, not acknowledged, ends the next one."""
    assert str(place.failure("hard.end", "MemoryError")) == "Unable to allocate 7.28 TiB"


def test_the_loss_of_another_tasks_worker_is_a_failure_as_any(place: Place) -> None:
    """Who waits for another task in a task gets its WorkerLostError; it was taken for the loss of this one's worker.

    The task ran again and again, after its caller was told of the failure, and became a dead letter.
    """

    def settled() -> bool:
        depths = read_depths(place.bridge, 5)
        return not depths.held and not any(each.waiting or each.running for each in depths.queues)

    error = place.failure("hard.end", "WorkerLostError")
    assert "which this one has waited for" in str(error)
    wait_until(settled, 30, what="an empty queue")
    assert len((place.folder / "hard.end-WorkerLostError").read_text().splitlines()) == 1
    assert place.bridge.dead_letters.list() == []


@pytest.mark.parametrize("how", ["SystemExit", "KeyboardInterrupt"])
def test_the_loop_of_async_tasks_survives_such_an_end(place: Place, how: str) -> None:
    """asyncio ends a loop on it; the next async task runs all the same."""
    error = place.failure("hard.async_end", how)
    assert isinstance(error, TaskFailed)
    assert error.type_name.rpartition(".")[2] == how


def test_the_loop_of_async_tasks_survives_being_stopped(place: Place) -> None:
    """A task that stops the loop it runs on comes to its own end, and so do those after it."""
    assert isinstance(place.failure("hard.async_end", "stop"), OSError)
