"""Do plain Celery applications and a bridge understand each other, in both directions, with every result backend?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import kombu
import pytest
from pydantic import BaseModel

from qbridge import ArgumentsError, Bridge, BridgeConfig
from qbridge.testing.servers.process import ChildProcess
from qbridge.testing.waiting import wait_until

PLAIN = Path(__file__).with_name("plain_celery.py")
NOON = datetime(2026, 2, 28, 12, 0, 0, 123456, tzinfo=UTC)

#: What API.md's reference tells plain peers to set so that they may use a bridge's queues.
PRODUCER_RECIPE = {"task_default_queue": "default", "task_default_queue_type": "quorum"}
WORKER_RECIPE = {"task_create_missing_queue_type": "quorum"}

#: Spares a second before a worker's first task.
FAST = ("--without-mingle", "--without-gossip")


class Line(BaseModel):
    item: str
    price: Decimal
    at: datetime


class Place:
    """A broker and a result backend, and how a plain application is told about them."""

    def __init__(self, broker: str, results: str, folder: Path) -> None:
        self.broker = broker
        self.results = results
        self.folder = folder

    def settings(self, **more: Any) -> dict[str, Any]:
        backend = f"db+{self.results}" if self.results.startswith(("sqlite", "postgresql")) else self.results
        if self.broker.startswith("redis") and "task_default_queue" not in more:
            more["task_default_queue"] = "default"
        return {
            "broker_url": self.broker,
            "result_backend": backend,
            "broker_connection_retry_on_startup": True,
            **more,
        }

    def environment(self, settings: Mapping[str, Any], **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("QBRIDGE_", "CELERY_"))}
        # Coverage of child processes starts with a file of ours; the other side must be without qbridge.
        return {**kept, "PLAIN_SETTINGS": json.dumps(settings), "PYTHONPATH": str(PLAIN.parent), **more}

    def send_plainly(self, calls: list[Any], settings: Mapping[str, Any], **more: str) -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, str(PLAIN), json.dumps(calls)],
            env=self.environment(settings, **more),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return told

    @contextmanager
    def plain_worker(self, queue: str, settings: Mapping[str, Any], *words: str) -> Iterator[ChildProcess]:
        ready = self.folder / f"ready-{uuid.uuid4()}"
        process = ChildProcess(
            [sys.executable, "-m", "celery", "-A", "plain_celery", "worker", "-P", "solo", "-Q", queue,
             "-n", f"plain-{uuid.uuid4()}@%h", *words],
            log=self.folder / "plain-worker.log",
            env=self.environment(settings, PLAIN_READY=str(ready)),
            cwd=self.folder,
        )  # fmt: skip

        def is_ready() -> bool:
            assert process.exit_code() is None, process.tail()
            return ready.exists()

        try:
            wait_until(is_ready, 60, what="the plain worker to consume")
            yield process
        finally:
            process.kill()

    def bridge(self, **changes: Any) -> tuple[Bridge, dict[str, Any]]:
        """A bridge with typed tasks of the plain application's names."""
        bridge = Bridge(BridgeConfig(broker=self.broker, results=self.results, **changes))

        @bridge.task(name="interop.add")
        def add(a: int, b: int = 10) -> int:
            return a + b

        @bridge.task(name="interop.when")
        def when(value: datetime, others: list[datetime] | None = None) -> tuple[str, datetime]:
            return type(value).__name__, value

        @bridge.task(name="interop.price")
        def price(lines: list[Line]) -> Decimal:
            return sum((line.price for line in lines), Decimal(0))

        @bridge.task(name="interop.fail")
        def fail(text: str) -> None:
            raise ValueError(text, 1)

        return bridge, {"add": add, "when": when, "price": price, "fail": fail}


