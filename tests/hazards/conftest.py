"""Where the rows take place: an empty broker for each test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.hazards.kit import Place

from qbridge.testing.servers import RabbitMQServer, RedisServer

# RabbitMQ 4 is not what distributions have: nox -s rabbitmq4 brings one.
collect_ignore = [] if os.environ.get("QBRIDGE_TEST_RABBITMQ_ROOT") else ["test_row_05_rabbitmq4.py"]


@pytest.fixture
def on_redis(qbridge_redis: RedisServer, tmp_path: Path) -> Iterator[Place]:
    """An empty Redis."""
    with qbridge_redis.heal().fresh() as url:
        place = Place(url, tmp_path)
        yield place
        place.close()
        qbridge_redis.heal()


@pytest.fixture
def on_rabbitmq(qbridge_rabbitmq: RabbitMQServer, tmp_path: Path) -> Iterator[Place]:
    """An empty RabbitMQ."""
    with qbridge_rabbitmq.heal().fresh() as url:
        place = Place(url, tmp_path)
        yield place
        place.close()
        qbridge_rabbitmq.heal()
