"""Row 17: does a worker work on after Redis was restarted, again and again, or after its connection stood still?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.proxy import TcpProxy
from qbridge.testing.servers import RedisServer
from qbridge.testing.waiting import wait_until

RESTARTS = 5
#: Seconds after the trouble within which a new task must have run.
AGAIN = 60.0
STALL = 40.0


@pytest.fixture
def keeping(tmp_path: Path) -> Iterator[tuple[RedisServer, Place]]:
    """A Redis of one's own, that keeps its messages over a restart."""
    with RedisServer(appendonly=True, settings={"appendfsync": "everysec"}) as server:
        place = Place(server.url, tmp_path)
        yield server, place
        place.close()


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_plain_celery_has_mended_restarts(keeping: tuple[RedisServer, Place], pool: str) -> None:
    """The silence that people report up to kombu 5.5 is gone in 5.7."""
    server, place = keeping
    plain = place.plain()
    with plain.worker(pool):
        for _ in range(RESTARTS):
            server.restart()
            path = place.path()
            plain.send("note", path)
            wait_until(lambda path=path: runs(path), AGAIN, what="a task after the restart")


@pytest.mark.parametrize("pool", ["process", "thread", "solo"])
def test_ours_works_on_after_restarts(keeping: tuple[RedisServer, Place], pool: str) -> None:
    """Each time, with the results on the same Redis."""
    server, place = keeping
    ours = place.ours(results=place.url)
    with ours.worker_of("fragile", pool=pool) as worker:
        for _ in range(RESTARTS):
            server.restart()
            result = ours.tasks.note.using(queue="fragile").delay(str(place.path()), "again")
            assert result.get(timeout=AGAIN) == "again"
        assert worker.process.exit_code() is None


@pytest.mark.parametrize("pool", ["process", "thread", "solo"])
def test_ours_works_on_after_a_stalled_connection(on_redis: Place, pool: str) -> None:
    """No byte, FIN or RST comes for forty seconds, as behind a firewall that drops; then the network is back."""
    ours, path = on_redis.ours(), on_redis.path()
    with TcpProxy.to(on_redis.url) as proxy:
        settings = {"QBRIDGE_BROKER": proxy.url(on_redis.url)}
        with ours.worker_of("fragile", pool=pool, settings=settings) as worker:
            ours.tasks.note.using(queue="fragile").delay(str(on_redis.path())).get(timeout=30)
            proxy.stall()
            result = ours.tasks.note.using(queue="fragile").delay(str(path), "again")
            time.sleep(STALL)  # the length of the fault
            proxy.resume()
            assert result.get(timeout=AGAIN) == "again"
            assert worker.process.exit_code() is None
