"""Row 1: on Redis, does a task that takes longer than the visibility timeout run once?"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.waiting import wait_until

VISIBILITY = 4
LONG = 14


def begun(path: Any) -> int:
    """How many runs there have been."""
    return sum(word == "begin" for _, _, word in runs(path))


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_plain_celery_runs_a_long_task_again_and_again(on_redis: Place, pool: str) -> None:
    """Whoever restores what is older than the timeout cannot know that its worker is alive and busy."""
    plain = on_redis.plain(
        task_acks_late=True,
        worker_prefetch_multiplier=1,
        broker_transport_options={"visibility_timeout": VISIBILITY, "unacked_restore_interval": 1},
    )
    path = on_redis.path()
    with plain.worker(pool), plain.worker(pool):
        plain.send("nap", path, LONG)
        wait_until(lambda: begun(path) >= 2, 30, what="a second run")
        assert not any(word == "end" for _, _, word in runs(path)), "the first run had not ended"


@pytest.mark.parametrize("pool", ["process", "thread", "solo"])
def test_ours_runs_it_once(on_redis: Place, pool: str) -> None:
    """A worker that lives renews its lease, however busy it is."""
    ours, path = on_redis.ours(), on_redis.path()
    settings = {"QBRIDGE_BROKER__LEASE": str(VISIBILITY)}
    with ExitStack() as workers:
        for _ in range(2):
            workers.enter_context(ours.worker_of("fragile", pool=pool, settings=settings))
        result = ours.tasks.nap.using(queue="fragile").delay(str(path), LONG)
        assert result.get(timeout=40) == LONG
    assert [word for _, _, word in runs(path)] == ["begin", "end"]


def test_plain_celery_runs_a_delayed_task_twice(on_redis: Place) -> None:
    """A countdown is held by a worker, unacknowledged, and is thought abandoned in the same way."""
    plain = on_redis.plain(broker_transport_options={"visibility_timeout": 3, "unacked_restore_interval": 1})
    path = on_redis.path()
    with plain.worker("solo"), plain.worker("solo"):
        plain.send("note", path, countdown=10)
        wait_until(lambda: len(runs(path)) >= 2, 25, what="a second run")


def test_ours_runs_a_delayed_task_once(on_redis: Place) -> None:
    """It lies in a schedule on the server, and is in no worker's hands until it is due."""
    ours, path = on_redis.ours(), on_redis.path()
    settings = {"QBRIDGE_BROKER__LEASE": "3"}
    with ours.worker_of("fragile", pool="solo", settings=settings), ours.worker_of("fragile", settings=settings):
        assert ours.tasks.note.using(queue="fragile", countdown=10).delay(str(path), "x").get(timeout=25) == "x"
        ours.tasks.note.using(queue="fragile").delay(str(on_redis.path())).get(timeout=10)
    assert len(runs(path)) == 1
