"""What can be done with dead letters: looked at without a trace, sent again, thrown away."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import NotRegistered

from qbridge import BrokerUnavailable, ConfigurationError, DeadLetterUnknown, PayloadError, UnknownQueueError
from qbridge.backends.base import HEADER_UNREADABLE
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.waiting import wait_until


def buried(contract: Contract, *bodies: bytes, before: int = 0) -> None:
    """Make dead letters of messages that no producer makes, one after the other; of those that wait ``before`` too."""
    queue = contract.bridge.celery.amqp.queues["default"]
    with contract.bridge.celery.producer_or_acquire() as producer:
        for number, body in enumerate(bodies):
            producer.publish(
                body, exchange=queue.exchange, routing_key="default", declare=[queue],
                headers={"task": "a.task" if number % 2 else "b.task", "id": f"id-{number}"},
                content_type="application/json", content_encoding="binary", confirm_timeout=5,
            )  # fmt: skip
    with contract.bridge.worker(pool="solo", queues=["default"]):
        wait_until(
            lambda: len(contract.bridge.dead_letters.list("default")) == before + len(bodies),
            20,
            what="the dead letters",
        )


def waiting(contract: Contract) -> int:
    """How many dead letters the broker has ready."""
    app = contract.bridge.celery
    with app.connection_for_read() as connection:
        if contract.broker == "redis":
            return int(connection.default_channel._size("default.dead"))
        return int(connection.default_channel.queue_declare("default.dead", passive=True).message_count)


def test_looking_leaves_no_trace(contract: Contract) -> None:
    """The order stays, all of them stay, each reader sees all, and what is asked for is what comes."""
    box = contract.bridge.dead_letters
    assert box.list() == []
    buried(contract, *(b"%d" % number for number in range(7)))
    bodies = [b"%d" % number for number in range(7)]
    assert [letter.body for letter in box.list("default")] == bodies
    assert [letter.body for letter in box.list("default", limit=3)] == bodies[:3]
    assert [letter.body for letter in box.list(task="a.task")] == bodies[1::2]
    assert box.list(reason="exhausted") == box.list("slow") == []
    seen: list[list[bytes]] = []
    readers = [
        threading.Thread(target=lambda: seen.append([letter.body for letter in box.list(limit=None)])) for _ in range(3)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert seen == [bodies] * 3
    for letter in box.list():
        assert box.get(letter.id) == letter
        assert "body" not in repr(letter)
    assert [letter.id for letter in asyncio.run(box.alist())] == [letter.id for letter in box.list()]
    assert waiting(contract) == 7
    with pytest.raises(DeadLetterUnknown):
        box.get("nobody")
    with pytest.raises(UnknownQueueError, match="default"):
        box.list("defautl")


def test_what_is_thrown_away_is_gone_and_nothing_else(contract: Contract) -> None:
    """By id, by filter, some or all; nothing without a word about which."""
    box = contract.bridge.dead_letters
    buried(contract, *(b"%d" % number for number in range(6)))
    second = box.list()[1]
    assert [letter.id for letter in box.discard(second.id)] == [second.id]
    assert box.discard([second.id, "nobody"]) == []
    assert [letter.body for letter in box.list()] == [b"0", b"2", b"3", b"4", b"5"]
    assert [letter.body for letter in box.discard(task="a.task", limit=1)] == [b"3"]
    with pytest.raises(ConfigurationError):
        box.discard()
    assert len(box.discard(queue="default")) == 4
    assert box.list() == []
    assert waiting(contract) == 0


def test_a_task_that_was_unknown_is_replayed_after_the_deploy(contract: Contract) -> None:
    """It keeps its id, its headers and its body, and the caller of then gets the result."""
    bridge = contract.bridge
    first = bridge.send("deployed.later", (20,), headers={"tenant": "a"}, task_id="of-then")
    second = bridge.send("deployed.later", (21,))
    with bridge.worker(pool="thread", concurrency=1):
        with pytest.raises(NotRegistered):
            second.get(timeout=20)
        wait_until(lambda: len(bridge.dead_letters.list()) == 2, 20, what="the dead letters")
    letters = bridge.dead_letters.list()
    assert {(letter.reason, letter.task, letter.task_id) for letter in letters} == {
        ("unknown_task", "deployed.later", result.id) for result in (first, second)
    }

    @bridge.task(name="deployed.later", context=True)
    def later(ctx: Any, number: int) -> dict[str, Any]:
        return {"number": number + 1, "id": ctx.task_id, "attempt": ctx.attempt, "tenant": ctx.headers.get("tenant")}

    began = time.monotonic()
    assert len(bridge.dead_letters.replay(task="deployed.later", rate=2)) == 2
    assert time.monotonic() - began > 0.45
    assert bridge.dead_letters.replay([letter.id for letter in letters]) == []
    assert bridge.dead_letters.list() == []
    with bridge.worker(pool="thread", concurrency=1):
        told = {"number": 21, "id": "of-then", "attempt": 1, "tenant": "a"}
        assert bridge.result("of-then", dict).get(timeout=20) == told
        wait_until(lambda: bridge.result(second.id).state == "SUCCESS", 20, what="the second result")
    assert waiting(contract) == 0


def test_a_letter_that_cannot_be_sent_again_stops_no_others(
    contract: Contract, caplog: pytest.LogCaptureFixture
) -> None:
    """By a filter it is skipped, and told; only who names it gets an error."""
    box, skipped = contract.bridge.dead_letters, list[tuple[str, str]]()
    queue = contract.bridge.celery.amqp.queues["default"]
    with contract.bridge.celery.producer_or_acquire() as producer:
        producer.publish(
            b"0", exchange=queue.exchange, routing_key="default", declare=[queue], headers={HEADER_UNREADABLE: "bm8="},
            content_type="application/json", content_encoding="binary", confirm_timeout=5,
        )  # fmt: skip
    buried(contract, b"1", b"2", before=1)
    bad, first, _ = box.list("default")
    with pytest.raises(PayloadError, match=bad.id):
        box.replay([bad.id, first.id])
    assert [letter.body for letter in box.replay(queue="default", limit=1)] == [b"1"]
    assert f"1 dead letters cannot be sent again, and stay; the first: the dead letter {bad.id}" in caplog.text
    caplog.clear()
    sent = box.replay(queue="default", skipped=lambda letter, error: skipped.append((letter.id, str(error))))
    assert [letter.body for letter in sent] == [b"2"]
    assert [(bad.id, True)] == [(name, "names no task" in why) for name, why in skipped]
    assert "cannot be sent again" not in caplog.text
    assert [letter.id for letter in box.list()] == [bad.id]


def test_an_unknown_task_is_left_to_workers_that_know_it(contract: Contract, caplog: pytest.LogCaptureFixture) -> None:
    """A rolling deploy: the old worker gives it back, and does not wait for it; the new one runs it. Nothing is dead.

    Where there is no new one, it is given up when the grace period is over.
    """
    old = contract.another_bridge(worker={"unknown_task_grace": 60})
    contract.declare_on(old)
    new = contract.another_bridge()

    @new.task(name="deployed.later")
    def later(number: int) -> int:
        return number + 1

    result = contract.bridge.send("deployed.later", (20,))
    with old.worker(pool="solo", queues=["default"]):
        wait_until(lambda: "does not know the task" in caplog.text, 20, what="the old worker to see it")
        assert contract.tasks.add.delay(1, 2).get(timeout=20) == 3
        assert result.state == "PENDING"
    with new.worker(pool="solo", queues=["default"]):
        assert result.get(timeout=20) == 21
    assert contract.bridge.dead_letters.list() == []

    short = contract.another_bridge(worker={"unknown_task_grace": 1.2})
    began = time.monotonic()
    unknown = contract.bridge.send("deployed.never", (20,))
    with short.worker(pool="solo", queues=["default"]), pytest.raises(NotRegistered):
        unknown.get(timeout=20)
    assert time.monotonic() - began > 1.2
    [letter] = contract.bridge.dead_letters.list()
    assert (letter.reason, letter.task_id) == ("unknown_task", unknown.id)


def send_instead(monkeypatch: pytest.MonkeyPatch, room: Any, instead: Callable[[Any], bool]) -> None:
    """Let something else happen where a broker's queue of dead letters sends one again; it gets the real send."""
    opened = room.kept_queue

    @contextmanager
    def opening(self: Any, connection: Any, name: str) -> Iterator[Any]:
        with opened(self, connection, name) as queue:
            send = queue.send
            queue.send = lambda *args: instead(lambda: send(*args))
            yield queue

    monkeypatch.setattr(room, "kept_queue", opening)


