"""Row 8: is a retry lost when the broker is away at the moment at which it is asked for?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.servers import RabbitMQServer, RedisServer, Server
from qbridge.testing.waiting import wait_until


@pytest.fixture(params=["rabbitmq", "redis"])
def trouble(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Server, Place]]:
    """A broker that keeps its messages while it is away."""
    if request.param == "redis":
        with RedisServer(appendonly=True) as server:
            place = Place(server.url, tmp_path)
            yield server, place
            place.close()
        return
    server_: RabbitMQServer = request.getfixturevalue("qbridge_rabbitmq")
    with server_.heal().fresh() as url:
        place = Place(url, tmp_path)
        yield server_, place
        server_.heal()
        place.close()


def test_plain_celery_gives_the_task_up(trouble: tuple[Server, Place]) -> None:
    """By default the message is acknowledged by then, and the next one cannot be sent: nobody runs the task again."""
    server, place = trouble
    plain = place.plain(
        results=f"db+sqlite:///{place.folder}/plain.db",
        # else the attempt waits for the broker, which is what the row is not about
        task_publish_retry=False,
    )
    path, release = place.path(), place.path("release")
    with plain.worker("threads") as worker:
        result = plain.send("fragile", path, release)
        wait_until(lambda: runs(path), 30, what="the first attempt")
        server.stop()
        release.touch()
        wait_until(lambda: "Reject" in worker.log.read_text() or result.state == "FAILURE", 60, what="the end of it")
        server.heal()
        other = place.path("other")
        place.plain().send("note", other)
        wait_until(lambda: runs(other), 120, what="the worker to work again")
        time.sleep(8)  # the retry was to come after one
        words: Any = [word for _, _, word in runs(path)]
        assert "1" not in words, "no second attempt was made"
