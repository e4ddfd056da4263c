"""Row 16: on Redis, are tasks lost when a worker is killed at the wrong moment?"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import WorkerProcess
from qbridge.testing.waiting import wait_until

COUNT = 3000
KILLS = 15


def ran(path: Path) -> set[str]:
    """Numbers that ran."""
    return {word for _, _, word in runs(path)}


def kill_again_and_again(worker: Callable[[], AbstractContextManager[WorkerProcess]], path: Path) -> None:
    """``kill -9`` in the middle of a drain, at random moments."""
    luck = random.Random(16)
    for _ in range(KILLS):
        before = len(runs(path))
        with worker() as process:
            wait_until(lambda low=before: len(runs(path)) > low, 60, what="a run", interval=0.001)
            time.sleep(luck.uniform(0, 0.1))  # the moment is what it is about
            process.kill()
        if len(ran(path)) == COUNT:
            return


def missing(path: Path) -> int:
    """Tasks that did not run, once nothing has run any more for fifteen seconds."""
    last = (-1, time.monotonic())
    while len(ran(path)) < COUNT and time.monotonic() - last[1] < 15:
        if len(runs(path)) != last[0]:
            last = (len(runs(path)), time.monotonic())
        time.sleep(0.2)
    return COUNT - len(ran(path))


@pytest.mark.parametrize("late", [False, True], ids=["defaults", "acks_late"])
def test_plain_celery(on_redis: Place, late: bool) -> None:
    """By default each kill takes what was acknowledged and not begun; acknowledging late leaves a window of BRPOP."""
    options = {"visibility_timeout": 5, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    plain, path = on_redis.plain(task_acks_late=late, broker_transport_options=options), on_redis.path()
    for number in range(COUNT):
        plain.send("note", path, str(number))
    kill_again_and_again(lambda: plain.worker("solo"), path)
    with plain.worker("solo"):
        lost = missing(path)
    print(f"plain Celery, {'acks_late' if late else 'defaults'}: {lost} of {COUNT} never ran after {KILLS} kills")
    if not late:
        assert lost > 0


def test_ours_loses_nothing(on_redis: Place) -> None:
    """One script takes a message and notes whose it is; what a dead worker held is taken over."""
    ours, path = on_redis.ours(), on_redis.path()
    settings = {"QBRIDGE_BROKER__LEASE": "1.5"}
    ours.tasks.note.using(queue="fragile").send_many([(str(path), str(number)) for number in range(COUNT)])
    kill_again_and_again(lambda: ours.worker_of("fragile", pool="solo", settings=settings), path)
    with ours.worker_of("fragile", pool="solo", settings=settings):
        assert missing(path) == 0
