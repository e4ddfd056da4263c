"""Row 49: threads, late acknowledgement and a prefetch of one: does each task wait seconds for the one before it?"""

from __future__ import annotations

import pytest
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.waiting import wait_until

COUNT = 100
#: Seconds between the first run and the last; the hazard was one second or more for each.
SOON = 10.0


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_plain_celery_has_mended_it_on_redis(on_redis: Place, pool: str) -> None:
    """kombu 5.7 wakes its event loop for an acknowledgement; on RabbitMQ, too, but for the solo pool."""
    plain, path = on_redis.plain(task_acks_late=True, worker_prefetch_multiplier=1), on_redis.path()
    for _ in range(COUNT):
        plain.send("note", path)
    with plain.worker(pool):
        wait_until(lambda: len(runs(path)) == COUNT, 120, what="all tasks")
    times = [when for _, when, _ in runs(path)]
    assert max(times) - min(times) < SOON


@pytest.mark.parametrize("pool", ["thread", "solo"])
@pytest.mark.parametrize("broker", ["on_redis", "on_rabbitmq"])
def test_ours(broker: str, pool: str, request: pytest.FixtureRequest) -> None:
    """On either broker."""
    place: Place = request.getfixturevalue(broker)
    ours, path = place.ours(), place.path()
    ours.tasks.note.using(queue="fragile").send_many([(str(path),)] * COUNT)
    with ours.worker_of("fragile", pool=pool):
        wait_until(lambda: len(runs(path)) == COUNT, 120, what="all tasks")
    times = [when for _, when, _ in runs(path)]
    assert max(times) - min(times) < SOON
