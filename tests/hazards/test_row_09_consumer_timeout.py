"""Row 9: what becomes of a task that takes longer than RabbitMQ's ``consumer_timeout`` (half an hour)?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.servers import RabbitMQServer
from qbridge.testing.waiting import wait_until

TIMEOUT = 3.0
#: RabbitMQ looks at its channels once a minute, or as often as this says.
LOOK = 1.0


@pytest.fixture(scope="module")
def impatient() -> Iterator[RabbitMQServer]:
    """A node that closes a channel after three seconds without an acknowledgement."""
    looks = f"[{{rabbit, [{{channel_tick_interval, {LOOK * 1000:.0f}}}]}}]."
    with RabbitMQServer(settings={"consumer_timeout": f"{TIMEOUT * 1000:.0f}"}, advanced=looks) as server:
        yield server


@pytest.fixture
def place(impatient: RabbitMQServer, tmp_path: Path) -> Iterator[Place]:
    """An empty place on it."""
    with impatient.fresh() as url:
        place = Place(url, tmp_path)
        yield place
        place.close()


def test_plain_celery_ends(place: Place) -> None:
    """Its worker calls the closed channel an unrecoverable error, and is gone."""
    plain, path = place.plain(task_acks_late=True), place.path()
    with plain.worker("threads") as worker:
        plain.send("nap", path, 4 * TIMEOUT)
        wait_until(lambda: "Unrecoverable error" in worker.log.read_text(), 60, what="the end of the worker")
        assert worker.wait(60) != 0


@pytest.mark.parametrize("pool", ["process", "thread"])
def test_ours_goes_on(place: Place, pool: str) -> None:
    """It connects again and works; in threads the run that went on is the only one, processes begin again."""
    ours, path, release = place.ours(), place.path(), place.path("release")
    with ours.worker_of("fragile", pool=pool) as worker:
        result = ours.tasks.hold.using(queue="fragile").delay(str(path), str(release))
        wait_until(lambda: runs(path), 30, what="the task to run")
        wait_until(lambda: "Connection to broker lost" in worker.log.read_text(), 60, what="the closed channel")
        wait_until(lambda: len(runs(path)) == 2 or pool == "thread", 60, what="the second run")
        release.touch()
        assert result.get(timeout=60) >= 1
        assert ours.tasks.add.using(queue="fragile").delay(1).get(timeout=30) == 11
        assert worker.process.exit_code() is None
        wait_until(lambda: ours.depth("fragile") == 0, 20, what="an empty queue")
    assert len(runs(path)) == (1 if pool == "thread" else 2)


def test_ours_holds_no_delayed_task_that_long(place: Place) -> None:
    """The server keeps it, so nothing is unacknowledged, and nothing is closed."""
    ours, path = place.ours(), place.path()
    with ours.worker_of("fragile", pool="thread") as worker:
        began = time.time()
        result = ours.tasks.note.using(queue="fragile", countdown=4 * TIMEOUT).delay(str(path), "late")
        assert result.get(timeout=60) == "late"
        assert "Connection to broker lost" not in worker.log.read_text()
    [(_, when, _)] = runs(path)
    assert 4 * TIMEOUT - 0.1 <= when - began < 4 * TIMEOUT + 10


def test_plain_celery_holds_it(place: Place) -> None:
    """A countdown on a classic queue is held by a worker: it ends as if it were a long task."""
    plain, path = place.plain(task_acks_late=True), place.path()
    with plain.worker("solo") as worker:
        plain.send("note", path, countdown=8 * TIMEOUT)
        wait_until(lambda: "Unrecoverable error" in worker.log.read_text(), 60, what="the end of the worker")
