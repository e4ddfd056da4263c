"""What can whoever may write to Redis do to a worker? Each message is run, kept, or thrown away with a word in the log.

One worker for all of it: eight copies of a message are more than it has places. A test that ends it gives the next one
another.
"""

# long because: what the scripts do with a key is beside what a worker then does.

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis

from qbridge import Bridge, BridgeConfig
from qbridge.backends.redis import scripts
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract, WorkerProcess
from qbridge.testing.servers import RedisServer
from qbridge.testing.waiting import wait_until

QUEUE = "fragile"
OTHER = "idle"
LOST = "Connection to broker lost"
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
        self._lost = 0

    @property
    def worker(self) -> WorkerProcess:
        """The one that there was when the test began."""
        assert self._worker is not None
        return self._worker

    def begin(self) -> None:
        """Remove what the test before has left, its worker too if it ended that one."""
        if self._worker is None or self._worker.process.exit_code() is not None:
            self._worker = self._stack.enter_context(self.contract.worker_of(QUEUE, OTHER, pool="solo"))
        self.client.delete(QUEUE, f"{QUEUE}.dead", "qbridge.schedule", "qbridge.scheduled", "qbridge.again")
        self.client.delete(f"qbridge.wake.{QUEUE}")
        self._lost = self.told(LOST)

    def told(self, words: str) -> int:
        """How often the worker has said something."""
        return self.worker.log.read_text(errors="replace").count(words)

    def must_be_well(self, queue: str = QUEUE) -> None:
        """A good task runs, in the process and on the connection that there were, and nothing stays claimed."""
        worker, path = self.worker, self.contract.path()
        assert worker.process.exit_code() is None, worker.process.tail(30)
        self.contract.tasks.jot.using(queue=queue).delay(str(path))
        wait_until(
            lambda: runs(path) or worker.process.exit_code() is not None, 10, what=f"the good task\n{worker.log}"
        )
        assert worker.process.exit_code() is None, worker.process.tail(30)
        assert {worker.pid} == {pid for pid, *_ in runs(path)}
        assert self._lost == self.told(LOST), worker.process.tail(30)
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


@pytest.mark.parametrize("name", TIMES)
def test_a_time_that_there_is_not_makes_a_dead_letter(place: Place, name: str) -> None:
    """It came in the header by which a worker puts messages off, and ended the worker before any task could run."""
    place.put(headers={"qbridge_not_before": TIMES[name]})
    place.must_be_well()
    found = wait_until(
        lambda: len(letters := place.contract.bridge.dead_letters.list(QUEUE)) == COPIES and letters, 10, what="letters"
    )
    assert {"malformed"} == {letter.reason for letter in found}
    assert {place.contract.tasks.jot.name} == {letter.task for letter in found}


def test_a_sound_task_with_one_bad_header_runs_when_it_is_sent_again(place: Place) -> None:
    """What marks it as refused stays behind: it was refused again."""
    place.put(headers={"qbridge_not_before": TIMES["text"]})
    dead_letters = place.contract.bridge.dead_letters
    wait_until(lambda: len(dead_letters.list(QUEUE)) == COPIES, 10, what="letters")
    path, *_ = json.loads(dead_letters.list(QUEUE)[0].body)[0]
    assert len(dead_letters.replay(queue=QUEUE)) == COPIES
    wait_until(lambda: runs(Path(path)), 10, what="one of them to run")
    place.must_be_well()
    assert [] == dead_letters.list(QUEUE)


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


@pytest.mark.parametrize("value", ["caf\udce9", "\ud83d x", "\\\udce9"])
def test_half_a_surrogate_pair_in_a_header_costs_no_claim(place: Place, value: str) -> None:
    """Python reads and writes it, Redis's reader of JSON refuses it: it was popped, and lost if the worker died."""
    path, release = place.contract.path(), place.contract.path("release")
    body = base64.b64encode(json.dumps([[str(path), str(release)], {}, {}]).encode()).decode()
    tag, headers = str(uuid.uuid4()), {"task": place.contract.tasks.hold.name, "path": value}
    place.client.lpush(QUEUE, json.dumps(place.envelope(headers=headers, delivery_tag=tag) | {"body": body}))
    wait_until(lambda: runs(path), 10, what="the task")
    assert [tag.encode()] == place.client.hkeys("qbridge.claims")
    release.touch()
    place.must_be_well()
    assert 1 == len(runs(path))


