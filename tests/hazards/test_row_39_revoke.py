"""Row 39: a task is revoked while it waits, and all workers restart; does it run?"""

from __future__ import annotations

import time

import pytest
from tests.hazards.kit import Place

from qbridge import TaskRevoked
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.waiting import wait_until


def test_plain_celery_has_forgotten_it(on_rabbitmq: Place) -> None:
    """The workers that ran at that moment knew, in their memory."""
    plain, path, release, busy = (
        on_rabbitmq.plain(), on_rabbitmq.path(), on_rabbitmq.path("release"), on_rabbitmq.path(),
    )  # fmt: skip
    with plain.worker("prefork", 1, "--prefetch-multiplier", "1") as worker:
        plain.send("hold", busy, release)
        wait_until(lambda: len(runs(busy)) == 1, 20, what="the worker to be busy")
        result = plain.send("note", path)
        plain.app.control.revoke(result.id)
        wait_until(lambda: "revoked" in worker.log.read_text(), 20, what="the worker to hear it")
        worker.kill()
    release.touch()
    with plain.worker("solo"):
        wait_until(lambda: len(runs(path)) == 1, 20, what="the run")


@pytest.mark.parametrize("pool", ["process", "thread", "solo"])
def test_ours_does_not_run_it(on_rabbitmq: Place, pool: str) -> None:
    """Workers that start later read it beside the results; the caller is told."""
    ours, path = on_rabbitmq.ours(), on_rabbitmq.path()
    with ours.worker_of("fragile", pool=pool) as worker:
        assert ours.tasks.add.using(queue="fragile").delay(1).get(timeout=20) == 11
        worker.kill()
    result = ours.tasks.note.using(queue="fragile").delay(str(path))
    result.revoke()
    with ours.worker_of("fragile", pool=pool):
        with pytest.raises(TaskRevoked):
            result.get(timeout=20)
        time.sleep(1)
    assert runs(path) == []


@pytest.mark.parametrize("pool", ["process", "thread", "solo"])
def test_ours_ends_a_running_one(on_rabbitmq: Place, pool: str) -> None:
    """``ctx.check()`` sees it on every pool; Celery needs ``terminate=True``, and a pool of processes."""
    ours, path = on_rabbitmq.ours(), on_rabbitmq.path()
    with ours.worker_of("fragile", pool=pool):
        result = ours.tasks.patient.using(queue="fragile").delay(str(path))
        wait_until(lambda: len(runs(path)) == 1, 20, what="the run")
        result.revoke()
        with pytest.raises(TaskRevoked, match="while it ran"):
            result.get(timeout=20)
