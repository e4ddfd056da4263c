"""What do workers and clients do with properties that RabbitMQ passes on and py-amqp cannot read? They live on."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from struct import pack
from typing import Any

import pytest
from kombu import Exchange, Queue
from tests.raw_messages import TASK, TEXT, UNREADABLE, Raw, nested, short, table

from qbridge import DeadLetter, PayloadError
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.servers import RabbitMQServer
from qbridge.testing.waiting import wait_until

QUEUE = "fragile"
BODY = b"[[], {}, {}]"


def send(contract: Contract, raw: bytes, exchange: str = "", key: Any = QUEUE, body: bytes = BODY) -> None:
    """Publish a message with these properties, and wait for the broker to have it."""
    message = Raw(body)
    message.raw = raw
    with contract.bridge.celery.connection_for_write() as connection:
        channel = connection.default_channel
        channel.confirm_select()
        channel.basic_publish_confirm(message, exchange=exchange, routing_key=key, confirm_timeout=10)


def lying(contract: Contract, count: int) -> list[DeadLetter]:
    """The dead letters, once there are as many."""

    def enough() -> list[DeadLetter] | None:
        found = contract.bridge.dead_letters.list(QUEUE)
        return found if len(found) >= count else None

    return wait_until(enough, 30, what="the dead letters") or []


def runs_after(contract: Contract) -> None:
    """Have a task run."""
    path = contract.path()
    contract.tasks.jot.using(queue=QUEUE).delay(str(path))
    wait_until(lambda: runs(path), 20, what="a task that was sent after it")


@pytest.fixture
def contract(qbridge_rabbitmq: RabbitMQServer, tmp_path: Path) -> Iterator[Contract]:
    """An empty vhost, and results in a file."""
    with qbridge_rabbitmq.heal().fresh() as url:
        contract = Contract(url, f"sqlite:///{tmp_path / 'results.db'}", tmp_path)
        yield contract
        contract.close()


@pytest.mark.parametrize("pool", ["solo", "process"])
def test_a_worker_lives_on_and_keeps_what_it_cannot_read(contract: Contract, pool: str) -> None:
    """Each ends a worker of plain Celery, and then the next one; here each is a dead letter with all that it had."""
    with contract.worker_of(QUEUE, pool=pool) as worker:
        runs_after(contract)
        for raw in UNREADABLE.values():
            send(contract, raw)
        runs_after(contract)
        kept = lying(contract, len(UNREADABLE))
        assert worker.process.exit_code() is None
    assert [letter.reason for letter in kept] == ["malformed"] * len(UNREADABLE)
    assert {letter.body for letter in kept} == {BODY}
    told = [base64.b64decode(letter.headers["qbridge_unreadable"]) for letter in kept]
    assert told == [raw[:40_000] for raw in UNREADABLE.values()]
    with pytest.raises(PayloadError, match="names no task"):
        contract.bridge.dead_letters.replay(kept[0].id)
    assert len(kept) == len(contract.bridge.dead_letters.list(QUEUE))


def test_an_empty_body_in_an_encoding_that_no_codec_can_be_called(contract: Contract) -> None:
    """A null in it is no unknown name to Python: the copy could not be written, and its place was never free again."""
    raw = b"\xe0\x00" + short(b"application/json") + short(b"utf-8\x00")
    raw += table(TASK, short(b"id") + b"S" + pack(">I", 1) + b"1")
    with contract.worker_of(QUEUE, pool="solo"):
        runs_after(contract)
        for _ in range(8):  # more than it may hold
            send(contract, raw, body=b"")
        runs_after(contract)
        assert {letter.body for letter in lying(contract, 8)} == {b""}


@pytest.mark.parametrize("pool", ["solo", "process"])
@pytest.mark.parametrize("value", [nested(600), b"S" + pack(">I", 130_800) + b"x" * 130_800], ids=["deep", "long"])
def test_headers_that_can_be_read_and_not_be_written(contract: Contract, value: bytes, pool: str) -> None:
    """Their copy failed each time, and they kept their places: a table of 600 levels, one as large as a frame."""
    with contract.worker_of(QUEUE, pool=pool):
        runs_after(contract)
        for _ in range(8):  # more than it may hold
            send(contract, b"\x20\x00" + table(TASK, short(b"much") + value))
        runs_after(contract)
        kept = lying(contract, 8)
    assert {(letter.reason, letter.task, letter.headers["qbridge_cut"], letter.body) for letter in kept} == {
        ("too_large", "echo", "much", BODY)
    }


def names_of_three() -> Iterator[bytes]:
    """Names of headers that take little room."""
    return (bytes(letters) for letters in product(b"abcdefghijklmnopqrstuvwxyz", repeat=3))


SWITCH = b"t\x01"
TOO_LARGE = {
    "many small values": table(TASK, *(short(name) + b"b\x01" for name in islice(names_of_three(), 15_500))),
    "wide names": table(TASK, *(short((chr(0x4E00 + number) * 85).encode()) + SWITCH for number in range(507))),
    "a record": table(TASK, short(b"qbridge_dead_letter") + b"S" + pack(">I", 130_980) + b"x" * 130_980),
}


@pytest.mark.parametrize("headers", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_copy_fits_a_frame_whatever_fills_the_message(contract: Contract, headers: bytes) -> None:
    """Their copies were larger than a frame of RabbitMQ: none could be written, and a worker heard nothing any more."""
    with contract.worker_of(QUEUE, pool="solo"):
        runs_after(contract)
        for _ in range(8):  # more than it may hold
            send(contract, b"\x20\x00" + headers)
        runs_after(contract)
        kept = lying(contract, 8)
    assert {(letter.task, letter.body, letter.reason) for letter in kept} <= {
        ("echo", BODY, "too_large"), ("echo", BODY, "foreign")
    }  # fmt: skip


DEPTHS = range(930, 1001)
"""Where Python's stack ends while py-amqp reads a table; where exactly depends on who reads."""


