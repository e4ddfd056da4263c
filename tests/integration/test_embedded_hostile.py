"""Whatever somebody writes into the embedded broker's file, do workers, senders and readers go on?"""

from __future__ import annotations

import base64
import json
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import kombu
import pytest

from qbridge import BrokerUnavailable, DeadLetter
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract, WorkerProcess
from qbridge.testing.waiting import wait_until

COPIES = 8
"""More than a worker of one task at a time has places."""

BODY = b"[[], {}, {}]"
DEAD_PARTY = "999999999-0123456789abcdef"


class Place:
    """A broker's file with a worker on it, and a way to write anything into the file."""

    def __init__(self, contract: Contract, worker: WorkerProcess | None = None) -> None:
        self.contract = contract
        self.worker = worker

    @contextmanager
    def sql(self) -> Iterator[sqlite3.Connection]:
        path = self.contract.bridge.config.broker.path  # type: ignore[union-attr]
        with closing(sqlite3.connect(path, timeout=10)) as connection, connection:
            yield connection

    def insert(self, envelope: Any, body: Any = BODY, queue: str = "fragile", **columns: Any) -> None:
        row = {"queue": queue, "priority": 5, "envelope": envelope, "body": body, **columns}
        # bytes stand for a text that is none
        places = ", ".join("CAST(? AS TEXT)" if isinstance(value, bytes) else "?" for value in row.values())
        with self.sql() as sql:
            sql.execute(f"INSERT INTO message ({', '.join(row)}) VALUES ({places})", tuple(row.values()))

    def letters(self) -> list[DeadLetter]:
        return self.contract.bridge.dead_letters.list("fragile", limit=None)

    def must_be_well(self) -> None:
        """A task runs now, in the same process."""
        assert self.worker is not None
        path = self.contract.path()
        self.contract.tasks.jot.using(queue="fragile").delay(str(path))
        wait_until(lambda: runs(path), 6, what="a good task to run")
        assert self.worker.process.exit_code() is None

    def given_up(self) -> list[DeadLetter]:
        """The dead letters of all copies, which leave the place as it was."""
        # sooner than a message comes again whose dead letter could not be written
        wait_until(lambda: len(self.letters()) == COPIES, 4, what="the dead letters")
        letters = self.letters()
        self.contract.bridge.dead_letters.discard(queue="fragile")
        wait_until(lambda: self.left() == 0, 4, what="nobody to hold one")  # its letter is there before it goes
        return letters

    def left(self) -> int:
        with self.sql() as sql:
            (number,) = sql.execute("SELECT count(*) FROM message WHERE queue = 'fragile'").fetchone()
        return int(number)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A worker of the solo pool."""
    folder = tmp_path_factory.mktemp("hostile")
    contract = Contract(f"embedded://{folder / 'b.db'}", f"sqlite:///{folder / 'r.db'}", folder)
    with closing(contract), contract.worker_of("fragile", pool="solo") as worker:
        yield Place(contract, worker)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Place]:
    """A file without a worker."""
    contract = Contract(f"embedded://{tmp_path / 'b.db'}", f"sqlite:///{tmp_path / 'r.db'}", tmp_path)
    with closing(contract):
        contract.tasks.jot.using(queue="fragile").delay("x")
        contract.purge("fragile")
        yield Place(contract)


def envelope(headers: Any = ..., properties: Any = ..., info: Any = ..., **changes: Any) -> str:
    """What kombu writes for a task that nobody knows, with changes."""
    info = {"exchange": "", "routing_key": "fragile", "priority": 5} if info is ... else info
    return json.dumps({
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"task": "nobody.knows", "id": "x"} if headers is ... else headers,
        "properties": {"delivery_info": info, "delivery_mode": 2, "priority": 5} if properties is ... else properties,
        **changes,
    })  # fmt: skip


UNREADABLE: dict[str, Any] = {
    "JSON that is too deep": "[" * 100_000,
    "text that is no UTF-8": b"{\xff",
    "a number": 5,
    "a mapping of nothing": "{}",
    "no message": "[1]",
    "a date": json.dumps({"__type__": "datetime", "__value__": 5}),
    "headers that are a list": envelope(headers=[1]),
    "properties that are a list": envelope(properties=[1]),
    "delivery info that is a list": envelope(info=[1]),
    "delivery info that is null": envelope(info=None),
    "a routing key that is a list": envelope(info={"exchange": "", "routing_key": [1]}),
    "an exchange that is a mapping": envelope(info={"exchange": {}, "routing_key": "fragile"}),
    "a content type that is a list": envelope(**{"content-type": [1]}),
    "a content encoding that is a number": envelope(**{"content-encoding": 5}),
    "a body encoding that nobody has": envelope(properties={"delivery_info": {}, "body_encoding": "nope"}),
    "a body encoding that is a list": envelope(properties={"delivery_info": {}, "body_encoding": [1]}),
    "a body that is not in its encoding": envelope(properties={"delivery_info": {}, "body_encoding": "base64"}),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_row_that_is_no_message_becomes_a_dead_letter(place: Place, name: str) -> None:
    """In its own queue's dead letters, with the beginning of its envelope in a header; the worker goes on."""
    for _ in range(COPIES):
        place.insert(UNREADABLE[name])
    place.must_be_well()
    letters = place.given_up()
    assert {("malformed", BODY)} == {(letter.reason, letter.body) for letter in letters}
    raw = UNREADABLE[name] if isinstance(UNREADABLE[name], bytes) else str(UNREADABLE[name]).encode()
    assert {raw[:40_000]} == {base64.b64decode(letter.headers["qbridge_unreadable"]) for letter in letters}


