"""Row 36: all connections to the broker are in use; does the next send hang, and do other applications?"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest
from tests.hazards.kit import Place

from qbridge import BrokerUnavailable

LONG = 12.0
BOUND = 2.0


def test_plain_celery_hangs_and_so_does_another_application(on_redis: Place) -> None:
    """One pool for each URL in a process: the other application's sends wait for the first one's connections."""
    one, other = on_redis.plain(broker_pool_limit=1), on_redis.plain(broker_pool_limit=1)
    assert one.app.pool is other.app.pool
    sending = threading.Thread(target=other.send, args=("add", 1, 2), daemon=True)
    with one.app.producer_pool.acquire(block=True) as producer:
        producer.channel  # noqa: B018 - it has its connection now
        sending.start()
        sending.join(LONG)
        assert sending.is_alive()
    sending.join(30)
    assert not sending.is_alive()


def test_ours_raises_in_time_and_the_other_one_sends(on_redis: Place) -> None:
    """Each bridge has its own; what is in use for longer than ``publish_timeout`` is an error that says so."""
    ours = on_redis.ours()
    bounds = {"publish_timeout": BOUND}
    busy, other = ours.another_bridge(broker=bounds), ours.another_bridge(broker=bounds)
    add, elsewhere = ours.declare_on(busy).add, ours.declare_on(other).add
    pool = busy.celery.producer_pool
    with ExitStack() as stack:
        for _ in range(pool.limit):
            stack.enter_context(pool.acquire(block=True))
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            add.delay(1, 2)
        assert time.monotonic() - began < BOUND + 1
        elsewhere.delay(1, 2)
    add.delay(1, 2)
