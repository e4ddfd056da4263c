"""Row 5: RabbitMQ 4 and classic queues: do tasks with a countdown keep those of now from running?"""

from __future__ import annotations

import time

import pytest
from tests.hazards.kit import Place

from qbridge import UnsupportedFeature
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.waiting import wait_until


def test_plain_celery_stands_still(on_rabbitmq: Place) -> None:
    """Two places, two tasks of an hour from now: the server would have to be told of more room, and is not."""
    plain, path = on_rabbitmq.plain(worker_prefetch_multiplier=1), on_rabbitmq.path()
    with plain.worker("threads", 2) as worker:
        for _ in range(2):
            plain.send("note", path, countdown=3600)
        wait_until(lambda: worker.log.read_text().count("received") == 2, 30, what="both to be taken")
        plain.send("note", path, "now")
        time.sleep(15)
        assert runs(path) == []


def test_ours_goes_on(on_rabbitmq: Place) -> None:
    """The server keeps them, in quorum queues; a task of now runs at once."""
    ours, path = on_rabbitmq.ours(), on_rabbitmq.path()
    with ours.worker_of("fragile", pool="thread", concurrency=2):
        ours.tasks.note.using(queue="fragile").delay(str(on_rabbitmq.path())).get(timeout=30)
        for _ in range(2):
            ours.tasks.note.using(queue="fragile", countdown=3600).delay(str(path))
        began = time.monotonic()
        ours.tasks.note.using(queue="fragile").delay(str(path), "now")
        wait_until(lambda: runs(path), 30, what="the task of now")
        assert time.monotonic() - began < 5


def test_ours_refuses_what_cannot_work(on_rabbitmq: Place) -> None:
    """A countdown to a classic queue has nobody there who could keep it; a send without one goes on."""
    bridge = on_rabbitmq.ours().another_bridge(broker={"queue_type": "classic"}, queues=["classic"])

    @bridge.task(name="row5.nothing", queue="classic")
    def nothing() -> None:
        """Do nothing."""

    nothing.delay()
    with pytest.raises(UnsupportedFeature, match="classic"):
        nothing.using(countdown=60).delay()
