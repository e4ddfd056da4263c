"""What can whoever may write to Redis do to a worker? Each message is run, kept, or thrown away with a word in the log.

One worker for all of it: eight copies of a message are more than it has places. A test that ends it gives the next one
another.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis

from qbridge.backends.redis import scripts
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract, WorkerProcess
from qbridge.testing.servers import RedisServer
from qbridge.testing.waiting import wait_until

QUEUE = "fragile"
COPIES = 8
DEEP = b"[" * 100_000
FUTURE = "2090-01-01T00:00:00+00:00"


class Place:
    """A bridge on an empty Redis, a client of it, and a worker."""

    def __init__(self, contract: Contract, client: redis.Redis, stack: ExitStack) -> None:
        self.contract = contract
        self.client = client
        self._stack = stack
        self._worker: WorkerProcess | None = None

    @property
    def worker(self) -> WorkerProcess:
        if self._worker is None or self._worker.process.exit_code() is not None:
            self._worker = self._stack.enter_context(self.contract.worker_of(QUEUE, pool="solo"))
        return self._worker

    def begin(self) -> None:
        """Remove what the test before has left."""
        _ = self.worker
        self.client.delete(QUEUE, f"{QUEUE}.dead", "qbridge.schedule", "qbridge.scheduled", "qbridge.again")

    def told(self, words: str) -> int:
        """How often the worker has said something."""
        return self.worker.log.read_text(errors="replace").count(words)

    def must_be_well(self) -> None:
        """A good task runs, in the process that there was, and nothing stays claimed."""
        worker, path = self.worker, self.contract.path()
        self.contract.tasks.jot.using(queue=QUEUE).delay(str(path))
        wait_until(
            lambda: runs(path) or worker.process.exit_code() is not None, 10, what=f"the good task\n{worker.log}"
        )
        assert worker.process.exit_code() is None, worker.process.tail(30)
        wait_until(lambda: not self.client.hlen("unacked"), 10, what="everything to be settled")
        assert 0 == self.client.hlen("qbridge.claims")

    def envelope(self, **changes: Any) -> dict[str, Any]:
        """A task of which only ``changes`` (of headers and properties, by name) are not as kombu writes them."""
        path = self.contract.path()
        headers = {"task": self.contract.tasks.jot.name, "id": str(uuid.uuid4()), "lang": "py", "root_id": "r"}
        properties = {
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "priority": 0,
        }
        return {
            "body": base64.b64encode(json.dumps([[str(path)], {}, {}]).encode()).decode(),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": headers | changes.pop("headers", {}),
            "properties": properties | changes,
        }

    def put(self, **changes: Any) -> None:
        """Push copies of such a task."""
        self.client.lpush(QUEUE, *(json.dumps(self.envelope(**changes)) for _ in range(COPIES)))


@pytest.fixture(scope="module")
def shared(qbridge_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hostile")
    with qbridge_redis.heal().fresh() as url, redis.Redis.from_url(url) as client, ExitStack() as stack:
        contract = Contract(url, f"sqlite:///{folder / 'results.db'}", folder)
        stack.callback(contract.close)
        yield Place(contract, client, stack)


@pytest.fixture
def place(shared: Place) -> Place:
    shared.begin()
    return shared


TIMES = {
    "infinity": float("inf"),
    "no number": float("nan"),
    "four hundred digits": 10**400,
    "after the last year": 1e300,
    "text": "tomorrow",
}


@pytest.mark.parametrize("time", TIMES)
def test_a_time_that_there_is_not_makes_a_dead_letter(place: Place, time: str) -> None:
    """It came in the header by which a worker puts messages off, and ended the worker before any task could run."""
    place.put(headers={"qbridge_not_before": TIMES[time]})
    place.must_be_well()
    found = wait_until(
        lambda: len(letters := place.contract.bridge.dead_letters.list(QUEUE)) == COPIES and letters, 10, what="letters"
    )
    assert {"malformed"} == {letter.reason for letter in found}
    assert {place.contract.tasks.jot.name} == {letter.task for letter in found}


@pytest.mark.parametrize("where", ["headers", "body", "properties"])
def test_what_could_not_be_written_as_a_dead_letter_holds_no_place(place: Place, where: str) -> None:
    """Python reads more levels than it writes: such a message was tried again for ever, in the place of others."""
    thrown = place.told("Threw away an item")
    for levels in range(600, 965, 52):
        one = place.envelope()
        one.update(body="@@") if where == "body" else one[where].update(x="@@")
        place.client.lpush(QUEUE, json.dumps(one).replace('"@@"', "[" * levels + "]" * levels))
    place.must_be_well()
    kept = place.client.llen(f"{QUEUE}.dead")
    assert ((COPIES, 0) if where == "headers" else (0, COPIES)) == (kept, place.told("Threw away an item") - thrown)


@pytest.mark.parametrize("priority", [float("inf"), 10**400])
def test_an_infinite_priority_is_none(place: Place, priority: float) -> None:
    """The task waits for its time like others."""
    place.put(headers={"eta": FUTURE}, priority=priority)
    place.must_be_well()
    assert COPIES == place.client.zcard("qbridge.schedule") == place.client.hlen("qbridge.scheduled")


def test_a_delivery_tag_that_is_no_text_is_thrown_away_and_not_held(place: Place) -> None:
    """Redis's reader of JSON lets such bytes pass, Python's does not."""
    before = place.told("Threw away an item")
    for number in range(COPIES):
        raw = json.dumps(place.envelope(delivery_tag=f"@@{number}")).encode()
        place.client.lpush(QUEUE, raw.replace(b"@@", b"\xff\xfe"))
    place.must_be_well()
    assert before + COPIES == place.told("Threw away an item")


@pytest.mark.parametrize("name", ["exchange", "routing_key"])
@pytest.mark.parametrize("value", [["a"], {"a": 1}, 5])
def test_names_that_are_no_text_are_thrown_away(place: Place, name: str, value: Any) -> None:
    """Tables of kombu and Celery are asked for them."""
    before = place.told("Threw away an item")
    place.put(delivery_info={"exchange": "", "routing_key": QUEUE, name: value})
    place.must_be_well()
    assert before + COPIES == place.told("Threw away an item")


@pytest.mark.parametrize("key", [None, "idle", "nowhere"])
def test_a_routing_key_does_not_tell_whose_a_dead_letter_is(place: Place, key: str | None) -> None:
    """It is kept for the queue that its message was in: the key may name another one, or none."""
    place.put(
        headers={"task": "nobody.knows"}, delivery_info={"exchange": "", "routing_key": key, "qbridge_queue": "idle"}
    )
    place.must_be_well()
    wait_until(lambda: place.client.llen(f"{QUEUE}.dead") == COPIES, 10, what="the letters")
    letters = place.contract.bridge.dead_letters.list(QUEUE)
    assert {("unknown_task", QUEUE)} == {(letter.reason, letter.queue) for letter in letters}


def pidbox(place: Place) -> str:
    return f"/{place.client.connection_pool.connection_kwargs['db']}.celery.pidbox"


UNREADABLE = {
    "too deep": DEEP,
    "a decimal that is none": json.dumps({"__type__": "decimal", "__value__": "x"}).encode(),
    "no text": b"\xff",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_broadcast_that_cannot_be_read_is_dropped_alone(place: Place, name: str) -> None:
    """One PUBLISH ended every worker; a command that comes in the same packet as two of them is obeyed."""
    command = {
        "body": json.dumps({"method": "revoke", "arguments": {"task_id": f"told after {name}"}}),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {},
        "properties": {
            "delivery_tag": "c",
            "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""},
            "priority": 0,
        },
    }
    said = place.told("Dropped what was published") + place.told("Cannot process event")
    with place.client.pipeline() as pipe:
        for what in (UNREADABLE[name], UNREADABLE[name], json.dumps(command)):
            pipe.publish(pidbox(place), what)
        assert [1, 1, 1] == pipe.execute()
    wait_until(lambda: place.told(f"told after {name}") or place.worker.process.exit_code(), 5, what="the command")
    place.must_be_well()
    assert said + 2 == place.told("Dropped what was published") + place.told("Cannot process event")


NO_LETTERS = {
    "too deep": DEEP,
    "headers that are a list": {"headers": [1]},
    "headers that are text": {"headers": "ab"},
    "properties that are a list": {"properties": [1]},
    "properties that are text": {"properties": "ab"},
    "a decimal that is none": {"headers": {"__type__": "decimal", "__value__": "x"}},
}


def test_what_is_no_letter_does_not_hide_the_letters(place: Place) -> None:
    """They are listed, and can be thrown away; the rest is left out, as what is no JSON always was."""
    key = f"{QUEUE}.dead"
    for what in NO_LETTERS.values():
        place.client.lpush(key, what if isinstance(what, bytes) else json.dumps({**place.envelope(), **what}))
    letter = place.envelope()
    place.client.lpush(key, json.dumps(letter))
    dead_letters = place.contract.bridge.dead_letters
    ids = [found.task_id for found in dead_letters.list(QUEUE)]
    assert letter["headers"]["id"] in ids
    assert len(ids) == len(dead_letters.discard(queue=QUEUE))


def test_a_letter_of_infinite_priority_can_be_sent_again(place: Place) -> None:
    """It runs."""
    place.client.lpush(f"{QUEUE}.dead", json.dumps(place.envelope(priority=float("inf"))))
    assert 1 == len(place.contract.bridge.dead_letters.replay(queue=QUEUE))
    wait_until(lambda: not place.client.llen(QUEUE), 10, what="the worker to take it")
    place.must_be_well()


@pytest.mark.parametrize("value", [b"\xff\xfe", b"a b c", b"9" * 5000 + b" 1", b""])
def test_a_task_whose_deliveries_are_counted_in_garbage_runs(place: Place, value: bytes) -> None:
    """The count is somebody else's; the task is not."""
    path, one = place.contract.path(), place.envelope()
    one["body"] = base64.b64encode(json.dumps([[str(path)], {}, {}]).encode()).decode()
    place.client.hset("qbridge.again", one["properties"]["delivery_tag"], value)
    place.client.lpush(QUEUE, json.dumps(one))
    place.must_be_well()
    assert 1 == len(runs(path))


