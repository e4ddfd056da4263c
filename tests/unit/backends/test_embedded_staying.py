"""What is left of a connection to the embedded broker that was closed while tasks with its messages ran on?"""

from __future__ import annotations

import gc
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Consumer, Queue

from qbridge.backends.embedded import EmbeddedBroker, register
from qbridge.backends.embedded.presence import _own

assert register.SCHEME

WORK = Queue("work")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Three messages wait there."""
    url = EmbeddedBroker(path=tmp_path / "bridge.db").celery_url()
    with Connection(url) as sender:
        for number in range(3):
            sender.Producer().publish(number, routing_key="work", declare=[WORK])
    return url


@pytest.fixture
def other(url: str) -> Iterator[Connection]:
    """Another consumer, which looks at all that dead ones have left."""
    with Connection(url) as other:
        other.default_channel.connection.party()
        yield other


def receive(connection: Connection) -> list[Any]:
    """What a new consumer gets before there is a pause."""
    messages: list[Any] = []
    consumer = Consumer(connection.channel(), [WORK], on_message=messages.append)
    consumer.consume()
    connection.default_channel.connection.sweep()
    try:
        while True:
            connection.drain_events(timeout=0.05)
    except TimeoutError:
        consumer.cancel()
        return messages


def closed(url: str, *, keep: int) -> list[Any]:
    """Messages of a connection that was closed, of which the first ones are kept."""
    connection = Connection(url)
    messages = receive(connection)
    messages[0].channel.keep([message.delivery_tag for message in messages[:keep]])
    connection.release()
    return messages


def parties(tmp_path: Path) -> int:
    """Who stands in the file."""
    with closing(sqlite3.connect(tmp_path / "bridge.db")) as file:
        return int(file.execute("SELECT count(*) FROM party").fetchone()[0])


def test_what_is_kept_is_settled_and_the_rest_goes_back(url: str, other: Connection, tmp_path: Path) -> None:
    """Nobody else gets it meanwhile; with the last one the party leaves, and nothing of it is left."""
    first, second, third = closed(url, keep=2)
    [returned] = receive(other)
    assert returned.payload == third.payload == 2
    assert first.channel.stays
    first.ack()
    assert parties(tmp_path) == 2
    second.reject(requeue=True)
    assert parties(tmp_path) == 1
    [back] = receive(other)
    assert (back.payload, back.delivery_info["loss_count"]) == (1, 0)


def test_what_was_settled_before_the_end_is_not_kept(url: str, other: Connection, tmp_path: Path) -> None:
    """Its connection leaves as ever."""
    connection = Connection(url)
    messages = receive(connection)
    channel = messages[0].channel
    channel.keep([messages[0].delivery_tag])
    channel.close()  # Celery closes it before the connection
    messages[0].ack()
    connection.release()
    assert parties(tmp_path) == 1
    assert [message.payload for message in receive(other)] == [1, 2]


def test_what_nobody_can_settle_any_more_is_given_up(url: str, other: Connection) -> None:
    """The proof of life goes with the last message in memory, and others take over."""
    before = set(_own)
    messages = closed(url, keep=3)
    [party] = _own - before
    assert receive(other) == []
    messages.clear()
    gc.collect()
    assert party not in _own
    assert [message.payload for message in receive(other)] == [0, 1, 2]
