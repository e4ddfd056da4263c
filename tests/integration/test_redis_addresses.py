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

from qbridge.backends.redis.places import NoQueue
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.servers import RedisServer
from qbridge.testing.waiting import wait_until

QUEUE = "fragile"
KEYS = ["qbridge.schedule", "qbridge.claims", "qbridge.holders", "unacked", "unacked_index", "_kombu.binding.x"]


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
        paths = [contract.path() for _ in KEYS]
        for key, path in zip(KEYS, paths, strict=True):
            client.lpush(QUEUE, json.dumps(message(contract.tasks.note.name, path, key)))
        for key, path in zip(KEYS, paths, strict=True):
            wait_until(lambda path=path: runs(path), 20, what=f"the task whose result goes to {key}")
        last = contract.path()
        contract.tasks.jot.using(queue=QUEUE).delay(str(last))
        wait_until(lambda: runs(last), 20, what="the task after them")
        assert [key for key in KEYS if client.type(key) == b"list"] == []
        assert [len(runs(path)) for path in paths] == [1] * len(KEYS)
        assert "Connection to broker lost" not in worker.log.read_text()


@pytest.mark.parametrize("key", KEYS)
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
        good = json.dumps([message("x", tmp_path, "y"), "", QUEUE])
        tags = {"a": "[1, 2]", "b": "{", "c": "[[], [], []]", "d": good}
        client.hset("unacked", mapping=tags)
        client.zadd("unacked_index", dict.fromkeys(tags, 1))
        connection.default_channel.qos.restore_visible(num=10, interval=1)
        assert (client.llen(QUEUE), client.hlen("unacked"), client.zcard("unacked_index")) == (1, 0, 0)
