"""What a connection to RabbitMQ has taken from its socket is never left lying: behind answers, and in an event loop."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Queue
from kombu.asynchronous import Hub, set_event_loop

from qbridge.amqp import BridgeConnection
from qbridge.testing.servers import RabbitMQServer

N = 50


@pytest.fixture
def url(qbridge_rabbitmq: RabbitMQServer) -> Iterator[str]:
    """An empty vhost."""
    with qbridge_rabbitmq.heal().fresh() as fresh:
        yield fresh


def filled(url: str) -> Queue:
    """A queue with N messages of different sizes, some larger than what is looked at."""
    queue = Queue("read", durable=True)
    with BridgeConnection(url) as connection:
        producer = connection.Producer()
        for number in range(N):
            producer.publish(
                {"n": number, "fill": "x" * (number % 7) * 3000}, routing_key="read", declare=[queue], retry=True
            )
    return queue


def test_deliveries_that_come_behind_an_answer_wake_the_loop(url: str) -> None:
    """They follow the answer to the consumer's request at once: they stay in the socket, where the loop sees them."""
    got: list[int] = []
    hub = Hub()
    set_event_loop(hub)
    try:
        with BridgeConnection(url) as connection:
            connection.register_with_event_loop(hub)
            amqp: Any = connection.connection
            for _ in range(5):
                queue = filled(url)
                got.clear()
                with connection.Consumer([queue], callbacks=[lambda body, message: got.append(body["n"])], no_ack=True):
                    assert amqp.transport._read_buffer == b"", "no event loop would wake for it"
                    loop = hub.create_loop()
                    began = time.monotonic()
                    while len(got) < N and time.monotonic() < began + 60:
                        next(loop)
                    assert time.monotonic() - began < N / 5  # a second for each, if the loop slept
                assert got == list(range(N))
            hub.close()
    finally:
        set_event_loop(None)


def test_a_connection_that_nobody_watches_reads_all_that_it_was_sent(url: str) -> None:
    """``drain_events`` gives one message at a time, and there is nothing left at the end."""
    queue = filled(url)
    got: list[int] = []
    with (
        BridgeConnection(url) as connection,
        connection.Consumer([queue], callbacks=[lambda body, message: got.append(body["n"])], no_ack=True),
    ):
        for _ in range(N):
            connection.drain_events(timeout=10)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0)
        amqp: Any = connection.connection
        assert select.select([amqp.sock], [], [], 0)[0] == []
    assert got == list(range(N))
