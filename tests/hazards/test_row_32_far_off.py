"""Row 32: many tasks with a countdown of an hour: who holds them, and how long does a task of now wait?"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import WorkerProcess
from qbridge.testing.servers import RedisServer
from qbridge.testing.waiting import wait_until

FAR, NOW = 5000, 100


def resident(worker: WorkerProcess) -> float:
    """Memory of a worker in MB."""
    pages = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_plain_celery_takes_all_of_them(on_redis: Place) -> None:
    """Its worker holds each of them in memory, unacknowledged; it goes on to take more."""
    plain, path = on_redis.plain(), on_redis.path()
    with plain.worker("solo") as worker, RedisServer.at(on_redis.url).client() as client:
        before = resident(worker)
        for _ in range(FAR):
            plain.send("note", path, countdown=3600)
        for _ in range(NOW):
            plain.send("note", path, "now")
        wait_until(lambda: len(runs(path)) == NOW, 240, what="the tasks of now")
        held = client.hlen("unacked")
        print(f"plain Celery: {held} of {FAR} far-off tasks in one worker's hands, {resident(worker) - before:.0f} MB")
        assert held == FAR
        assert resident(worker) - before > 20


@pytest.mark.parametrize("broker", ["on_redis", "on_rabbitmq"])
def test_ours_sees_none_of_them(broker: str, request: pytest.FixtureRequest) -> None:
    """The server keeps them; neither the worker's memory nor the tasks of now notice."""
    place: Place = request.getfixturevalue(broker)
    ours, path = place.ours(), place.path()
    with ours.worker_of("fragile", pool="solo") as worker:
        ours.tasks.note.using(queue="fragile").delay(str(place.path())).get(timeout=30)
        before = resident(worker)
        ours.tasks.jot.using(queue="fragile", countdown=3600).send_many([(str(path),)] * FAR)
        began = time.monotonic()
        ours.tasks.jot.using(queue="fragile").send_many([(str(path),)] * NOW)
        wait_until(lambda: len(runs(path)) == NOW, 30, what="the tasks of now")
        print(f"ours: {time.monotonic() - began:.2f} s, {resident(worker) - before:.0f} MB")
        assert resident(worker) - before < 10
