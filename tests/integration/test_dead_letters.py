"""What becomes of messages that a worker cannot handle? They are kept, as they were, before they leave their queue."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kombu.entity import Exchange, Queue

from qbridge.testing.contracts.kit import Contract
from qbridge.testing.waiting import wait_until
from qbridge.worker.dead_letters import HEADER_DEAD_LETTER

BROKERS = ["rabbitmq", "redis", "embedded"]
ADD = {"task": "nobody.knows", "id": "1"}


class Mine:
    """Runs code in whoever unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(params=BROKERS)
def contract(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Contract]:
    """A bridge on a broker that nobody has used before, and no worker yet."""
    results = f"sqlite:///{tmp_path / 'results.db'}"
    if request.param == "embedded":
        contract = Contract(f"embedded://{tmp_path / 'bridge.db'}", results, tmp_path)
        yield contract
        contract.close()
        return
    server = request.getfixturevalue(f"qbridge_{request.param}")
    with server.heal().fresh() as url:
        contract = Contract(url, results, tmp_path)
        yield contract
        contract.close()


def send(contract: Contract, body: bytes, headers: dict[str, Any], content_type: str = "application/json") -> None:
    """Publish what no producer of ours makes."""
    queue = contract.bridge.celery.amqp.queues["default"]
    with contract.bridge.celery.producer_or_acquire() as producer:
        producer.publish(
            body, exchange=queue.exchange, routing_key="default", declare=[queue], headers=headers,
            content_type=content_type, content_encoding="binary", correlation_id="1", confirm_timeout=5,
        )  # fmt: skip


def take(contract: Contract, count: int) -> list[Any]:
    """Take dead letters off their queue, oldest first."""
    arguments = {"x-queue-type": "classic"} if contract.broker == "rabbitmq" else None
    queue = Queue("default.dead", Exchange(""), "default.dead", queue_arguments=arguments)
    taken: list[Any] = []
    with contract.bridge.celery.connection_for_read() as connection:
        bound = queue(connection.default_channel)
        bound.declare()

        def enough() -> bool:
            while (message := bound.get(no_ack=True)) is not None:
                taken.append(message)
            return len(taken) >= count

        wait_until(enough, 20, what="the dead letters")
    return taken


def test_what_cannot_be_handled_is_kept_as_it_was(contract: Contract, tmp_path: Path) -> None:
    """Malformed, unreadable, foreign and unknown messages: bodies byte for byte, the reason, and a worker that goes on.

    A pickle is kept too, and not opened. Celery drops all of them; the first four end its worker.
    """
    name, opened = str(contract.tasks.note.name), tmp_path / "opened"
    bomb = pickle.dumps(Mine(opened))
    sent = [
        (b"[[], {}, {}]", {"task": name}, "application/json", "malformed"),
        (b"[[], {}, {}]", {"task": "nobody.knows"}, "application/json", "malformed"),
        (b'{"a": 1}', {"task": name, "id": "1"}, "application/json", "malformed"),
        (b"5", {"task": name, "id": "1"}, "application/json", "malformed"),
        (b"\xff\x00{", {"task": name, "id": "1"}, "application/json", "undecodable"),
        (b"\xff\x00{", {}, "application/json", "undecodable"),
        (bomb, {"task": name, "id": "1"}, "application/x-python-serialize", "undecodable"),
        (b"<a/>", {"other": "kept"}, "text/xml", "undecodable"),
        (b"[[], {}, {}]", ADD, "application/json", "unknown_task"),
    ]
    for body, headers, content_type, _ in sent:
        send(contract, body, headers, content_type)
    with contract.worker_of("default", pool="solo"):
        assert contract.tasks.note.delay(str(contract.path()), "after").get(timeout=20) == "after"
    kept = take(contract, len(sent))
    records = [json.loads(message.headers[HEADER_DEAD_LETTER]) for message in kept]
    assert [(bytes(message.body), record["reason"]) for message, record in zip(kept, records, strict=True)] == [
        (body, reason) for body, _, _, reason in sent
    ]
    for message, (_, headers, content_type, _) in zip(kept, sent, strict=True):
        assert message.content_type == content_type
        assert headers.items() <= message.headers.items()
        assert message.properties["correlation_id"] == "1"
    assert {record["queue"] for record in records} == {"default"}
    assert not opened.exists()


def test_a_message_stays_until_the_broker_has_its_copy(contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker does not take the copy at first: nothing is acknowledged, and the next attempt succeeds."""
    from qbridge.worker import dead_letters

    written, send_copy = [], dead_letters.DeadLetters._send

    def refuse_first(self: Any, message: Any, *args: Any) -> None:
        written.append((time.monotonic(), message.acknowledged))
        if len(written) == 1:
            raise OSError("the disk is full")
        send_copy(self, message, *args)

    monkeypatch.setattr(dead_letters.DeadLetters, "_send", refuse_first)
    monkeypatch.setattr(dead_letters, "_AGAIN", 0.5)
    send(contract, b"5", ADD)
    with contract.bridge.worker(pool="solo"):
        [kept] = take(contract, 1)
    assert bytes(kept.body) == b"5"
    assert [acknowledged for _, acknowledged in written] == [False, False]
    assert written[1][0] - written[0][0] > 0.4