def test_an_outcome_is_there_until_its_letter_is_sent(contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is as it was where the broker does not take the letter, or where another replay was faster and has run."""
    bridge = contract.bridge
    unknown = bridge.send("deployed.later", (20,))
    with bridge.worker(pool="solo", queues=["default"]), pytest.raises(NotRegistered):
        unknown.get(timeout=20)
    [letter] = bridge.dead_letters.list()

    def away(send: Any) -> bool:
        raise OSError("it is away")

    room = type(bridge.config.broker)
    with monkeypatch.context() as patch:
        send_instead(patch, room, away)
        with pytest.raises(BrokerUnavailable, match="it is away"):
            bridge.dead_letters.replay(letter.id)
        with pytest.raises(NotRegistered, match=r"deployed\.later"):
            bridge.result(unknown.id).get(timeout=5)
    with monkeypatch.context() as patch:
        send_instead(patch, room, lambda send: False)
        bridge.celery.backend.mark_as_failure(unknown.id, ValueError("of the other's run"))
        assert bridge.dead_letters.replay(letter.id) == []
        with pytest.raises(ValueError, match="of the other's run"):
            bridge.result(unknown.id).get(timeout=5)
    assert [sent.id for sent in bridge.dead_letters.replay(letter.id)] == [letter.id]
    assert bridge.result(unknown.id).state == "PENDING"


def test_a_frozen_result_backend_is_asked_once(qbridge_redis: Any, tmp_path: Path) -> None:
    """Letters are sent all the same, and the broker is not blamed."""
    with qbridge_redis.heal().fresh() as url:
        contract = Contract(f"embedded://{tmp_path / 'bridge.db'}", url, tmp_path)
        bridge = contract.another_bridge(results={"look_timeout": 0.5})
        buried(contract, b"1", b"2", b"3")
        qbridge_redis.freeze()
        try:
            began = time.monotonic()
            assert len(bridge.dead_letters.replay(queue="default")) == 3
            assert time.monotonic() - began < 2.5
        finally:
            qbridge_redis.thaw()
            contract.close()


def test_a_letter_that_the_broker_does_not_take_back_stays(contract: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that fails half-way has sent those before, and lost none."""
    bridge = contract.bridge
    buried(contract, b"1", b"2", b"3")
    room = type(bridge.config.broker)
    opened = room.kept_queue

    def fails_at_the_second(self: Any, connection: Any, name: str) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def opening() -> Any:
            with opened(self, connection, name) as queue:
                send = queue.send

                def refuse(kept: Any, *args: Any) -> bool:
                    if kept.body == b"2":
                        raise OSError("the disk is full")
                    return bool(send(kept, *args))

                queue.send = refuse
                yield queue

        return opening()

    monkeypatch.setattr(room, "kept_queue", fails_at_the_second)
    with pytest.raises(BrokerUnavailable, match="disk is full"):
        bridge.dead_letters.replay(queue="default")
    assert [letter.body for letter in bridge.dead_letters.list()] == [b"2", b"3"]
    assert contract.depth("default") == 1
