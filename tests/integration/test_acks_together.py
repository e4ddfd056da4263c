"""Acknowledgements that go together: none waits for the end of a long task, and none goes before its own."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qbridge.backends.rabbitmq.acks import HeldAcks
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.waiting import wait_until

QUEUE = "fragile"
SHORT = 21
ROOM = {"QBRIDGE_WORKER__PREFETCH": "64"}


def test_what_had_ended_before_a_long_task_is_not_run_again(contract: Contract) -> None:
    """The worker is killed in the middle of a long task that began right after short ones, which keep no results."""
    room = {**ROOM, "QBRIDGE_BROKER__LEASE": "5"} if contract.broker == "redis" else ROOM
    release, long = contract.path("release"), contract.path("long")
    paths = [contract.path() for _ in range(SHORT)]
    tasks = contract.tasks
    note = tasks.jot.using(queue=QUEUE)
    for path in paths:
        note.delay(str(path))
    held = tasks.hold.using(queue=QUEUE).delay(str(long), str(release))
    with contract.worker_of(QUEUE, pool="solo", settings=room) as worker:
        wait_until(lambda: runs(long), 20, what="the long task to begin")
        time.sleep(0.5)  # the length of the task: many times what an acknowledgement may wait for company
        worker.kill()
        assert [len(runs(path)) for path in paths] == [1] * SHORT
    with contract.worker_of(QUEUE, pool="solo", settings=room):
        wait_until(lambda: len(runs(long)) == 2, 30, what="the long task to begin again")
        release.touch()
        assert held.get(timeout=20) == 2
    assert [len(runs(path)) for path in paths] == [1] * SHORT
    assert not contract.depth_or_none(QUEUE), "on Redis an empty queue is none"


def test_short_tasks_end_where_the_next_one_waits_for_the_acknowledgement(contract: Contract) -> None:
    """With a prefetch of one, and of few: nothing waits for a timer."""
    for prefetch in (1, 3, 5):
        paths: list[Path] = [contract.path() for _ in range(60)]
        for path in paths:
            contract.tasks.jot.using(queue=QUEUE).delay(str(path))
        settings = {"QBRIDGE_WORKER__PREFETCH": str(prefetch)}
        with contract.worker_of(QUEUE, pool="solo", settings=settings) as worker:
            wait_until(lambda paths=paths: all(runs(path) for path in paths), 20, what="all of them")
            worker.ask_to_stop()
            assert worker.wait(20) == 0
        moments = sorted(runs(path)[0][1] for path in paths)
        assert moments[-1] - moments[0] < 3, "the slowest timer of a loop is a second"
        assert not contract.depth_or_none(QUEUE), "on Redis an empty queue is none"


def test_a_task_that_is_acknowledged_before_it_runs_does_not_take_its_worker_with_it_again(contract: Contract) -> None:
    """Its acknowledgement waits for no other one: it has arrived when the task begins."""
    path = contract.path()
    settings = {**ROOM, "QBRIDGE_BROKER__LEASE": "3"} if contract.broker == "redis" else ROOM
    with contract.worker_of(QUEUE, pool="solo", settings=settings) as worker:
        contract.tasks.kill_once.using(queue=QUEUE).delay(str(path))
        wait_until(lambda: worker.process.exit_code() is not None, 20, what="the worker to die of it")
    last = contract.path("last")
    contract.tasks.jot.using(queue=QUEUE).delay(str(last))
    with contract.worker_of(QUEUE, pool="solo", settings=settings):
        wait_until(lambda: runs(last), 40, what="the next task")
        if contract.broker == "redis":
            time.sleep(6)  # the length of the fault: its lease, and the look for those that are over
    assert len(runs(path)) == 1


@pytest.mark.parametrize("contract", ["embedded"], indirect=True)
def test_a_task_that_a_timer_begins_keeps_no_acknowledgement_waiting(contract: Contract) -> None:
    """One that is due, or may run by its rate: between an acknowledgement and the claim that would take it along."""
    held: list[int] = []
    bridge = contract.another_bridge(worker={"prefetch": 1})
    broker: Any = contract.bridge.config.broker

    @bridge.task(name="short", queue=QUEUE, results=False)
    def short() -> None:
        """End at once; in the next turn of the loop another one begins, before anything is claimed."""
        worker.consumer.call_soon(worker.consumer.on_task_request, None)

    with bridge.worker(pool="solo", queues=[QUEUE]) as worker:
        begin = worker.consumer._begin

        def look(request: Any) -> None:
            if request is not None:
                begin(request)
                return
            with closing(sqlite3.connect(broker.path)) as other:
                (count,) = other.execute("SELECT count(*) FROM message WHERE party IS NOT NULL").fetchone()
            held.append(count)

        worker.consumer._begin = look
        short.send_many([() for _ in range(20)])
        wait_until(lambda: len(held) == 20, 30, what="all to be seen")
    assert held == [0] * 20


@pytest.mark.parametrize("contract", ["rabbitmq"], indirect=True)
def test_a_worker_s_acknowledgements_go_together_on_each_connection(
    contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on the next one, after the first was lost."""
    seen: Counter[bool] = Counter()
    add = HeldAcks.add

    def counting(self: HeldAcks, frame: bytes) -> bool:
        held = add(self, frame)
        seen[held] += 1
        return held

    monkeypatch.setattr(HeldAcks, "add", counting)
    bridge = contract.another_bridge(worker={"prefetch": 64})
    contract.declare_on(bridge)
    jot = contract.tasks.jot.using(queue=QUEUE)
    with bridge.worker(pool="solo", queues=[QUEUE]) as worker:
        for lost in range(2):
            if lost:
                connection: Any = worker.consumer.connection._connection
                connection._transport.sock.shutdown(2)
                wait_until(lambda: worker.consumer.pulse.consuming, 30, what="the next connection")
            paths = [contract.path() for _ in range(100)]
            seen.clear()
            jot.send_many([(str(path),) for path in paths])
            wait_until(lambda paths=paths: all(runs(path) for path in paths), 30, what="all of them")
            assert seen[True] > 50
