"""Does a worker end within the seconds that it is given, and does its unfinished task start elsewhere at once?"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract, WorkerProcess
from qbridge.testing.waiting import wait_until

TIMEOUT = 1.0
#: What a worker may take beyond its shutdown_timeout, and another one to begin.
SLACK = 5.0


@pytest.fixture(scope="module", params=["rabbitmq", "redis", "embedded"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    """A broker, and the contract's tasks."""
    folder = tmp_path_factory.mktemp("ending")
    results = f"sqlite:///{folder}/results.db"
    if request.param == "embedded":
        contract = Contract(f"embedded://{folder}/bridge.db", results, folder)
        yield contract
        contract.close()
        return
    with request.getfixturevalue(f"qbridge_{request.param}").fresh() as url:
        contract = Contract(url, results, folder)
        yield contract
        contract.close()


def ended(worker: WorkerProcess, began: float) -> float:
    """Seconds until it has ended, with exit code 0."""
    assert worker.wait(20) == 0, worker.log.read_text()
    return time.monotonic() - began


def environment(contract: Contract) -> Any:
    """The environment of workers that give running tasks a second."""
    original = contract.process_environment

    def changed() -> dict[str, str]:
        return {**original(), "QBRIDGE_WORKER__SHUTDOWN_TIMEOUT": str(TIMEOUT)}

    return changed


@pytest.mark.parametrize(("command", "pool"), [("qbridge", "process"), ("celery", "thread"), ("qbridge", "solo")])
def test_an_unfinished_task_starts_elsewhere(
    place: Contract, command: str, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in a task of a minute: the worker ends with 0 soon after shutdown_timeout, and another one runs it."""
    monkeypatch.setattr(place, "process_environment", environment(place))
    words = None if command == "qbridge" else ["-P", f"{pool}s"]
    path, release = place.path(), place.path("release")
    with place.worker_of("fragile", pool=pool, celery=words) as worker:
        result = place.tasks.hold.using(queue="fragile").delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        with place.bridge.worker(pool="solo", queues=["fragile"]):
            began = time.monotonic()
            worker.ask_to_stop()
            took = ended(worker, began)
            wait_until(lambda: len(runs(path)) == 2, SLACK, what="the task to run elsewhere")
            release.touch()
            assert result.get(timeout=20) == 2
    assert TIMEOUT <= took < TIMEOUT + SLACK


def test_an_idle_worker_ends_at_once(place: Contract) -> None:
    """Nothing runs: shutdown_timeout (25 seconds) is not waited for, whichever signal comes."""
    with place.worker_of("fragile") as worker:
        began = time.monotonic()
        os.kill(worker.pid, signal.SIGQUIT)
        took = ended(worker, began)
    assert took < SLACK
