"""Row 34: a caller sends again because it has seen no answer; how often does the task run?"""

from __future__ import annotations

import threading

import pytest
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.waiting import wait_until


def test_plain_celery_runs_it_as_often_as_it_is_sent(on_redis: Place) -> None:
    """The id of the task is no key: a second message with it is run like any other."""
    plain, path = on_redis.plain(), on_redis.path()
    for _ in range(3):
        plain.send("note", path, task_id="order-7")
    with plain.worker("solo"):
        wait_until(lambda: len(runs(path)) == 3, 20, what="three runs")


@pytest.mark.parametrize("results", ["redis", "database"])
def test_ours_runs_it_once(on_redis: Place, results: str) -> None:
    """Twenty threads send with one key: one task, one run, and its handle for all; also after it has run."""
    ours = on_redis.ours(on_redis.url if results == "redis" else None)
    path = on_redis.path()
    note = ours.tasks.note.using(queue="fragile", idempotency_key="order 7")
    ids: list[str] = []

    def send() -> None:
        ids.append(note.delay(str(path), "seven").id)

    senders = [threading.Thread(target=send) for _ in range(20)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert len(ids) == 20
    assert len(set(ids)) == 1
    with ours.worker_of("fragile", pool="thread", concurrency=2):
        assert note.delay(str(path), "seven").get(timeout=20) == "seven"
        assert note.delay(str(path), "seven").id == ids[0]
    assert len(runs(path)) == 1
