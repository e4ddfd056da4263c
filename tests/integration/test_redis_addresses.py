"""Where can a message in Redis have something sent to? To queues; a key that is none stays what it was.

A queue is a key there, among those of the transport itself: one message with such a key as its ``reply_to`` made a list
of it, and every worker of the database stood still.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis

from qbridge import Bridge, BridgeConfig
from qbridge.backends.redis.broker import RedisBroker
from qbridge.backends.redis.places import NoQueue
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.servers import RedisServer
from qbridge.testing.waiting import wait_until

QUEUE = "fragile"
NO_QUEUES = ["qbridge.schedule", "qbridge.claims", "qbridge.holders", "unacked", "unacked_index", "_kombu.binding.x"]
PRECIOUS = "precious"


@pytest.fixture
def url(qbridge_redis: RedisServer) -> Iterator[str]:
    """An empty database."""
    with qbridge_redis.heal().fresh() as fresh:
        yield fresh


def message(task: str, path: Path, key: str) -> dict[str, Any]:
    """A task's message as anybody could push it, whose result goes to a key."""
    task_id = str(uuid.uuid4())
    return {
        "body": base64.b64encode(json.dumps([[str(path), "w"], {}, {}]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"id": task_id, "task": task, "lang": "py", "root_id": task_id, "argsrepr": "", "kwargsrepr": ""},
        "properties": {
            "body_encoding": "base64",
            "correlation_id": task_id,
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "delivery_tag": str(uuid.uuid4()),
            "reply_to": key,
        },
    }


def test_a_result_goes_to_no_key_that_is_no_queue(url: str, tmp_path: Path) -> None:
    """The task runs, its result is dropped as one for which nobody waits, and the next task runs too."""
    with (
        closing(Contract(url, "rpc://", tmp_path)) as contract,
        redis.Redis.from_url(url) as client,
        contract.worker_of(QUEUE, pool="solo") as worker,
    ):
        client.set(PRECIOUS, "x")  # of another program, under a name that a queue could have
        keys = [*NO_QUEUES, PRECIOUS]
        paths = [contract.path() for _ in keys]
        for key, path in zip(keys, paths, strict=True):
            client.lpush(QUEUE, json.dumps(message(contract.tasks.note.name, path, key)))
        for key, path in zip(keys, paths, strict=True):
            wait_until(lambda path=path: runs(path), 20, what=f"the task whose result goes to {key}")
        last = contract.path()
        contract.tasks.jot.using(queue=QUEUE).delay(str(last))
        wait_until(lambda: runs(last), 20, what="the task after them")
        assert [key for key in keys if client.type(key) == b"list"] == []
        assert [len(runs(path)) for path in paths] == [1] * len(keys)
        assert client.get(PRECIOUS) == b"x"
        assert "Connection to broker lost" not in worker.log.read_text()


@pytest.mark.parametrize("key", NO_QUEUES)
def test_a_sender_is_told_of_a_key_that_is_no_queue(url: str, tmp_path: Path, key: str) -> None:
    """Whatever asks kombu to send it there; names of queues are refused in the configuration already."""
    with (
        closing(Contract(url, "rpc://", tmp_path)) as contract,
        contract.bridge.celery.connection_for_write() as connection,
        redis.Redis.from_url(url) as client,
    ):
        with pytest.raises(NoQueue, match="is no queue"):
            connection.Producer().publish({}, exchange="", routing_key=key)
        assert client.exists(key) == 0


def test_what_is_no_message_keeps_no_others_from_being_given_back(url: str, tmp_path: Path) -> None:
    """Those that plain Celery workers have not acknowledged in time: kombu ends at the first that it cannot read."""
    with (
        closing(Contract(url, "rpc://", tmp_path)) as contract,
        contract.bridge.celery.connection_for_read() as connection,
        redis.Redis.from_url(url) as client,
    ):
        one = message("x", tmp_path, "y")
        keys = ["", None, ["a"], {"a": 1}, True, 5, "\ud800", *NO_QUEUES]
        no_messages = ["[1, 2]", "{", "[[], [], []]", *(json.dumps([one, "", key]) for key in keys)]
        tags: dict[Any, Any] = {
            f"{number:02}": entry for number, entry in enumerate([*no_messages, json.dumps([one, "", QUEUE])])
        }
        before = set(client.keys())
        client.hset("unacked", mapping=tags)
        client.zadd("unacked_index", {tag: len(tags) - number for number, tag in enumerate(tags)})  # the good one last
        connection.default_channel.qos.restore_visible(num=100, interval=1)
        assert (client.llen(QUEUE), client.hlen("unacked"), client.zcard("unacked_index")) == (1, 0, 0)
        assert set(client.keys()) - before == {QUEUE.encode()}


@pytest.mark.parametrize("prefix", ["", "mine:"])
def test_what_cannot_be_given_back_now_stays_unacknowledged(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    """Somebody made something else of a list or an exchange: messages were lost, and those after them waited."""
    broker = RedisBroker.from_url(url).model_copy(update={"key_prefix": prefix})
    with (
        Bridge(BridgeConfig(broker=broker, results="disabled://")) as bridge,
        bridge.celery.connection_for_read() as connection,
        redis.Redis.from_url(url) as client,
    ):
        one = message("x", tmp_path, "y")
        low = {**one, "properties": {**one["properties"], "priority": 3}}
        lost = f"{prefix}{PRECIOUS}"
        table = f"{prefix}_kombu.binding.ex"
        client.mset({lost: "x", f"{lost}\x06\x163": "x", table: "x"})
        entries = [[one, "", PRECIOUS], [low, "", PRECIOUS], [one, "ex", "key"], [one, "", QUEUE]]
        tags: dict[Any, Any] = {str(number): json.dumps(entry) for number, entry in enumerate(entries)}
        client.hset(f"{prefix}unacked", mapping=tags)
        client.zadd(f"{prefix}unacked_index", {tag: len(tags) - number for number, tag in enumerate(tags)})
        qos = connection.default_channel.qos
        for _ in range(2):
            qos.restore_visible(num=10, interval=1)
            assert client.llen(f"{prefix}{QUEUE}") == 1
            assert sorted(client.hkeys(f"{prefix}unacked")) == [b"0", b"1", b"2"]
            assert client.zcard(f"{prefix}unacked_index") == 3
        assert sum("delete it" in record.getMessage().lower() for record in caplog.records) == 3
        client.delete(lost, f"{lost}\x06\x163", table)
        qos.restore_visible(num=10, interval=1)
        assert client.llen(lost) == client.llen(f"{lost}\x06\x163") == 1