@pytest.mark.parametrize("pool", ["solo", "thread", "process"])
def test_tables_of_every_depth_at_a_worker(contract: Contract, pool: str) -> None:
    """Those that are read by one way and not by another, too; and in what is sent to all workers."""
    with contract.worker_of(QUEUE, pool=pool) as worker:
        runs_after(contract)
        for depth in DEPTHS:
            raw = b"\x20\x00" + table(TASK, short(b"deep") + nested(depth))
            send(contract, raw)
            send(contract, raw, exchange="celery.pidbox", key="")
        runs_after(contract)
        kept = lying(contract, len(DEPTHS))
        assert worker.process.exit_code() is None
    assert len(kept) == len(DEPTHS)
    assert {letter.reason for letter in kept} == {"malformed", "too_large"}


def test_a_copy_goes_to_one_place(contract: Contract) -> None:
    """``CC`` names queues to which RabbitMQ also gives a message: each copy made another one, for ever."""
    with contract.worker_of(QUEUE, pool="solo"):
        runs_after(contract)
        copies = b"A" + pack(">I", 5 + len(QUEUE)) + b"S" + pack(">I", len(QUEUE)) + QUEUE.encode()
        send(contract, b"\x20\x00" + table(TASK, short(b"CC") + copies))
        runs_after(contract)
        runs_after(contract)
        assert len(lying(contract, 1)) <= 2  # RabbitMQ may give it twice to a queue that is named twice


def test_a_routing_key_that_is_no_text(contract: Contract) -> None:
    """A topic exchange takes any; the message is handled like others, by its queue."""
    with contract.worker_of(QUEUE, pool="solo"):
        runs_after(contract)
        with contract.bridge.celery.connection_for_write() as connection:
            bound = Queue(QUEUE, Exchange("any", "topic"), "#")(connection.default_channel)
            bound.exchange.declare()
            bound.queue_bind()
        send(contract, b"\x20\x00" + table(TASK), exchange="any", key=TEXT)
        runs_after(contract)
        (kept,) = lying(contract, 1)
        assert kept.body == BODY


def test_dead_letters_are_listed_whatever_lies_among_them(contract: Contract) -> None:
    """Somebody else has put it there: it is read one by one, with the answer that names its routing key."""
    with contract.worker_of(QUEUE, pool="solo"):
        send(contract, UNREADABLE["a content type that is no text"])
        lying(contract, 1)
    with contract.bridge.celery.connection_for_write() as connection:
        bound = Queue(f"{QUEUE}.dead", Exchange("any", "topic"), "#")(connection.default_channel)
        bound.exchange.declare()
        bound.queue_bind()
    send(contract, UNREADABLE["a correlation id that is no text"], exchange="any", key=TEXT)
    assert len(lying(contract, 2)) == 2


def test_an_answer_that_cannot_be_read_keeps_no_other_one(qbridge_rabbitmq: RabbitMQServer, tmp_path: Path) -> None:
    """Results over rpc: who may write to the queue of answers cannot end the thread that receives them."""
    with qbridge_rabbitmq.heal().fresh() as url:
        contract = Contract(url, "rpc://", tmp_path)
        try:
            with contract.worker_of("default", pool="solo"):
                assert contract.tasks.note.delay(str(contract.path()), "before").get(timeout=20) == "before"
                address = contract.bridge.celery.backend.oid
                deep = (b"\x20\x00" + table(TASK, short(b"deep") + nested(depth)) for depth in DEPTHS)
                for raw in (*UNREADABLE.values(), *deep):
                    send(contract, raw, key=address)
                assert contract.tasks.note.delay(str(contract.path()), "after").get(timeout=20) == "after"
        finally:
            contract.close()
