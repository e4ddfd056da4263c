"""Are the app's connections closed when they should be, and kept when they are well?"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from kombu.exceptions import OperationalError

from qbridge import Bridge, BridgeConfig
from qbridge.testing.servers import RabbitMQServer, RedisServer


def _made(broker: str, results: str, **fields: Any) -> Bridge:
    bridge = Bridge(BridgeConfig(broker=broker, results=results, **fields))

    @bridge.task(name="add")
    def add(first: int, second: int) -> int:
        return first + second

    return bridge


def _soon(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


@pytest.mark.parametrize("number", [200])
def test_hundreds_of_bridges_on_redis_leave_nothing(qbridge_redis: RedisServer, number: int) -> None:
    """Made, used for sending, reading and control, closed: the server has no more clients than before."""
    import redis

    with qbridge_redis.fresh() as url, redis.Redis.from_url(url) as client:

        def one() -> None:
            with _made(url, url) as bridge:
                assert "PENDING" == bridge.tasks["add"].delay(1, 2).state
                assert bridge.celery.AsyncResult("x").state == "PENDING"
                bridge.celery.control.broadcast("nothing")

        one()
        gc.collect()
        files, threads, clients = len(os.listdir("/proc/self/fd")), threading.active_count(), len(client.client_list())
        for _ in range(number):
            one()
        assert _soon(lambda: clients == len(client.client_list()))
        gc.collect()
        assert files + 2 >= len(os.listdir("/proc/self/fd"))  # the kit's own, such as this test's client
        assert threads >= threading.active_count()


def test_bridges_on_rabbitmq_leave_no_connection(qbridge_rabbitmq: RabbitMQServer) -> None:
    """With a worker in the process too; each connection is closed with a handshake, so the server's log has no word."""
    with qbridge_rabbitmq.fresh() as url:
        name = url.rpartition("/")[2]

        def connections() -> int:
            every = qbridge_rabbitmq.api("GET", "/api/connections")
            return len([each for each in every if each.get("vhost") == name])

        already = qbridge_rabbitmq.log.stat().st_size
        for number in range(15):
            with _made(url, "disabled://") as bridge:
                bridge.tasks["add"].delay(1, 2)
                bridge.celery.control.broadcast("nothing")
                if number % 5 == 0:
                    with bridge.worker(concurrency=1):
                        bridge.tasks["add"].delay(1, 2)
        assert _soon(lambda: connections() == 0)
        said = qbridge_rabbitmq.log.read_bytes()[already:].decode(errors="replace")
        assert "client unexpectedly closed TCP connection" not in said


def test_a_plain_task_is_sent_although_its_queue_was_deleted(qbridge_rabbitmq: RabbitMQServer) -> None:
    """kombu remembers what it declared; the message is returned, and what was declared is declared again."""
    with qbridge_rabbitmq.fresh() as url, _made(url, "disabled://") as bridge:
        app = bridge.celery

        @app.task(name="plain", shared=False)
        def plain() -> None:
            """Nothing."""

        plain.delay()
        with app.connection_for_write() as connection:
            connection.default_channel.queue_delete("default")
        plain.delay()
        with app.connection_for_write() as connection:
            assert 1 == connection.default_channel.queue_declare("default", passive=True).message_count


def test_a_delayed_message_arrives_in_a_queue_that_was_declared_later(qbridge_rabbitmq: RabbitMQServer) -> None:
    """Delays are bound for each queue, not for those alone that the first delayed message found."""
    with qbridge_rabbitmq.fresh() as url, _made(url, "disabled://") as bridge:
        bridge.tasks["add"].using(countdown=1).delay(1, 2)

        @bridge.task(name="later", queue="later")
        def later() -> None:
            """Nothing."""

        later.using(countdown=1).delay()
        with bridge.celery.connection_for_write() as connection:
            channel = connection.default_channel
            assert _soon(lambda: channel.queue_declare("later", passive=True).message_count == 1)


def test_a_connection_whose_confirmation_did_not_come_is_not_used_again(qbridge_rabbitmq: RabbitMQServer) -> None:
    """A late answer would be taken for that to the next message."""
    with qbridge_rabbitmq.fresh() as url, _made(url, "disabled://") as bridge:
        app = bridge.celery
        app.send_task("add", (1, 2))
        with app.pool.acquire() as connection:
            lower = connection.connection
        qbridge_rabbitmq.freeze()
        try:
            with pytest.raises(OperationalError):
                app.send_task("add", (1, 2), confirm_timeout=0.5, retry=False)
        finally:
            qbridge_rabbitmq.thaw()
        assert not lower.connected
        app.send_task("add", (1, 2), retry=False)


@pytest.mark.parametrize("limit", [0, None, 1])
@pytest.mark.parametrize("defaults", ["safe", "celery"])
def test_messages_arrive_with_any_pool_limit(
    qbridge_rabbitmq: RabbitMQServer, limit: int | None, defaults: str
) -> None:
    """Without a pool each send closes its connection: with a handshake, so that nothing sent is lost."""
    with qbridge_rabbitmq.fresh() as url, _made(url, "disabled://", defaults=defaults) as bridge:
        app = bridge.celery
        app.conf.broker_pool_limit = limit
        threads = [threading.Thread(target=bridge.tasks["add"].delay, args=(1, 2)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        queue = app.conf.task_default_queue
        with app.connection_for_write() as connection:
            assert 8 == connection.default_channel.queue_declare(queue, passive=True).message_count


def test_the_broker_may_be_changed_between_sends(qbridge_rabbitmq: RabbitMQServer, qbridge_redis: RedisServer) -> None:
    """From RabbitMQ to Redis and back, by assigning ``broker_url``."""
    with (
        qbridge_rabbitmq.fresh() as rabbitmq,
        qbridge_redis.fresh() as redis_url,
        _made(rabbitmq, redis_url, defaults="celery") as bridge,
    ):
        app = bridge.celery
        for url in (rabbitmq, redis_url, rabbitmq):
            app.conf.broker_url = url
            bridge.tasks["add"].delay(1, 2)
        for url, count in ((rabbitmq, 2), (redis_url, 1)):
            app.conf.broker_url = url
            with app.connection_for_read() as connection:
                assert count == connection.default_channel.queue_declare("celery", passive=True).message_count