def test_a_body_encoding_that_nobody_has_is_refused(place: Place) -> None:
    """Sent by a plain producer, it becomes a dead letter, and the log names the queue."""
    assert place.worker is not None
    with place.contract.bridge.celery.connection_for_write() as connection:
        for _ in range(COPIES):
            kombu.Producer(connection.default_channel).publish(
                BODY, "fragile", headers={"task": "nobody.knows", "id": "x"}, body_encoding="nope",
                content_type="application/json", content_encoding="utf-8", exchange="",
            )  # fmt: skip
    place.must_be_well()
    assert {("malformed", BODY)} == {(letter.reason, letter.body) for letter in place.given_up()}
    assert "A message of fragile cannot be read: ValueError" in place.worker.log.read_text()


@pytest.mark.parametrize("key", [None, "idle", "nowhere"])
def test_a_routing_key_does_not_tell_whose_a_dead_letter_is(place: Place, key: str | None) -> None:
    """It is kept for the queue that its message was in: the key may name another one, or none."""
    for _ in range(COPIES):
        place.insert(envelope(info={"exchange": "", "routing_key": key, "qbridge_queue": "idle"}))
    place.must_be_well()
    assert {("unknown_task", "fragile")} == {(letter.reason, letter.queue) for letter in place.given_up()}


ODD: dict[str, dict[str, Any]] = {
    "a body that is a number": {"body": 5},
    "a body that is no UTF-8": {"body": b"\xff\xfe"},
    "deliveries that are no whole number": {"deliveries": 0.5},
    "deliveries that are as many as there can be": {"deliveries": 2**63 - 1},
    "deliveries that are text": {"deliveries": "many", "losses": "some"},
    "no address": {"envelope": envelope(info={})},
    "a time that is text": {"not_before": "tomorrow"},
    "a time that never comes": {"not_before": float("inf")},
    "a time that is text that is no UTF-8": {"not_before": b"\xff"},
    "a header with a time that is no number there is": {
        "envelope": envelope(headers={"task": "nobody.knows", "id": "x", "qbridge_not_before": 10**400})
    },
    "a header with a time that never comes": {
        "envelope": envelope(headers={"task": "nobody.knows", "id": "x", "qbridge_not_before": float("inf")})
    },
}


@pytest.mark.parametrize("name", ODD)
def test_a_row_with_odd_values_is_handled_like_any_other(place: Place, name: str) -> None:
    """Its task is unknown, so it becomes a dead letter; nothing waits for ever or comes again and again."""
    row = {"envelope": envelope(), **ODD[name]}
    for _ in range(COPIES):
        place.insert(**row)
    place.must_be_well()
    letters = place.given_up()
    body = row.get("body", BODY)
    assert {("unknown_task", body if isinstance(body, bytes) else str(body).encode())} == {
        (letter.reason, letter.body) for letter in letters
    }


PARTIES = {
    "a path": lambda folder: str(folder / "victim").encode(),
    "a way out of the folder": lambda folder: b"../victim",
    "a null character": lambda folder: b"a\0b",
    "one of ours and a null character": lambda folder: DEAD_PARTY.encode() + b"\0b",
    "text that is no UTF-8": lambda folder: b"\xff",
}  # fmt: skip