def test_tasks_without_a_delivery_tag_run(place: Place) -> None:
    """They are claimed by a name that is made for them; copies do not share it."""
    path, one = place.contract.path(), place.envelope(delivery_tag="")
    one["body"] = base64.b64encode(json.dumps([[str(path)], {}, {}]).encode()).decode()
    place.client.lpush(QUEUE, *[json.dumps(one)] * COPIES)
    place.must_be_well()
    assert COPIES == len(runs(path))


def test_a_queue_that_is_no_list_stops_no_other(place: Place) -> None:
    """The worker connected again and again, and lost what it had popped; now it says once what is wrong, and where."""
    said = place.told(f"The Redis key '{QUEUE}' is no list")
    place.client.set(QUEUE, "x")
    wait_until(lambda: place.told(f"The Redis key '{QUEUE}' is no list") > said, 10, what="the word in the log")
    for _ in range(3):
        place.must_be_well(OTHER)
    assert said + 1 == place.told(f"The Redis key '{QUEUE}' is no list")
    place.client.delete(QUEUE)
    place.must_be_well()


def calls(place: Place, command: str) -> int:
    return int(place.client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


def test_a_wake_that_is_no_stream_costs_no_connection(place: Place) -> None:
    """Workers connected again without end. One waits elsewhere meanwhile, and there again after the next sender."""
    place.client.set(f"qbridge.wake.{QUEUE}", "x")
    before = calls(place, "brpop")
    wait_until(lambda: calls(place, "brpop") > before, 10, what="the worker to wait elsewhere")
    place.must_be_well(OTHER)
    place.must_be_well()
    assert b"stream" == place.client.type(f"qbridge.wake.{QUEUE}")
    before = calls(place, "xread")
    wait_until(lambda: calls(place, "xread") > before + 5, 10, what="the worker to wait for senders again")
    place.must_be_well()


def have_all_due(client: redis.Redis) -> None:
    """Have the hour that all scheduled tasks wait for be over."""
    scheduled: dict[Any, Any] = client.hgetall("qbridge.scheduled")
    for name, entry in scheduled.items():
        *where, raw = entry.split(b"\0")
        message = json.loads(raw)
        message["headers"]["eta"] = None  # else the worker that gets it puts it off again
        client.hset("qbridge.scheduled", name, b"\0".join([*where, json.dumps(message).encode()]))
    client.zadd("qbridge.schedule", dict.fromkeys(scheduled, 1), xx=True)


@pytest.mark.parametrize("queue", [QUEUE, OTHER, "default"])
def test_what_is_due_for_a_queue_that_is_no_list_waits(place: Place, queue: str) -> None:
    """Each claim lost one, also of queues that the worker does not consume."""
    path, bridge = place.contract.path(), place.contract.another_bridge()  # which asks anew whether anybody sweeps
    wait_until(lambda: place.client.exists("qbridge.swept"), 10, what="the worker's first sweep")
    jot = place.contract.declare_on(bridge).jot.using(queue=queue, countdown=3600)
    for _ in range(3):
        jot.delay(str(path))
    assert 3 == place.client.zcard("qbridge.schedule")
    place.client.set(queue, "x")
    soon = time.time() * 1000
    have_all_due(place.client)
    wait_until(
        lambda: place.client.zcount("qbridge.schedule", soon, "+inf") == 3,
        10,
        what="all three to be put off",
        interval=0.05,
    )
    place.must_be_well(QUEUE if queue == OTHER else OTHER)
    assert 3 == place.client.hlen("qbridge.scheduled")
    place.client.delete(queue)
    wait_until(lambda: not place.client.zcard("qbridge.schedule"), 15, what="the schedule to be empty")
    if queue == "default":  # nobody consumes it
        assert 3 == place.client.llen(queue)
        place.client.delete(queue)
    else:
        wait_until(lambda: len(runs(path)) == 3, 10, what="the tasks")
    assert 0 == place.client.hlen("qbridge.scheduled")


OURS = ["qbridge.schedule", "qbridge.scheduled", "qbridge.holders", "qbridge.claims", "qbridge.swept"]


@pytest.mark.parametrize("key", OURS)
def test_a_key_of_ours_that_was_written_over_is_ours_again(place: Place, key: str) -> None:
    """An empty one is none, so anybody can."""
    place.client.delete(key)
    place.client.lpush(key, "x") if key == "qbridge.swept" else place.client.set(key, "x")
    kind = place.client.type(key)
    place.put(headers={"eta": FUTURE})
    place.must_be_well()
    wait_until(lambda: place.client.type(key) != kind, 10, what="the key to be ours again")
    assert COPIES == place.client.hlen("qbridge.scheduled")


def test_dead_letters_that_are_no_list_do_not_hide_others(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Their key is named."""
    place.client.set(f"{QUEUE}.dead", "x")
    letter = place.envelope()
    place.client.lpush(f"{OTHER}.dead", json.dumps(letter))
    try:
        assert [letter["headers"]["id"]] == [found.task_id for found in place.contract.bridge.dead_letters.list()]
    finally:
        place.client.delete(f"{OTHER}.dead")
    assert f"The Redis key '{QUEUE}.dead' is no list" in caplog.text


# -- the scripts alone

KEYS = ["holders", "claims", "unacked", "index", "again", "schedule", "scheduled", "list"]
SWEPT = ["holders", "claims", "unacked", "index", "again", "swept"]


def claim(client: redis.Redis, *more: str) -> Any:
    lists = 1 + len(more)
    args = ["holder:30000", "holder:30000/1", 30000, 10, lists, 0, *["1"] * lists]
    return scripts.CLAIM.run(client, [*KEYS, *more], args)[3]


@pytest.fixture
def bare(qbridge_redis: RedisServer) -> Iterator[redis.Redis]:
    with qbridge_redis.heal().fresh() as url, redis.Redis.from_url(url) as client:
        client.lpush("list", json.dumps({"properties": {"delivery_tag": "t"}}))
        yield client


@pytest.mark.parametrize("key", ["unacked", "index"])
def test_a_claim_that_fails_has_popped_nothing(bare: redis.Redis, key: str) -> None:
    """A key of kombu's that is of another type is found first."""
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


def test_what_can_be_given_back_is_before_the_error(bare: redis.Redis) -> None:
    """One list that is none keeps no other message."""
    bare.lpush("other", json.dumps({"properties": {"delivery_tag": "u"}}))
    assert 2 == len(claim(bare, "other"))
    bare.set("list", "x")
    args = ["RPUSH", "t", "holder:30000/1", "u", "holder:30000/1"]
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        scripts.GIVE_BACK.run(bare, ["claims", "unacked", "index", "again"], args)
    assert 1 == bare.llen("other")
    assert [b"t"] == bare.hkeys("claims") == bare.hkeys("unacked")


def test_a_list_that_is_none_stops_no_takeover(bare: redis.Redis) -> None:
    """One such claim stopped all, of all holders and queues, for ever. It is taken over once it can be."""
    bare.lpush("other", json.dumps({"properties": {"delivery_tag": "u"}}))
    assert 2 == len(claim(bare, "other"))
    bare.set("list", "x")
    bare.zadd("holders", {"holder:30000": 0})
    assert 1 == scripts.SWEEP.run(bare, SWEPT, [])
    assert 1 == bare.llen("other")
    assert [b"t"] == bare.hkeys("claims")
    bare.delete("list")
    assert 1 == scripts.SWEEP.run(bare, SWEPT, [])
    assert 1 == bare.llen("list")
    assert 0 == bare.zcard("holders")


@pytest.mark.parametrize("value", ["x", "", "nan", "inf", ["a list"]])
def test_a_time_of_the_last_sweep_that_is_none_stops_no_sweep(bare: redis.Redis, value: Any) -> None:
    """It is written over."""
    bare.set("swept", value) if isinstance(value, str) else bare.lpush("swept", *value)
    claim(bare)
    bare.zadd("holders", {"holder:30000": 0})
    assert 1 == scripts.SWEEP.run(bare, SWEPT, [])
    assert abs(time.time() * 1000 - float(bare.get("swept") or 0)) < 60_000


@pytest.mark.parametrize("value", ["x", ["a list"]])
def test_a_time_of_the_last_sweep_that_is_none_keeps_nobody_from_sending(bare: redis.Redis, value: Any) -> None:
    """Who sends with an ETA asks for it."""
    bare.set("qbridge.swept", value) if isinstance(value, str) else bare.lpush("qbridge.swept", *value)
    where = bare.connection_pool.connection_kwargs
    with Bridge(
        BridgeConfig(broker=f"redis://{where['host']}:{where['port']}/{where['db']}", results="disabled://")
    ) as bridge:

        @bridge.task(results=False)
        def work() -> None:
            """Do nothing."""

        work.using(countdown=60).delay()
    assert 1 == bare.llen("default")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("entry", [None, "garbage", "list"])
def test_an_entry_of_the_schedule_fails_no_claim(bare: redis.Redis, entry: str | None, full: bool) -> None:
    """What is no entry is dropped; what is one goes to its list, by a server that is full as well."""
    bare.zadd("schedule", {"n": 1})
    message = json.dumps({"properties": {"delivery_tag": "u"}})
    if entry is not None:
        bare.hset("scheduled", "n", entry if entry == "garbage" else f"list\0qbridge.wake.list\0{message}")
    if full:
        bare.config_set("maxmemory", 1)
    try:
        found = claim(bare)
    finally:
        bare.config_set("maxmemory", 0)
    assert ([b"t", b"u"] if entry == "list" else [b"t"]) == [tag for _, _, tag, _ in found]
    assert 0 == bare.zcard("schedule") == bare.hlen("scheduled")


def test_what_is_due_has_no_key_of_others_deleted(bare: redis.Redis) -> None:
    """An entry names the stream to write to, and anybody may have written the entry."""
    bare.set("precious", "x")
    bare.zadd("schedule", {"n": 1})
    bare.hset("scheduled", "n", "list\0precious\0{}")
    claim(bare)
    assert b"x" == bare.get("precious")


def test_what_was_popped_before_a_list_that_is_none_is_the_claims(bare: redis.Redis) -> None:
    """It was claimed by an owner that never got it."""
    bare.set("other", "x")
    args = ["holder:30000", "holder:30000/1", 30000, 10, 2, 0, "1", "1"]
    _, _, _, items, wrong = scripts.CLAIM.run(bare, [*KEYS, "other"], args)
    assert ([b"t"], [b"other"]) == ([tag for _, _, tag, _ in items], wrong)


UNNAMED = {
    "no tag": {"properties": {"delivery_tag": ""}},
    "half a pair as its tag": {"properties": {"delivery_tag": "\udce9"}},
    "a number as its tag": {"properties": {"delivery_tag": 5}},
    "nothing": None,
}


@pytest.mark.parametrize("name", UNNAMED)
def test_what_redis_can_read_no_tag_in_is_claimed(bare: redis.Redis, name: str) -> None:
    """Two copies at once, each by a name of its own; what was not settled is taken over as it was."""
    raw = json.dumps(UNNAMED[name]).encode()
    bare.delete("list")
    bare.lpush("list", raw, raw)
    found = claim(bare)
    tags = {tag for _, _, tag, _ in found if tag}
    assert tags == set(bare.hkeys("claims")) == set(bare.hkeys("unacked"))
    assert 2 == len(tags)
    bare.zadd("holders", {"holder:30000": 1})
    bare.set("swept", int(time.time() * 1000))
    assert len(tags) == scripts.SWEEP.run(bare, SWEPT, [])
    assert [raw] * len(tags) == bare.lrange("list", 0, -1)
    assert b"1 1" in {before for _, _, _, before in claim(bare)}  # counted, under the same name


@pytest.mark.parametrize("spoil", ["another type", "the last possible entry"])
def test_a_wake_that_takes_no_entry_keeps_nobody_from_sending(bare: redis.Redis, spoil: str) -> None:
    """It is ours alone, and is made anew."""
    if spoil == "another type":
        bare.set("wake", "x")
    else:
        bare.xadd("wake", {"w": "1"}, id=f"{2**64 - 1}-{2**64 - 1}")
    scripts.PUT.run(bare, ["list", "wake"], ["message"])
    assert 2 == bare.llen("list")
    assert 1 == bare.xlen("wake")


def test_purging_removes_what_is_no_list(bare: redis.Redis) -> None:
    """It is in the way of the queue."""
    bare.set("other", "x")
    assert 1 == scripts.PURGE.run(bare, ["schedule", "scheduled", "list", "other"], [])
    assert 0 == bare.exists("list", "other")
