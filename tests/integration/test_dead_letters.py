"""What becomes of messages that a worker cannot handle? They are kept, as they were, before they leave their queue."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import pytest
from kombu import Exchange

from qbridge import DeadLetter, Retry, TaskContext
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.waiting import wait_until

NOTE = "qbridge.testing.contract_app.tasks.note"
KNOWN = {"task": NOTE, "id": "1"}
UNKNOWN = {"task": "nobody.knows", "id": "1"}


class Mine:
    """Runs code in whoever unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def send(contract: Contract, body: bytes, headers: dict[str, Any], content_type: str = "application/json") -> None:
    """Publish what no producer of ours makes."""
    queue = contract.bridge.celery.amqp.queues["default"]
    with contract.bridge.celery.producer_or_acquire() as producer:
        limit, producer.max_payload_bytes = producer.max_payload_bytes, None
        try:
            producer.publish(
                body, exchange=queue.exchange, routing_key="default", declare=[queue], headers=headers,
                content_type=content_type, content_encoding="binary", correlation_id="1", confirm_timeout=5,
            )  # fmt: skip
        finally:
            producer.max_payload_bytes = limit


def lying(contract: Contract, count: int) -> list[DeadLetter]:
    """The dead letters of the default queue, once there are as many."""
    listed: list[DeadLetter] = []

    def enough() -> bool:
        listed[:] = contract.bridge.dead_letters.list("default")
        return len(listed) >= count

    wait_until(enough, 30, what="the dead letters")
    return listed


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
        (b"[[], {}, {}]", UNKNOWN, "application/json", "unknown_task"),
    ]
    for body, headers, content_type, _ in sent:
        send(contract, body, headers, content_type)
    with contract.worker_of("default", pool="solo"):
        assert contract.tasks.note.delay(str(contract.path()), "after").get(timeout=20) == "after"
    kept = lying(contract, len(sent))
    assert [(letter.body, letter.reason) for letter in kept] == [(body, reason) for body, _, _, reason in sent]
    for letter, (_, headers, content_type, _) in zip(kept, sent, strict=True):
        assert letter.content_type == content_type
        assert headers.items() <= letter.headers.items()
        assert letter.properties["correlation_id"] == "1"
    assert {letter.queue for letter in kept} == {"default"}
    assert not opened.exists()


def test_a_message_that_a_pattern_let_in_is_kept_for_its_queue(contract: Contract) -> None:
    """Its routing key is no queue's, or that of another one, and names nothing here."""
    app = contract.bridge.celery
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        queue = app.amqp.queues["default"](channel)
        queue.declare()
        Exchange("events", "topic", durable=True)(channel).declare()
        queue.bind_to("events", "#")
        for key in ("orders.new", "idle", "default"):
            connection.Producer(channel).publish(5, key, exchange="events", headers=KNOWN, serializer="json")
    with contract.worker_of("default", pool="solo"):
        kept = lying(contract, 3)
    assert [("malformed", "default")] * 3 == [(letter.reason, letter.queue) for letter in kept]


def test_the_next_attempt_of_a_message_that_a_pattern_let_in_comes_to_its_queue(contract: Contract) -> None:
    """To this one alone, and the task is told its name; the key is no queue's, or that of another one."""
    bridge, told, tries = contract.bridge, list[tuple[str, str | None]](), {"orders.new": 0, "idle": 0}

    @bridge.task(name="orders", context=True, retry=Retry(on=ConnectionError, attempts=2, wait_initial=0.05))
    def orders(ctx: TaskContext, key: str) -> None:
        told.append((key, ctx.queue))
        tries[key] += 1
        if tries[key] == 1:
            raise ConnectionError("not yet")

    with bridge.celery.connection_for_write() as connection:
        channel = connection.default_channel
        Exchange("events", "topic", durable=True)(channel).declare()
        for name in ("default", "idle"):
            queue = bridge.celery.amqp.queues[name](channel)
            queue.declare()
            queue.bind_to("events", "#")
        for key in tries:
            connection.Producer(channel).publish(
                [[key], {}, {}], key, exchange="events", headers={"task": "orders", "id": key}, serializer="json"
            )
    with bridge.worker(pool="solo", queues=["default"]):
        wait_until(lambda: len(told) == 4, 20, what="both attempts")
    assert sorted(told) == [(key, "default") for key in sorted([*tries, *tries])]
    assert contract.depth("idle") == 2


def test_what_cannot_be_written_or_read_again_takes_no_place(contract: Contract) -> None:
    """Headers that a client just writes and a worker does not, records that are none, times that are no numbers."""
    rabbitmq = contract.bridge.config.broker.kind == "rabbitmq"
    deep: Any = "x"
    for _ in range(450 if rabbitmq else 900):
        deep = [deep]
    hostile = [{**KNOWN, "deep": deep}, {**KNOWN, "qbridge_dead_letter": "[" * 20_000}]
    if not rabbitmq:  # which itself takes no such numbers
        hostile += [{**UNKNOWN, "qbridge_unknown_since": float("nan")}]
    for headers in hostile:
        for _ in range(8):  # more than a worker may hold
            send(contract, b"[[], {}, {}]", headers)
    with contract.worker_of("default", pool="solo", settings={"QBRIDGE_WORKER__UNKNOWN_TASK_GRACE": "1"}):
        assert contract.tasks.note.delay(str(contract.path()), "after").get(timeout=20) == "after"
        kept = lying(contract, 8 * len(hostile))
    assert len(kept) == 8 * len(hostile)
    assert {letter.body for letter in kept} == {b"[[], {}, {}]"}


def test_a_message_stays_until_the_broker_has_its_copy(contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker does not take the copy at first: the message waits in its queue, in no slot, and is kept then."""
    from qbridge.worker import dead_letters

    written: list[float] = []
    send_copy = dead_letters.DeadLetters._send

    def refuse_first(self: Any, message: Any, *args: Any) -> None:
        written.append(time.monotonic())
        assert not message.acknowledged
        if len(written) <= 3:
            raise OSError("the disk is full")
        send_copy(self, message, *args)

    monkeypatch.setattr(dead_letters.DeadLetters, "_send", refuse_first)
    monkeypatch.setattr(dead_letters, "_AGAIN", 1.0)
    for body in (b"5", b"6", b"7"):
        send(contract, body, KNOWN)
    with contract.bridge.worker(pool="solo"):
        # all that the worker may hold would be held by now
        assert contract.tasks.note.delay(str(contract.path()), "after").get(timeout=20) == "after"
        kept = lying(contract, 3)
    assert {letter.body for letter in kept} == {b"5", b"6", b"7"}
    assert {letter.reason for letter in kept} == {"malformed"}
    assert all(letter.headers["task"] == NOTE for letter in kept)
    assert min(written[3:]) - written[0] > 0.4


def test_a_message_stays_with_its_worker_while_the_broker_takes_nothing(
    contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not acknowledged until the broker has the copy."""
    from qbridge.worker import dead_letters, resending

    written: list[bool] = []
    send_again = resending.send_again

    def refuse_first(app: Any, message: Any, *args: Any, **options: Any) -> None:
        written.append(message.acknowledged)
        if len(written) <= 2:
            raise OSError("the disk is full")
        send_again(app, message, *args, **options)

    monkeypatch.setattr(dead_letters, "send_again", refuse_first)
    monkeypatch.setattr(resending, "send_again", refuse_first)
    monkeypatch.setattr(dead_letters, "_AGAIN", 0.5)
    send(contract, b"5", KNOWN)
    with contract.bridge.worker(pool="solo"):
        [kept] = lying(contract, 1)
    assert kept.body == b"5"
    assert written == [False] * 3