@pytest.mark.parametrize("name", PARTIES)
def test_a_party_that_none_can_be_touches_no_file_and_stops_no_takeover(place: Place, name: str) -> None:
    """Workers take over from it, and from real ones that died, and whoever sends to its queue is not stopped."""
    folder = place.contract.folder
    party = PARTIES[name](folder)
    victim = folder / "victim.lock"
    victim.write_text("precious")
    paths = [str(place.contract.path()) for _ in range(2)]
    for path in paths:
        place.contract.tasks.jot.using(queue="idle").delay(path)
    with place.sql() as sql:
        claims = [row[0] for row in sql.execute("SELECT id FROM message WHERE queue = 'idle'")]
        for number, holder in zip(claims, (party, DEAD_PARTY.encode()), strict=True):
            sql.execute("INSERT INTO party VALUES (CAST(? AS TEXT), 1, 1)", (holder,))
            sql.execute("UPDATE message SET queue = 'fragile', party = CAST(? AS TEXT) WHERE id = ?", (holder, number))
        sql.execute("INSERT INTO consumer VALUES ('fragile', CAST(? AS TEXT), 't')", (party,))
        # a queue of its own that is over, under a name that is no text either
        sql.execute("INSERT INTO queue VALUES (CAST(? AS TEXT), 1, 0, NULL, NULL, 1, 1)", (b"\xff" + party,))
    place.must_be_well()
    for path in paths:
        wait_until(lambda path=path: runs(Path(path)), 6, what="what a dead party held")  # type: ignore[misc]
    with place.sql() as sql:
        known = sql.execute("SELECT count(*) FROM party WHERE pid = 1").fetchall()
        over = sql.execute("SELECT count(*) FROM queue WHERE used_at = 1").fetchall()
    assert [(0,)] == known == over
    assert victim.read_text() == "precious"
    assert place.worker is not None
    assert "parties from the embedded broker's file whose names no qbridge has made" in place.worker.log.read_text()


def test_a_consumer_that_none_can_be_stops_no_sender(file: Place) -> None:
    """Nor does a time to live that is no number."""
    with file.sql() as sql:
        sql.execute("INSERT INTO consumer VALUES ('fragile', ?, 't')", ("a\0b",))
        sql.execute("UPDATE queue SET message_ttl = 'long' WHERE name = 'fragile'")
    file.contract.tasks.jot.using(queue="fragile").delay("x")
    assert file.contract.depth("fragile") == 1


def test_a_priority_that_is_infinite_is_a_normal_one(file: Place) -> None:
    """A worker that sends such a message again must be able to."""
    with file.contract.bridge.celery.connection_for_write() as connection:
        channel = connection.default_channel
        message = channel.prepare_message(b"[]", priority=5, properties={"priority": float("inf")})
        channel.basic_publish(message, "", "fragile")
    with file.sql() as sql:
        assert [(5,)] == sql.execute("SELECT priority FROM message").fetchall()


FOREIGN: dict[str, Any] = {
    **UNREADABLE,
    "bytes": memoryview(b"\xff"),
    "properties without an address": envelope(properties={}),
    "no headers": envelope(headers=None),
    "a priority that is none": envelope(properties={"priority": [1]}),
}


@pytest.mark.parametrize("number", [5, BODY, None])
def test_foreign_dead_letters_are_listed_and_can_be_sent_or_discarded(file: Place, number: Any) -> None:
    """Whatever somebody has put there, of whatever type, beside others."""
    for text in FOREIGN.values():
        file.insert(text, number, "fragile.dead")
    letters = file.letters()
    body = b"" if number is None else b"5" if number == 5 else BODY
    assert [("foreign", body)] * len(FOREIGN) == [(letter.reason, letter.body) for letter in letters]
    deep = base64.b64decode(letters[0].headers["qbridge_unreadable"])
    assert deep == b"[" * 40_000
    dead_letters = file.contract.bridge.dead_letters
    assert len(dead_letters.discard(queue="fragile", limit=3)) == 3
    unreadable = {letter.id for letter in letters if "qbridge_unreadable" in letter.headers}
    kept = {letter.id for letter in dead_letters.list(queue="fragile", limit=None)}
    skipped: set[str] = set()
    sent = dead_letters.replay(queue="fragile", skipped=lambda letter, why: skipped.add(letter.id))
    assert skipped == unreadable & kept  # there is nothing to run
    assert {letter.id for letter in sent} == kept - unreadable
    assert file.contract.depth("fragile") == len(sent)
    assert len(sent) + len(skipped) == len(FOREIGN) - 3


