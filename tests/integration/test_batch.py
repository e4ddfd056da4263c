"""Bulk submission: all of it, or a word on each message."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbridge import BatchError, Bridge, BridgeConfig, PayloadError, Task
from qbridge.batch import GROUP
from qbridge.testing.proxy import TcpProxy
from qbridge.testing.servers import RabbitMQServer, RedisServer


@pytest.fixture(params=["rabbitmq", "redis", "embedded"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A fresh place on each broker."""
    if request.param == "embedded":
        yield f"embedded://{tmp_path}/bridge.db"
    else:
        server: RabbitMQServer | RedisServer = request.getfixturevalue(f"qbridge_{request.param}")
        with server.fresh() as fresh:
            yield fresh


def bridge_to(url: str, publish_timeout: float = 10) -> Bridge:
    """A bridge without results."""
    return Bridge(BridgeConfig(broker={"url": url, "publish_timeout": publish_timeout}, results="none"))


def echo_on(bridge: Bridge) -> Task[[int], int]:
    """One task on a queue of its own."""

    @bridge.task(name="echo", queue=f"bulk-{uuid.uuid4().hex[:8]}")
    def echo(n: int) -> int:
        return n

    return echo


def depth(bridge: Bridge, task: Task[[int], int]) -> int:
    """Messages on the task's queue, as the server counts them."""
    with bridge.celery.connection_for_write() as connection:
        queue = bridge.celery.amqp.queues[task.queue](connection.default_channel)
        return int(queue.queue_declare(passive=True).message_count)


def test_every_message_is_on_the_broker_once(url: str) -> None:
    """More than one group, counted on the server."""
    with bridge_to(url) as bridge:
        echo = echo_on(bridge)
        handles = echo.send_many([(n,) for n in range(GROUP + 7)])
        assert len({handle.id for handle in handles}) == GROUP + 7
        assert depth(bridge, echo) == GROUP + 7


def test_items_may_be_given_one_by_one_or_as_an_iterable(url: str) -> None:
    """Both read well."""
    with bridge_to(url) as bridge:
        echo = echo_on(bridge)
        assert len(bridge.send_many(echo.item(1), echo.item(2))) == 2
        assert len(bridge.send_many(echo.item(n) for n in range(3))) == 3
        assert depth(bridge, echo) == 5


def test_bad_argument_in_a_batch_sends_nothing(url: str) -> None:
    """All arguments are checked before the first message."""
    with bridge_to(url) as bridge:
        echo = echo_on(bridge)
        echo.send_many([(1,)])
        with pytest.raises(TypeError, match="echo"):
            echo.send_many([(1,), ("x",)])
        assert depth(bridge, echo) == 1


def test_a_message_that_is_too_large_is_refused_before_any_is_sent(url: str) -> None:
    """In the first group; in a later one, the groups before it are confirmed and the rest is unsent."""
    with Bridge(BridgeConfig(broker=url, results="none", serialization={"max_payload_bytes": 2000})) as bridge:

        @bridge.task(name="say", queue=f"bulk-{uuid.uuid4().hex[:8]}")
        def say(text: str) -> str:
            return text

        def waiting() -> int:
            with bridge.celery.connection_for_write() as connection:
                queue = bridge.celery.amqp.queues[say.queue](connection.default_channel)
                return int(queue.queue_declare(passive=True).message_count)

        say.send_many([("a",)])
        with pytest.raises(PayloadError, match="limit is 2,000"):
            say.send_many([("b",), ("c",), ("d" * 3000,), ("e",)])
        assert waiting() == 1
        with pytest.raises(BatchError, match="limit is 2,000") as caught:
            say.send_many([*[("f",)] * (GROUP + 2), ("g" * 3000,)])
        assert (len(caught.value.confirmed), len(caught.value.unsent)) == (GROUP, 3)
        assert caught.value.uncertain == []
        say.send_many([("h",)])  # the connection is as good as before
        assert waiting() == GROUP + 2


@pytest.mark.parametrize("kind", ["rabbitmq", "redis"])
def test_batch_to_a_broker_that_is_away_is_unsent_as_a_whole(kind: str, request: pytest.FixtureRequest) -> None:
    """Nothing was written, so nothing is uncertain."""
    server: RabbitMQServer | RedisServer = request.getfixturevalue(f"qbridge_{kind}")
    with server.fresh() as fresh, TcpProxy.to(fresh) as proxy, bridge_to(proxy.url(fresh), 2) as bridge:
        proxy.refuse()
        with pytest.raises(BatchError) as caught:
            echo_on(bridge).send_many([(n,) for n in range(10)])
    assert len(caught.value.unsent) == 10
    assert caught.value.uncertain == []
    assert caught.value.confirmed == []


@pytest.mark.parametrize("kind", ["rabbitmq", "redis"])
def test_batch_whose_answer_never_comes_is_uncertain(kind: str, request: pytest.FixtureRequest) -> None:
    """Messages were written and the connection stalls: neither confirmed nor unsent, and never sent again blindly."""
    server: RabbitMQServer | RedisServer = request.getfixturevalue(f"qbridge_{kind}")
    # seconds in which a whole group can be written on a busy machine too
    with server.fresh() as fresh, TcpProxy.to(fresh) as proxy, bridge_to(proxy.url(fresh), 5) as bridge:
        echo = echo_on(bridge)
        first = echo.send_many([(n,) for n in range(3)])
        proxy.stall()
        with pytest.raises(BatchError) as caught:
            echo.send_many([(n,) for n in range(GROUP + 10)])
    error = caught.value
    assert len(first) == 3
    assert len(error.uncertain) == GROUP
    assert len(error.unsent) == 10
    assert error.confirmed == []
    assert "uncertain" in str(error)