def test_a_count_that_is_no_table_costs_no_task(place: Place) -> None:
    """Tasks were popped, then the script failed."""
    place.client.set("qbridge.again", "x")
    place.must_be_well()


def test_a_schedule_without_end_does_not_end_the_worker(place: Place) -> None:
    """It computes how long it may wait for what is due next."""
    place.client.zadd("qbridge.schedule", {"x": float("inf")})
    place.must_be_well()


# -- the scripts alone

KEYS = ["holders", "claims", "unacked", "index", "again", "schedule", "scheduled", "list"]


def claim(client: redis.Redis) -> Any:
    return scripts.CLAIM.run(client, KEYS, ["holder:30000", "holder:30000/1", 30000, 10, 1, 0, "1"])[3]


@pytest.fixture
def bare(qbridge_redis: RedisServer) -> Iterator[redis.Redis]:
    with qbridge_redis.heal().fresh() as url, redis.Redis.from_url(url) as client:
        client.lpush("list", json.dumps({"properties": {"delivery_tag": "t"}}))
        yield client


@pytest.mark.parametrize("key", ["holders", "claims", "unacked", "index"])
def test_a_claim_that_fails_has_popped_nothing(bare: redis.Redis, key: str) -> None:
    """A key of another type is found first."""
    bare.set(key, "x")
    with pytest.raises(redis.ResponseError):
        claim(bare)
    assert 1 == bare.llen("list")


@pytest.mark.parametrize("spoil", ["a count", "the counts"])
def test_what_is_given_back_is_there_again_whatever_counts_it(bare: redis.Redis, spoil: str) -> None:
    """The message had left its place before the count was read."""
    if spoil == "a count":
        bare.hset("again", "t", b"\xff\xfe")
    assert 1 == len(claim(bare))
    if spoil == "the counts":
        bare.set("again", "x")
    args = ["RPUSH", "t", "holder:30000/1"]
    assert [] == scripts.GIVE_BACK.run(bare, ["claims", "unacked", "index", "again"], args)
    assert 1 == bare.llen("list")
    assert 0 == bare.hlen("claims") == bare.hlen("unacked")


def test_what_cannot_be_given_back_stays_claimed(bare: redis.Redis) -> None:
    """Its list is no list any more."""
    claim(bare)
    bare.set("list", "x")
    with pytest.raises(redis.ResponseError):
        scripts.GIVE_BACK.run(bare, ["claims", "unacked", "index", "again"], ["RPUSH", "t", "holder:30000/1"])
    assert 1 == bare.hlen("claims") == bare.hlen("unacked")