@pytest.fixture(params=["rpc", "redis", "sqlite", "postgresql"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "rpc":
        yield "rpc://"
    elif request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'results.db'}"
    else:
        with request.getfixturevalue(f"qbridge_{request.param}").heal().fresh() as url:
            yield url


@pytest.fixture(params=["rabbitmq", "redis"])
def place(request: pytest.FixtureRequest, results: str, tmp_path: Path) -> Iterator[Place]:
    with request.getfixturevalue(f"qbridge_{request.param}").heal().fresh() as url:
        yield Place(url, results, tmp_path)


def test_a_plain_producer_uses_a_bridges_worker(place: Place) -> None:
    """Plain calls run typed tasks; the plain side reads values, and errors as its own types."""
    bridge, _ = place.bridge()
    settings = place.settings(**(PRODUCER_RECIPE if place.broker.startswith("amqp") else {}))
    with bridge, bridge.worker(pool="thread", concurrency=2):
        told = place.send_plainly(
            [
                ["interop.add", [1, 2], {}],
                ["interop.add", [1], {"b": 5}],
                ["interop.when", [f"datetime {NOON.isoformat()}"], {}],
                ["interop.price", [[{"item": "a", "price": "1.10", "at": NOON.isoformat()}] * 2], {}],
                ["interop.fail", ["no"], {}],
                ["interop.add", ["1", 2], {}],
            ],
            settings,
        )
    add, add_by_name, when, price, failed, refused = told
    assert [add, add_by_name] == [{"value": 3}, {"value": 6}]
    name, moment = when["value"]
    assert (name, datetime.fromisoformat(moment)) == ("datetime", NOON)
    assert price == {"value": "2.20"}
    assert failed == {"error": "ValueError", "args": ["no", 1]}
    assert refused["error"] in {"ArgumentsError", "TypeError"}


def test_a_bridge_uses_a_plain_worker(place: Place) -> None:
    """Typed calls run plain functions; the bridge reads values typed, and errors as their own types."""
    bridge, tasks = place.bridge()
    with bridge:
        first = tasks["add"].delay(1, 2)  # declares the queue: a plain worker then finds it
        with place.plain_worker("default", place.settings(**WORKER_RECIPE), *FAST):
            assert first.get(timeout=30) == 3
            assert tasks["add"].delay(4, b=5).get(timeout=30) == 9
            assert tasks["add"].using(countdown=1).delay(4, 4).get(timeout=30) == 8
            with pytest.raises(ValueError, match="no") as caught:
                tasks["fail"].delay("no").get(timeout=30)
            assert caught.value.args == ("no", 1)
            assert bridge.send("interop.has_qbridge").get(timeout=30) is False
            data = {"__type__": "no such", "__value__": [1], "text": "ü"}
            assert bridge.send("interop.describe", ([1, None, {"a": data["text"]}],)).get(timeout=30) == [
                "list", [1, None, {"a": "ü"}],
            ]  # fmt: skip


def test_a_plain_producer_may_leave_declaring_to_the_bridge(qbridge_rabbitmq: Any, tmp_path: Path) -> None:
    """A ``no_declare`` queue is the other recipe: nothing is declared by the plain side."""
    with qbridge_rabbitmq.heal().fresh() as url:
        place = Place(url, "rpc://", tmp_path)
        bridge, _ = place.bridge()
        with bridge, bridge.worker(pool="thread", concurrency=1):
            told = place.send_plainly(
                [["interop.add", [1, 2], {}]], place.settings(task_default_queue="default"), PLAIN_NO_DECLARE="1"
            )
        assert told == [{"value": 3}]
        assert "default" not in names(qbridge_rabbitmq, "exchanges", url)


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_a_message_on_the_wire_is_celerys_protocol_two(broker: str, request: pytest.FixtureRequest) -> None:
    """Every header, property and part of the body is what a plain Celery would have written, and one header is ours."""
    with request.getfixturevalue(f"qbridge_{broker}").heal().fresh() as url:
        bridge, tasks = Place(url, "rpc://", Path()).bridge()
        with bridge:
            expires = datetime(2099, 1, 1, tzinfo=UTC)
            sent = tasks["add"].using(headers={"tenant": "x"}, expires=expires).delay(1, b=2)
            with kombu.Connection(url) as plain:
                channel = plain.channel()
                message = wait_until(lambda: channel.basic_get("default", no_ack=True), 10, what="the message")
    assert message.content_type == "application/json"
    assert message.content_encoding == "utf-8"
    headers = dict(message.headers)
    assert headers.pop("origin").startswith("gen")
    assert headers.pop("argsrepr") == "(1 hidden)"  # arguments are nobody's business on the way
    assert headers.pop("kwargsrepr") == "{1 hidden}"
    assert datetime.fromisoformat(headers.pop("expires")) == expires
    assert not headers.pop("ignore_result")  # None, as of send_task: the worker's own setting counts
    headers.pop("x-delivery-count", None)  # RabbitMQ's own, of quorum queues
    assert headers.pop("qbridge_schema") == f"1:{tasks['add'].fingerprint}"
    assert headers == {
        "lang": "py",
        "task": "interop.add",
        "id": sent.id,
        "root_id": sent.id,
        "parent_id": None,
        "group": None,
        "group_index": None,
        "shadow": None,
        "eta": None,
        "retries": 0,
        "timelimit": [None, None],
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
        "tenant": "x",
    }
    assert message.properties["correlation_id"] == sent.id
    assert message.properties["reply_to"]
    assert message.properties["delivery_mode"] == 2
    assert {"argsrepr", "kwargsrepr"}.isdisjoint(message.properties)  # they are headers
    body = message.body.decode() if isinstance(message.body, bytes) else message.body
    assert json.loads(body) == [[1], {"b": 2}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]


def names(server: Any, kind: str, url: str) -> list[str]:
    """What a vhost has of a kind, without RabbitMQ's own."""
    vhost = url.rpartition("/")[2]
    found = [one["name"] for one in server.api("GET", f"/api/{kind}/{vhost}")]
    return sorted(name for name in found if name and not name.startswith("amq."))


def topology(server: Any, url: str) -> dict[str, Any]:
    """Queues, exchanges and bindings of a vhost with their attributes, without what is exclusive or RabbitMQ's own."""
    vhost = url.rpartition("/")[2]
    queues = [queue for queue in server.api("GET", f"/api/queues/{vhost}") if not queue["exclusive"]]
    kept = ("name", "durable", "auto_delete", "arguments", "type")
    exchanges = server.api("GET", f"/api/exchanges/{vhost}")
    return {
        "queues": [{key: queue[key] for key in kept} for queue in queues],
        "exchanges": [
            {key: exchange[key] for key in kept}
            for exchange in sorted(exchanges, key=lambda one: str(one["name"]))
            if exchange["name"] and not exchange["name"].startswith("amq.")
        ],
        "bindings": sorted(
            (binding["source"], binding["destination"], binding["routing_key"])
            for binding in server.api("GET", f"/api/bindings/{vhost}")
            if binding["destination"] in {queue["name"] for queue in queues}
        ),
    }


def test_defaults_celery_declares_what_celery_declares(qbridge_rabbitmq: Any, tmp_path: Path) -> None:
    """One queue ``celery``: direct, durable, without arguments; and every exchange as a plain application's."""
    server = qbridge_rabbitmq.heal()
    results = f"sqlite:///{tmp_path / 'results.db'}"
    with server.fresh() as ours, server.fresh() as theirs:
        place, plain = Place(ours, results, tmp_path), Place(theirs, results, tmp_path)
        bridge, tasks = place.bridge(defaults="celery")
        with bridge:
            tasks["add"].delay(1, 2)
            assert names(server, "queues", ours) == ["celery"]
            assert tasks["add"].queue == "celery"
            with bridge.worker(pool="thread", concurrency=1):
                assert tasks["add"].delay(1, 2).get(timeout=30) == 3
                our_topology = topology(server, ours)
        with plain.plain_worker("celery", plain.settings()):
            assert plain.send_plainly([["interop.add", [1, 2], {}]], plain.settings()) == [{"value": 3}]
            their_topology = topology(server, theirs)
    assert our_topology["queues"] == [
        {"name": "celery", "durable": True, "auto_delete": False, "arguments": {}, "type": "classic"}
    ]
    assert ("celery", "celery", "celery") in our_topology["bindings"]
    assert our_topology == their_topology


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_defaults_celery_joins_a_plain_fleet(broker: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """With nothing set on either side, each sends to the other's worker on the queue ``celery``."""
    with request.getfixturevalue(f"qbridge_{broker}").heal().fresh() as url:
        place = Place(url, f"sqlite:///{tmp_path / 'results.db'}", tmp_path)
        settings = place.settings(task_default_queue="celery")
        bridge, tasks = place.bridge(defaults="celery")
        with bridge:
            with place.plain_worker("celery", settings, *FAST):
                assert tasks["add"].delay(1, 2).get(timeout=30) == 3
                assert bridge.send("interop.has_qbridge").get(timeout=30) is False
            with bridge.worker(pool="thread", concurrency=1):
                assert place.send_plainly([["interop.add", [2, 3], {}]], settings) == [{"value": 5}]
            with pytest.raises(ArgumentsError):
                tasks["add"].delay("1")
