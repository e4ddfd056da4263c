"""Row 20: SIGTERM in the middle of a long task: does the worker end within the grace period, and what of its task?"""

from __future__ import annotations

import time

import pytest
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.waiting import wait_until

GRACE = 10.0


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_plain_celery_is_killed_and_its_task_is_hidden(on_redis: Place, pool: str) -> None:
    """It waits for the task; the platform kills it; the message is nobody's for an hour (``visibility_timeout``)."""
    plain, path, release = on_redis.plain(task_acks_late=True), on_redis.path(), on_redis.path("release")
    with plain.worker(pool) as worker:
        plain.send("hold", path, release)
        wait_until(lambda: runs(path), 30, what="the task to run")
        worker.ask_to_stop()
        time.sleep(GRACE)
        assert worker.process.exit_code() is None, "the grace period is over, and it waits"
        worker.kill()
    with plain.worker(pool):
        other = on_redis.path()
        plain.send("note", other)
        wait_until(lambda: runs(other), 30, what="another worker to work")
        time.sleep(5)
        assert len(runs(path)) == 1


@pytest.mark.parametrize("pool", ["process", "thread", "solo"])
def test_ours_ends_in_time_and_its_task_starts_elsewhere(on_redis: Place, pool: str) -> None:
    """After shutdown_timeout what still runs goes back to the queue, and is another worker's within five seconds."""
    ours, path, release = on_redis.ours(), on_redis.path(), on_redis.path("release")
    settings = {"QBRIDGE_WORKER__SHUTDOWN_TIMEOUT": str(GRACE / 2)}
    with ours.worker_of("fragile", pool=pool, settings=settings) as worker:
        result = ours.tasks.hold.using(queue="fragile").delay(str(path), str(release))
        wait_until(lambda: runs(path), 30, what="the task to run")
        with ours.worker_of("fragile", pool=pool):
            worker.ask_to_stop()
            assert worker.wait(GRACE) == 0
            wait_until(lambda: len(runs(path)) == 2, 5, what="the task to start elsewhere")
            release.touch()
            assert result.get(timeout=30) == 2
