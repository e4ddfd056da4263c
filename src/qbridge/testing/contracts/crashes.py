"""Is a task run again if its worker dies, and ended well if the worker is asked to stop?"""

from __future__ import annotations

import time

import pytest

from qbridge import TaskFailed
from qbridge.testing.contracts.kit import MAX_REDELIVERIES, Contract
from qbridge.testing.contracts.tasks import runs
from qbridge.testing.waiting import wait_until


def test_a_killed_workers_task_runs_on_another(qbridge_contract: Contract) -> None:
    """kill -9 of a whole worker in the middle of a task: another worker runs it, and the caller gets the result.

    RabbitMQ notices at once and the embedded broker within seconds. Redis gives the message back once it has not been
    acknowledged for ``visibility_timeout``, which is made short here.
    """
    contract = qbridge_contract
    path, release = contract.path(), contract.path("release")
    changes: dict[str, object] = {}
    if contract.broker == "redis":
        changes["broker"] = {"visibility_timeout": 2.0}
        changes["celery"] = {"broker_transport_options": {"unacked_restore_interval": 1}}
    rescuer = contract.another_bridge(**changes)
    contract.declare_on(rescuer)
    with contract.worker_of("fragile") as worker:
        result = contract.tasks.hold.using(queue="fragile").delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        worker.kill()
        killed = time.monotonic()
        with rescuer.worker(pool="thread", concurrency=1, queues=["fragile"]):
            wait_until(lambda: len(runs(path)) == 2, 30, what="the task to run again")
            waited = time.monotonic() - killed
            release.touch()
            assert result.get(timeout=20) == 2
    assert waited < (15 if contract.broker == "redis" else 8)


def test_a_killed_child_costs_a_run_and_not_the_task(qbridge_contract: Contract) -> None:
    """A process of the pool that is killed in the middle of a task: the task runs again, and its result arrives."""
    path = qbridge_contract.path()
    assert qbridge_contract.tasks.kill_child.delay(str(path), 1).get(timeout=60) == 2
    assert len(runs(path)) == 2


def test_a_task_that_kills_its_process_each_time_comes_to_an_end(qbridge_contract: Contract) -> None:
    """It is run as often as ``max_redeliveries`` says, and then it has failed."""
    path = qbridge_contract.path()
    result = qbridge_contract.tasks.kill_child.delay(str(path), 100)
    with pytest.raises((TaskFailed, Exception)) as caught:
        result.get(timeout=90)
    assert "WorkerLost" in f"{type(caught.value).__name__} {caught.value}"
    assert len(runs(path)) == MAX_REDELIVERIES + 1
    assert result.failed()


def test_a_worker_that_is_asked_to_stop_ends_its_task_first(qbridge_contract: Contract) -> None:
    """SIGTERM: the running task ends and its result arrives, the waiting one is left to others, the exit code is 0."""
    contract = qbridge_contract
    path, release, waiting = contract.path(), contract.path("release"), contract.path()
    contract.purge("fragile")
    with contract.worker_of("fragile") as worker:
        result = contract.tasks.hold.using(queue="fragile").delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        later = contract.tasks.note.using(queue="fragile").delay(str(waiting), "later")
        worker.ask_to_stop()
        wait_until(lambda: "shutdown" in worker.log.read_text().lower(), 20, what="the worker to begin to stop")
        release.touch()
        assert result.get(timeout=30) == 1
        assert worker.wait(30) == 0
    assert runs(waiting) == []
    with contract.bridge.worker(pool="solo", queues=["fragile"]):
        assert later.get(timeout=30) == "later"
    assert len(runs(path)) == 1
