"""Connections under a deadline, and what is declared on one: kombu's own calls of them still work."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from kombu.entity import Exchange, Queue
from kombu.exceptions import OperationalError

from qbridge import Bridge, BridgeConfig
from qbridge.amqp import BridgeConnection, SafeConnection
from qbridge.backends.deadline import deadline
from qbridge.producer import BridgeProducer
from qbridge.testing.servers import free_ports
from qbridge.testing.waiting import wait_until


def test_connecting_again_under_a_deadline_ends_with_the_brokers_error() -> None:
    """kombu's ``ensure`` passes the number of retries by position, where the deadline sets its own."""
    (port,) = free_ports(1)
    connection = BridgeConnection(f"amqp://guest:guest@127.0.0.1:{port}//")
    began = time.monotonic()
    with deadline(0.5), pytest.raises(OperationalError):
        connection._ensure_connection(None, 100, 0, 0.2, 1, None)
    assert time.monotonic() - began < 5


def test_a_worker_s_waits_for_a_broker_stay_short() -> None:
    """So that it is back within two seconds of the broker, however long that was away; the caller may say otherwise."""
    (port,) = free_ports(1)
    for options, expected in (({}, [1, 2, 2]), ({"interval_start": 0.1, "interval_max": 0.1}, [0.1] * 3)):
        waits: list[float] = []

        def note(error: Exception, wait: float, waits: list[float] = waits) -> None:
            waits.append(wait)
            if len(waits) == 3:
                raise LookupError("enough")

        with pytest.raises(LookupError):
            SafeConnection(f"amqp://guest:guest@127.0.0.1:{port}//").ensure_connection(note, None, **options)
        assert expected == waits


def test_a_queue_is_declared_once_on_each_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second message declares nothing; on a new connection, and after what is known was forgotten, it does."""
    declared: list[str] = []
    queue = Queue("once", Exchange("once", type="direct"), routing_key="once")
    monkeypatch.setattr(Queue, "declare", lambda self, *args, **kwargs: declared.append(self.name))
    with BridgeConnection("memory://") as connection:
        producer = BridgeProducer(connection)
        for _ in range(3):
            producer.publish({}, exchange="once", routing_key="once", declare=[queue])
        assert declared == ["once"]
        connection._forget_declared()
        producer.publish({}, exchange="once", routing_key="once", declare=[queue])
        assert declared == ["once"] * 2
    with BridgeConnection("memory://") as connection:
        BridgeProducer(connection).publish({}, exchange="once", routing_key="once", declare=[queue])
    assert declared == ["once"] * 3


@pytest.mark.parametrize("of", ["connections", "producers"])
def test_closing_a_pool_turns_those_away_who_wait_in_it(tmp_path: Path, of: str) -> None:
    """They waited for what nobody would bring back: until their time was up, at a broker that was well."""
    with Bridge(BridgeConfig(broker=f"embedded://{tmp_path}/b.db", results="disabled://")) as bridge:
        app = bridge.celery
        app.conf.broker_pool_limit = 1
        pool: Any = app.pool if of == "connections" else app.amqp.producer_pool
        errors: list[Exception] = []

        def wait() -> None:
            try:
                pool.acquire(block=True, timeout=30)
            except RuntimeError as error:
                errors.append(error)

        with pool.acquire(block=True):
            waiting = [threading.Thread(target=wait, daemon=True) for _ in range(3)]
            for thread in waiting:
                thread.start()
            wait_until(lambda: len(pool._resource.not_empty._waiters) == 3, 10, what="all to wait")
            app.drop_connections()
            for thread in waiting:
                thread.join(5)
            assert ["Acquire on closed pool"] * 3 == [str(error) for error in errors]
