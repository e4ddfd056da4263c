"""Rows 4 and 42: what becomes of a task that kills whoever runs it?"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

from billiard.exceptions import WorkerLostError
from tests.hazards.kit import Place

from qbridge import TaskFailed
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import MAX_REDELIVERIES
from qbridge.testing.waiting import wait_until


def ran(path: Path, times: int) -> bool:
    """Whether there have been so many runs."""
    return len(runs(path)) >= times


def kill_the_runner(path: Path) -> None:
    """Kill the process that noted the last run."""
    os.kill(int(runs(path)[-1][0]), signal.SIGKILL)


def test_plain_celery_loses_a_task_with_its_process(on_rabbitmq: Place) -> None:
    """By default it is acknowledged when it begins: one run, and nothing is left of it."""
    plain, path = on_rabbitmq.plain(), on_rabbitmq.path()
    after = on_rabbitmq.path("after")
    with plain.worker("prefork"):
        plain.send("hold", path, on_rabbitmq.path("release"))
        wait_until(partial(ran, path, 1), 20, what="the run")
        kill_the_runner(path)
        plain.send("note", after)
        wait_until(partial(ran, after, 1), 20, what="the next task")
    assert len(runs(path)) == 1


def test_plain_celery_runs_a_killer_for_ever(on_rabbitmq: Place) -> None:
    """With acks_late and reject_on_worker_lost, as people are told: killed six times, it comes a seventh time."""
    plain = on_rabbitmq.plain(quorum=True, task_acks_late=True, task_reject_on_worker_lost=True)
    path = on_rabbitmq.path()
    with plain.worker("prefork"):
        plain.send("hold", path, on_rabbitmq.path("release"))
        for number in range(1, 7):
            wait_until(partial(ran, path, number), 20, what=f"run {number}")
            kill_the_runner(path)
        wait_until(partial(ran, path, 7), 20, what="one more run")


def test_ours_gives_a_killer_up(on_rabbitmq: Place) -> None:
    """``max_redeliveries`` further runs, then a failure and a dead letter, and the worker works on."""
    ours, path = on_rabbitmq.ours(), on_rabbitmq.path()
    with ours.worker_of("default", pool="process"):
        result = ours.tasks.kill_child.delay(str(path), 100)
        try:
            result.get(timeout=60)
        except (WorkerLostError, TaskFailed):
            pass
        [letter] = ours.bridge.dead_letters.list()
        assert ours.tasks.add.delay(1, 2).get(timeout=20) == 3
    assert len(runs(path)) == MAX_REDELIVERIES + 1
    assert letter.reason == "crashed"
