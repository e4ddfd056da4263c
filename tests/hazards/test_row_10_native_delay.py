"""Row 10: a delayed task on a quorum queue, sent before any worker has ever run there: does it run, once, in time?"""

from __future__ import annotations

import time

import pytest
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.waiting import wait_until


def test_plain_celery_loses_it(on_rabbitmq: Place) -> None:
    """What keeps delays is declared by workers only, when they start: the message goes nowhere, and nobody says so."""
    plain, path, other = on_rabbitmq.plain(quorum=True), on_rabbitmq.path(), on_rabbitmq.path("other")
    plain.send("note", path, countdown=3)
    with plain.worker("solo"):
        with pytest.raises(Exception, match="NOT_FOUND"):
            plain.send("note", other)  # which has nothing to do with it
        plain.send("note", other)
        wait_until(lambda: runs(other), 60, what="one that is not delayed")
        time.sleep(8)  # the delay is long over
        assert runs(path) == []


def test_plain_celery_refuses_half_a_second(on_rabbitmq: Place) -> None:
    """RabbitMQ's delays are whole seconds, and Celery cuts the rest off."""
    plain = on_rabbitmq.plain(quorum=True)
    with plain.worker("solo"), pytest.raises(ValueError, match="positive"):
        plain.send("note", on_rabbitmq.path(), countdown=0.5)


@pytest.mark.parametrize("countdown", [3, 0.5])
def test_ours_runs_it(on_rabbitmq: Place, countdown: float) -> None:
    """Who sends declares what keeps delays; the part below a second is the worker's to wait for."""
    ours, path = on_rabbitmq.ours(), on_rabbitmq.path()
    sent = time.time()
    result = ours.tasks.note.using(queue="fragile", countdown=countdown).delay(str(path), "x")
    with ours.worker_of("fragile", pool="solo"):
        ready = time.time()
        assert result.get(timeout=30) == "x"
    [(_, when, _)] = runs(path)
    assert sent + countdown - 0.05 <= when < max(sent + countdown, ready) + 5
