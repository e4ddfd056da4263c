"""Is a task run again if its worker dies, and ended well if the worker is asked to stop?"""

from __future__ import annotations

import time

import pytest
from billiard.exceptions import WorkerLostError

from qbridge import TaskFailed
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import MAX_REDELIVERIES, Contract
from qbridge.testing.waiting import wait_until


def test_a_killed_workers_task_runs_on_another(qbridge_contract: Contract) -> None:
    """kill -9 of a whole worker in the middle of a task: another worker runs it, and the caller gets the result.

    RabbitMQ notices at once and the embedded broker within seconds. On Redis another worker takes the message over once
    the ``lease`` of the dead one has ended, which is made short here.
    """
    contract = qbridge_contract
    path, release = contract.path(), contract.path("release")
    settings = {"QBRIDGE_BROKER__LEASE": "2"} if contract.broker == "redis" else {}
    rescuer = contract.another_bridge(**({"broker": {"lease": 2.0}} if settings else {}))
    contract.declare_on(rescuer)
    with contract.worker_of("fragile", settings=settings) as worker:
        result = contract.tasks.hold.using(queue="fragile").delay(str(path), str(release))
        wait_until(lambda: runs(path), 20, what="the task to run")
        worker.kill()
        killed = time.monotonic()
        with rescuer.worker(pool="thread", concurrency=1, queues=["fragile"]):
            wait_until(lambda: len(runs(path)) == 2, 30, what="the task to run again")
            waited = time.monotonic() - killed
            release.touch()
            assert result.get(timeout=20) == 2
    assert waited < 8


def test_a_killed_child_costs_a_run_and_not_the_task(qbridge_contract: Contract) -> None:
    """A process of the pool is killed in the middle of a task: the task runs again, as often as ``max_redeliveries``.

    One that was killed once brings its result; one that is killed each time has failed in the end, and is kept.
    """
    once, always = qbridge_contract.path(), qbridge_contract.path()
    saved = qbridge_contract.tasks.kill_child.delay(str(once), 1)
    lost = qbridge_contract.tasks.kill_child.delay(str(always), 100)
    assert saved.get(timeout=60) == 2
    with pytest.raises((WorkerLostError, TaskFailed), match=r"signal 9|WorkerLostError"):
        lost.get(timeout=90)
    assert lost.failed()
    assert (len(runs(once)), len(runs(always))) == (2, MAX_REDELIVERIES + 1)
    letter = qbridge_contract.dead_letter_of(lost.id)
    assert (letter.reason, letter.attempts, letter.crashes) == ("crashed", 1, MAX_REDELIVERIES + 1)


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