def row_with(number: int) -> str:
    return f"INSERT INTO message (id, queue, priority, envelope, body) VALUES ({number}, 'idle', 5, '{{}}', '')"


NUMBERS = {
    "the largest": [row_with(2**63 - 1)],
    "the last but one": [row_with(2**63 - 2)],
    "a row that is gone": [row_with(2**63 - 1), "DELETE FROM message WHERE queue = 'idle'"],
    "the count itself": ["UPDATE sqlite_sequence SET seq = 9223372036854775807 WHERE name = 'message'"],
    "many": [row_with(number) for number in (2**61, 2**61 + 1, 2**62 - 1, 2**62, 2**63 - 2, 2**63 - 1)],
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_used_up_stop_no_sender(place: Place, name: str) -> None:
    """All that is sent arrives and runs, and what was there is there still, under numbers that lead on."""
    with place.sql() as sql:
        for statement in NUMBERS[name]:
            sql.execute(statement)
        there = sql.execute("SELECT count(*) FROM message WHERE queue = 'idle'").fetchone()
    for _ in range(3):
        place.must_be_well()
    with place.sql() as sql:
        assert there == sql.execute("SELECT count(*) FROM message WHERE queue = 'idle'").fetchone()
        (last,) = sql.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'message'").fetchone()
        (most,) = sql.execute("SELECT coalesce(max(id), 0) FROM message").fetchone()
        sql.execute("DELETE FROM message WHERE queue = 'idle'")
    assert max(last, most) < 2**61 + 1000


def test_numbers_that_are_used_up_keep_no_dead_letter_from_being_sent_again(file: Place) -> None:
    """It is in one queue or the other."""
    file.insert(envelope(), queue="fragile.dead")
    with file.sql() as sql:
        sql.execute("UPDATE sqlite_sequence SET seq = 9223372036854775807 WHERE name = 'message'")
    assert len(file.contract.bridge.dead_letters.replay(queue="fragile")) == 1
    assert file.contract.depth("fragile") == 1
    assert file.letters() == []


def test_exchanges_of_types_that_there_are_not_keep_no_worker_from_starting(file: Place) -> None:
    """They get the type that is declared."""
    odd = {"celery.pidbox": "nonsense", "reply.celery.pidbox": b"\xff", "celeryev": 5}
    with file.sql() as sql:
        sql.executemany("INSERT INTO exchange VALUES (?, CAST(? AS TEXT))", odd.items())
    with file.contract.worker_of("fragile", pool="solo") as worker:
        Place(file.contract, worker).must_be_well()
    with file.sql() as sql:
        types = sql.execute("SELECT type FROM exchange WHERE name = 'celery.pidbox'").fetchall()
    assert types == [("fanout",)]


def test_a_trigger_holds_no_sender_beyond_its_bound(file: Place) -> None:
    """Where Python can turn triggers off (3.12), it holds nobody."""
    bridge = file.contract.another_bridge(broker={"publish_timeout": 1.0})
    jot = file.contract.declare_on(bridge).jot.using(queue="fragile")
    jot.delay("x")
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 1000000000) SELECT i FROM n"
    with file.sql() as sql:
        sql.execute(f"CREATE TRIGGER t BEFORE INSERT ON message BEGIN SELECT count(*) FROM ({endless}); END")
    began = time.monotonic()
    if sys.version_info >= (3, 12):
        jot.delay("x")
    else:
        with pytest.raises(BrokerUnavailable, match="triggers"):
            jot.delay("x")
    assert time.monotonic() - began < 2.0


def test_a_purge_takes_more_messages_than_one_step(file: Place) -> None:
    """Delayed and ready ones."""
    with file.sql() as sql:
        sql.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 45000)"
            " INSERT INTO message (queue, priority, envelope, body) SELECT 'fragile', 5, '{}', '' FROM n"
        )
    with file.contract.bridge.celery.connection_for_write() as connection:
        assert connection.default_channel.queue_purge("fragile") == 45_000
