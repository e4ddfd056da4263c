"""Is a retry lost when the broker is away, or does not take it, at that moment, as Celery's is?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Reject

from qbridge import Bridge, BridgeConfig, BrokerUnavailable, Retry, TaskContext
from qbridge.backends.rabbitmq import RabbitMQBroker
from qbridge.testing.servers import RabbitMQServer, RedisServer, Server
from qbridge.testing.waiting import wait_until


class Story:
    """One task that fails when it is told to, and what its runs were."""

    def __init__(self, bridge: Bridge, wait: float = 1) -> None:
        self.bridge = bridge
        self.attempts: list[int] = []
        self.released = False

        @bridge.task(
            name="retry.fragile",
            context=True,
            retry=Retry(on=OSError, attempts=3, wait_initial=wait, wait_exp_base=1, wait_jitter=0),
        )
        def fragile(ctx: TaskContext) -> int:
            self.attempts.append(ctx.attempt)
            if ctx.attempt == 1:
                wait_until(lambda: self.released, 60, what="the broker's trouble")
                raise OSError("no route")
            return ctx.attempt

        self.task = fragile

    def begin(self) -> Any:
        """Send it, and return once it runs."""
        result = self.task.delay()
        wait_until(lambda: self.attempts, 30, what="the first attempt")
        return result


def rabbitmq_bridge(url: str, results: str, **room: Any) -> Bridge:
    """A bridge whose sends do not wait long."""
    broker = RabbitMQBroker.from_url(url).model_copy(update={"publish_timeout": 5.0, **room})
    return Bridge(BridgeConfig(broker=broker, results=results))


@contextmanager
def alarm(server: RabbitMQServer) -> Iterator[None]:
    """RabbitMQ reads nothing more from connections that publish."""
    server.ctl("set_vm_memory_high_watermark", "0.0000001")
    try:
        yield
    finally:
        server.ctl("set_vm_memory_high_watermark", "0.6")


def test_a_memory_alarm_delays_a_retry(qbridge_rabbitmq: RabbitMQServer, tmp_path: Path) -> None:
    """The attempt keeps its slot, or is given back and run again; once the alarm is over, so is the task."""
    with (
        qbridge_rabbitmq.fresh() as url,
        rabbitmq_bridge(url, f"db+sqlite:///{tmp_path}/r.db") as bridge,
        bridge.worker(pool="thread", concurrency=1),
    ):
        story = Story(bridge)
        result = story.begin()
        with alarm(qbridge_rabbitmq):
            story.released = True
            time.sleep(7)  # the time in which the retry cannot be sent
            assert not result.ready()
        assert result.get(timeout=60) == 2
        assert set(story.attempts) == {1, 2}


def test_a_full_queue_delays_a_retry(qbridge_rabbitmq: RabbitMQServer, tmp_path: Path) -> None:
    """A policy that rejects what is published to a full queue does not end a task that has been taken from it."""
    with (
        qbridge_rabbitmq.fresh() as url,
        rabbitmq_bridge(url, f"db+sqlite:///{tmp_path}/r.db", queue_type="classic") as bridge,
    ):

        @bridge.task(name="retry.filler")
        def filler() -> None:
            """Fill the queue."""

        story = Story(bridge, wait=0)  # a delayed message waits in queues that have no limit
        with bridge.worker(pool="thread", concurrency=1):
            result = story.begin()
            filler.send_many([()] * 5)
            vhost = url.rpartition("/")[2]
            limit = '{"max-length": 1, "overflow": "reject-publish"}'
            qbridge_rabbitmq.ctl("set_policy", "-p", vhost, "full", "^default$", limit, "--apply-to", "queues")
            story.released = True
            time.sleep(3)  # the time in which the retry is refused
            assert not result.ready()
            qbridge_rabbitmq.ctl("clear_policy", "-p", vhost, "full")
            assert result.get(timeout=60) == 2


@pytest.fixture(params=["rabbitmq", "redis"])
def keeping(request: pytest.FixtureRequest) -> Iterator[tuple[Server, str]]:
    """A broker that keeps its messages while it is away, and its URL."""
    if request.param == "redis":
        with RedisServer(appendonly=True) as redis:
            yield redis, redis.url
        return
    rabbitmq = request.getfixturevalue("qbridge_rabbitmq")
    with rabbitmq.heal().fresh() as url:
        yield rabbitmq, url
        rabbitmq.heal()


def test_a_broker_that_is_away_when_the_body_raises_loses_no_retry(keeping: tuple[Server, str], tmp_path: Path) -> None:
    """The attempt is run again with the number that it had, and the task goes on; plain Celery gives it up."""
    server, url = keeping
    with (
        Bridge(BridgeConfig(broker=url, results=f"db+sqlite:///{tmp_path}/r.db")) as bridge,
        bridge.worker(pool="thread", concurrency=1),
    ):
        story = Story(bridge)
        result = story.begin()
        try:
            server.stop()
            story.released = True
            assert_plain_celery_gives_up(url)
        finally:
            server.heal()
        assert result.get(timeout=90) == 2
        assert set(story.attempts) == {1, 2}


def test_at_most_once_says_that_a_retry_could_not_be_sent(keeping: tuple[Server, str], tmp_path: Path) -> None:
    """There is no message that could go back: the task is a FAILURE that names the broker, and does not run again."""
    server, url = keeping
    kind: Any = type(BridgeConfig(broker=url, results="disabled://").broker)
    room = kind.from_url(url).model_copy(update={"publish_timeout": 2.0})
    config = BridgeConfig(broker=room, results=f"db+sqlite:///{tmp_path}/r.db", delivery="at_most_once")
    with Bridge(config) as bridge, bridge.worker(pool="thread", concurrency=1):
        story = Story(bridge)
        result = story.begin()
        try:
            server.stop()
            story.released = True
            with pytest.raises(BrokerUnavailable):
                result.get(timeout=60)
        finally:
            server.heal()
        assert story.attempts == [1]


def assert_plain_celery_gives_up(url: str) -> None:
    """Its message is rejected for good: nobody will run the task again."""
    app = Celery("plain", broker=url, set_as_current=False)
    app.conf.update(task_publish_retry=False, broker_connection_timeout=1)

    @app.task(bind=True, shared=False)
    def fragile(self: Any) -> None:
        self.retry(countdown=1)

    fragile.push_request(id="1", called_directly=False, retries=0, delivery_info={"routing_key": "celery"})
    with pytest.raises(Reject) as caught:
        fragile.run()
    assert caught.value.requeue is False
