"""Row 2: Redis takes connections and answers nothing; does a web request that sends a task hang?"""

from __future__ import annotations

import threading
import time

import pytest
from tests.hazards.kit import Place

from qbridge import BrokerUnavailable
from qbridge.testing.servers import RedisServer

LONG = 15.0
BOUND = 3.0


def test_plain_celery_hangs(on_redis: Place, qbridge_redis: RedisServer) -> None:
    """For as long as the server is like that."""
    plain = on_redis.plain()
    sending = threading.Thread(target=plain.send, args=("add", 1, 2), daemon=True)
    qbridge_redis.freeze()
    try:
        sending.start()
        sending.join(LONG)
        assert sending.is_alive()
    finally:
        qbridge_redis.thaw()
    sending.join(30)
    assert not sending.is_alive()


@pytest.mark.parametrize("warm", [True, False], ids=["connected before", "not connected yet"])
def test_ours_raises_in_time(on_redis: Place, qbridge_redis: RedisServer, warm: bool) -> None:
    """Within ``publish_timeout``, and says what to try."""
    ours = on_redis.ours()
    bridge = ours.another_bridge(broker={"publish_timeout": BOUND})
    add = ours.declare_on(bridge).add
    if warm:
        add.delay(1, 2)
    qbridge_redis.freeze()
    try:
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable, match="qbridge check"):
            add.delay(1, 2)
        assert time.monotonic() - began < BOUND + 1
    finally:
        qbridge_redis.thaw()
    add.delay(1, 2)
