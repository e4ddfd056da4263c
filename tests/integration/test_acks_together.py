"""Acknowledgements that go together: none waits for the end of a long task, and none goes before its own."""

from __future__ import annotations

import time
from pathlib import Path

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
