"""What does a running worker do with messages that nobody means? Each is run, a dead letter, or has expired.

``QBRIDGE_TEST_FUZZ_SENT`` says how many; ``nox -s fuzz`` sends 100,000 on each broker, with keys and without.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from celery import signals
from kombu.entity import Exchange, Queue
from tests.fuzz.messages import generate

from qbridge import Bridge, BridgeConfig, WorkerConfig
from qbridge.serialization.keys import new_key

COUNT = int(os.environ.get("QBRIDGE_TEST_FUZZ_SENT", "300"))


@pytest.fixture(params=["rabbitmq", "redis", "embedded"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A broker that nobody has used."""
    if request.param == "embedded":
        yield f"embedded://{tmp_path}/b.db"
        return
    with request.getfixturevalue(f"qbridge_{request.param}").heal().fresh() as url:
        yield url


def counted(bridge: Bridge, name: str) -> int:
    """How many messages a queue has."""
    rabbitmq = bridge.config.broker.kind == "rabbitmq"
    kind = "classic" if name.endswith(".dead") else "quorum"
    with bridge.celery.connection_for_read() as connection:
        queue = Queue(name, Exchange(""), name, queue_arguments={"x-queue-type": kind} if rabbitmq else None)
        return int(queue(connection.default_channel).queue_declare().message_count)


@pytest.mark.parametrize("locked", [False, True], ids=["open", "locked"])
def test_every_message_is_accounted_for(broker: str, locked: bool, tmp_path: Path) -> None:
    """The worker is alive after all of them, and what it ran and what it gave up are all there was."""
    seen: Counter[str] = Counter()
    serialization: Any = {"max_payload_bytes": 100_000, "signing_keys": [new_key("a")] if locked else []}
    with ExitStack() as stack:
        config = BridgeConfig(
            broker=broker,
            results=f"sqlite:///{tmp_path}/r.db",
            serialization=serialization,
            worker=WorkerConfig(unknown_task_grace=0),
        )
        bridge = stack.enter_context(Bridge(config))

        @bridge.task(name="echo")
        def echo(word: str, times: int = 1) -> str:
            return word * min(times, 3)

        @bridge.task(name="end")
        def end() -> None:
            seen["end"] += 1

        def ran(sender: Any = None, **_: Any) -> None:
            seen["run"] += sender.name == "echo"

        def expired(expired: bool = False, **_: Any) -> None:
            seen["expired"] += 1

        signals.task_prerun.connect(ran)
        signals.task_revoked.connect(expired)
        stack.callback(signals.task_prerun.disconnect, ran)
        stack.callback(signals.task_revoked.disconnect, expired)
        app: Any = bridge.celery
        queue = app.amqp.queues["default"]
        echo.delay("ok")
        with app.connection_for_read() as connection:
            message = queue(connection.default_channel)
            message.declare()
            while (found := message.get(no_ack=True)) is None:
                time.sleep(0.01)
        body = found.body.encode() if isinstance(found.body, str) else bytes(found.body)
        untouched = 0
        with app.producer_or_acquire() as producer:
            producer.max_payload_bytes, producer.signing = None, False
            for each in itertools.islice(generate(7, dict(found.headers), body), COUNT):
                untouched += each.untouched
                producer.publish(
                    each.body, exchange=queue.exchange, routing_key="default", headers=each.headers,
                    content_type=each.content_type or None, content_encoding=each.content_encoding or None,
                    correlation_id=found.properties["correlation_id"], reply_to=found.properties.get("reply_to"),
                    confirm_timeout=10,
                )  # fmt: skip
            producer.max_payload_bytes, producer.signing = 100_000, True
        with bridge.worker(pool="solo"):
            left, limit = COUNT, time.monotonic() + 60
            while (now := counted(bridge, "default")) and time.monotonic() < limit:
                if now < left:  # no number of messages may take longer than this for none of them to go
                    left, limit = now, time.monotonic() + 60
                time.sleep(0.2)
            end.delay().get(timeout=60)
        dead = counted(bridge, "default.dead")
        print(bridge.config.broker.kind, "locked" if locked else "open", dict(seen), "dead letters", dead, "of", COUNT)
        assert seen["end"] == 1
        assert seen["run"] >= untouched
        # one whose callbacks cannot be read is run first, and then a dead letter
        assert COUNT <= seen["run"] + seen["expired"] + dead <= COUNT * 1.05
        if locked:
            assert (seen["run"], dead) == (untouched, COUNT - untouched)
