"""Row 29: somebody waits for the result of a task that nobody has sent; for how long?"""

from __future__ import annotations

import threading
import time

import pytest
from celery.result import AsyncResult
from tests.hazards.kit import Place

from qbridge import ResultTimeout

LONG = 10.0


def test_plain_celery_waits_for_ever(on_redis: Place) -> None:
    """An id that nobody knows is PENDING, as one that waits in a queue, and ``get()`` has no end of its own."""
    plain = on_redis.plain(results=on_redis.url)
    result: AsyncResult = AsyncResult("nobody-has-sent-it", app=plain.app)
    assert result.state == "PENDING"
    ended = threading.Event()

    def wait() -> None:
        try:
            result.get(timeout=LONG + 5)  # an end for this test's sake
        except Exception:
            ended.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    assert not ended.wait(LONG)
    waiting.join(30)


def test_ours_has_an_end_always(on_redis: Place) -> None:
    """``get`` asks for a time, and one without an end is refused; so is the missing one by the configuration's."""
    ours = on_redis.ours(on_redis.url)
    result = ours.bridge.result("nobody-has-sent-it", of=int)
    began = time.monotonic()
    with pytest.raises(ResultTimeout):
        result.get(timeout=0.5)
    assert time.monotonic() - began < 3
    with pytest.raises(ValueError, match="timeout"):
        result.get(timeout=float("inf"))
