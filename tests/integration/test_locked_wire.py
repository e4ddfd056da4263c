"""With keys: what no holder of them has sent is not run, not believed and not obeyed; all else goes on as ever."""

# long because: it is one place, with keys, and everything that an attacker may do there.

from __future__ import annotations

import bz2
import itertools
import json
import lzma
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import chord
from kombu.entity import Exchange, Queue
from sqlalchemy import text

from qbridge import Bridge, BridgeConfig, PayloadError, Retry, TaskContext, UnsupportedFeature, WorkerConfig
from qbridge.dead_letters.letter import HEADER_DEAD_LETTER
from qbridge.serialization.keys import new_key
from qbridge.serialization.locked_messages import HEADER_SIGNATURE
from qbridge.testing.waiting import wait_until

BROKERS = ["rabbitmq", "redis", "embedded"]
PAIRS = [("rabbitmq", "rpc"), ("redis", "redis"), ("embedded", "sqlite"), ("redis", "postgresql")]
SIGN, HIDE = new_key("sign"), new_key("hide")
LOCKED = {"signing_keys": [SIGN], "encryption_keys": [HIDE]}
SECRET = "only the two of us know"


class Place:
    """One broker and one result backend, and bridges on them with different keys."""

    def __init__(self, broker: str, results: str) -> None:
        self.broker, self.results = broker, results
        self._stack = ExitStack()
        self.ran: list[str] = []

    def bridge(self, serialization: dict[str, Any] = LOCKED) -> Bridge:
        """A bridge with the tasks of these tests."""
        config = BridgeConfig(
            broker=self.broker,
            results=self.results,
            serialization=serialization,
            worker=WorkerConfig(unknown_task_grace=0),
        )
        bridge = self._stack.enter_context(Bridge(config))
        ran = self.ran

        @bridge.task(name="echo")
        def echo(word: str) -> str:
            ran.append(word)
            return word

        @bridge.task(name="fail")
        def fail(word: str) -> None:
            raise LookupError(word)

        @bridge.task(
            name="again", retry=Retry(on=ConnectionError, attempts=3, wait_initial=0.05, wait_jitter=0), context=True
        )
        def again(ctx: TaskContext, word: str) -> list[Any]:
            if ctx.attempt < 3:
                raise ConnectionError(word)
            return [ctx.attempt, ctx.headers]

        @bridge.celery.task(name="plain", shared=False)
        def plain(value: Any) -> Any:
            return [value]

        return bridge

    def close(self) -> None:
        """Close all of them."""
        self._stack.close()


def place_on(request: pytest.FixtureRequest, tmp_path: Path, broker: str, results: str) -> Iterator[Place]:
    """A place that nobody has used."""
    with ExitStack() as stack:

        def url(name: str) -> str:
            if name in ("embedded", "sqlite", "rpc"):
                return {
                    "embedded": f"embedded://{tmp_path}/b.db",
                    "sqlite": f"sqlite:///{tmp_path}/r.db",
                    "rpc": "rpc://",
                }[name]
            server = request.getfixturevalue(f"qbridge_{name}")
            return str(stack.enter_context(server.heal().fresh()))

        at = url(broker)
        place = Place(at, f"{at.rpartition('/')[0]}/9" if broker == results == "redis" else url(results))
        yield place
        place.close()


@pytest.fixture(params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Every broker and every result backend, once."""
    yield from place_on(request, tmp_path, *request.param)


@pytest.fixture(params=BROKERS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Every broker."""
    yield from place_on(request, tmp_path, request.param, "sqlite")


@pytest.fixture
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Without a server."""
    yield from place_on(request, tmp_path, "embedded", "sqlite")


def take(bridge: Bridge, name: str, count: int) -> list[Any]:
    """Take messages off a queue as they are, oldest first."""
    rabbitmq = bridge.config.broker.kind == "rabbitmq"
    kind = "classic" if name.endswith(".dead") else "quorum"
    taken: list[Any] = []
    queue = Queue(name, Exchange(""), name, queue_arguments={"x-queue-type": kind} if rabbitmq else None)
    with bridge.celery.connection_for_read() as connection:
        channel: Any = connection.default_channel
        queue(channel).declare()

        def enough() -> bool:
            while (message := channel.basic_get(name, no_ack=True)) is not None:
                taken.append(channel.message_to_python(message))
            return len(taken) >= count

        wait_until(enough, 20, what=f"the messages of {name}")
    return taken


def raw(message: Any) -> bytes:
    """The body as it is on the wire."""
    body = message.body if message.compressed_body is None else message.compressed_body
    return body.encode() if isinstance(body, str) else bytes(body)


def kept(backend: Any, task_id: str) -> str:
    """Everything that a result backend has of one task."""
    if hasattr(backend, "result_inbox"):
        return str(backend._replies.inbox.find(task_id).body)
    if hasattr(backend, "engine"):
        with backend.engine.connect() as connection:
            return str(
                connection.execute(text("SELECT * FROM celery_taskmeta WHERE task_id = :id"), {"id": task_id}).all()
            )
    return str(backend.client.get(backend.get_key_for_task(task_id)))


def put(bridge: Bridge, message: Any, **headers: Any) -> None:
    """Publish as somebody does who may write to the broker, and has no key."""
    queue = bridge.celery.amqp.queues["default"]
    with bridge.celery.producer_or_acquire() as producer:
        limit, producer.max_payload_bytes, producer.signing = producer.max_payload_bytes, None, False
        try:
            producer.publish(
                raw(message),
                exchange=queue.exchange, routing_key="default", declare=[queue],
                headers={name: value for name, value in {**message.headers, **headers}.items() if value != "gone"},
                content_type=message.content_type, content_encoding=message.content_encoding,
                correlation_id=message.properties.get("correlation_id"), reply_to=message.properties.get("reply_to"),
                confirm_timeout=5,
            )  # fmt: skip
        finally:
            producer.max_payload_bytes, producer.signing = limit, True


def test_everything_works_as_without_keys(pair: Place) -> None:
    """Values, failures, retries over the broker, delays, bulk, headers, plain tasks, compression, chains, commands."""
    bridge = pair.bridge()
    tasks, app = bridge.tasks, bridge.celery
    with bridge.worker():
        assert tasks["echo"].delay(SECRET).get(timeout=20) == SECRET
        failed = tasks["fail"].delay("why")
        with pytest.raises(LookupError, match="why"):
            failed.get(timeout=20)
        assert "LookupError: why" in str(failed.traceback)
        again = tasks["again"].using(headers={"tenant": {"id": 7}}).delay("x")
        assert again.get(timeout=30) == [3, {"tenant": {"id": 7}}]
        assert [each.get(timeout=20) for each in tasks["echo"].send_many([("a",), ("b",)])] == ["a", "b"]
        assert tasks["echo"].using(countdown=0.5).delay("later").get(timeout=20) == "later"
        assert app.tasks["plain"].apply_async(({"__type__": 1},), compression="gzip").get(timeout=20) == [
            {"__type__": 1}
        ]
        chain = app.tasks["plain"].s(1) | app.tasks["plain"].s()
        assert chain.apply_async().get(timeout=20) == [[1]]
        assert app.control.ping(timeout=5, limit=1)


def test_what_only_the_broker_and_the_results_see(pair: Place) -> None:
    """With encryption_keys neither arguments nor results, nor the text of a failure."""
    bridge = pair.bridge()
    sent = bridge.tasks["echo"].delay(SECRET)
    (message,) = take(bridge, "default", 1)
    assert SECRET not in f"{message.body!r}{message.headers}{message.properties}"
    put(bridge, message)
    with bridge.worker():
        assert sent.get(timeout=20) == SECRET
        failed = bridge.tasks["fail"].delay(SECRET)
        with pytest.raises(LookupError, match=SECRET):
            failed.get(timeout=20)
    for task_id in (sent.id, failed.id):
        assert task_id in kept(bridge.celery.backend, task_id)
        assert SECRET not in kept(bridge.celery.backend, task_id)


def test_what_no_holder_of_the_keys_has_sent_is_not_run(place: Place) -> None:
    """Unsigned, changed, under another name or id, of another key: dead letters, as they came; the rest goes on."""
    bridge, stranger = place.bridge({"signing_keys": [SIGN]}), place.bridge({"signing_keys": [new_key("sign")]})
    unsigned = place.bridge({})
    bridge.tasks["echo"].using(expires=600).delay("good")
    stranger.tasks["echo"].delay("of another key")
    unsigned.tasks["echo"].delay("unsigned")
    good, foreign, plain = take(bridge, "default", 3)
    bad = [
        (plain, {}, "unsigned"),
        (foreign, {}, "bad_signature"),
        (good, {HEADER_SIGNATURE: "gone"}, "unsigned"),
        (good, {"task": "plain"}, "bad_signature"),
        (good, {"id": "another"}, "bad_signature"),
        (good, {"expires": None}, "bad_signature"),
        (good, {"retries": 1}, "bad_signature"),
        (good, {"mine": "added"}, "bad_signature"),
    ]
    for message, headers, _ in bad:
        put(bridge, message, **headers)
    put(bridge, good)
    with bridge.worker(pool="solo"):
        wait_until(lambda: place.ran, 20, what="the good one")
        assert bridge.tasks["echo"].delay("after").get(timeout=20) == "after"
    assert place.ran == ["good", "after"]
    dead = take(bridge, "default.dead", len(bad))
    assert [json.loads(each.headers[HEADER_DEAD_LETTER])["reason"] for each in dead] == [reason for _, _, reason in bad]
    assert [raw(each) for each in dead] == [raw(message) for message, _, _ in bad]
    assert dead[1].headers[HEADER_SIGNATURE] == foreign.headers[HEADER_SIGNATURE]


def test_a_dead_letter_of_an_encrypted_message_is_encrypted(place: Place) -> None:
    """It was opened, and its task is not known here."""
    bridge = place.bridge()
    bridge.send("nobody.knows", (SECRET,))
    (sent,) = take(bridge, "default", 1)
    put(bridge, sent)
    with bridge.worker(pool="solo"):
        assert bridge.tasks["echo"].delay("after").get(timeout=20) == "after"
    (dead,) = take(bridge, "default.dead", 1)
    assert raw(dead) == raw(sent)
    assert dead.headers[HEADER_SIGNATURE] == sent.headers[HEADER_SIGNATURE]


def test_a_dead_letter_is_sent_again_if_a_holder_of_the_keys_has_sent_it(place: Place) -> None:
    """Its headers change, so it is signed anew; but a stranger's gets no signature by way of the dead letters."""
    bridge = place.bridge()
    bridge.send("not.yet", (SECRET,))
    place.bridge({}).tasks["echo"].delay("unsigned")
    with bridge.worker(pool="solo"):
        wait_until(lambda: len(bridge.dead_letters.list()) == 2, 20, what="the dead letters")
    letters = {letter.reason: letter for letter in bridge.dead_letters.list()}
    assert set(letters) == {"unknown_task", "unsigned"}
    with pytest.raises(PayloadError, match="cannot be sent again"):
        bridge.dead_letters.replay(letters["unsigned"].id)
    assert [letter.task for letter in bridge.dead_letters.replay(queue="default")] == ["not.yet"]
    done: list[str] = []

    @bridge.task(name="not.yet")
    def now(word: str) -> None:
        done.append(word)

    with bridge.worker(pool="solo"):
        wait_until(done.copy, 20, what="the replayed task")
    assert done == [SECRET]
    assert [letter.reason for letter in bridge.dead_letters.list()] == ["unsigned"]


def test_a_delayed_task_is_signed_again_where_a_worker_gives_it_back(place: Place) -> None:
    """Its headers change on the way; RabbitMQ delivers at once what does not come through its delays."""
    bridge = place.bridge()
    app: Any = bridge.celery
    eta = (datetime.now(UTC) + timedelta(seconds=4)).isoformat()
    message = app.amqp.as_task_v2("1", "echo", ("later",), {}, eta=eta)
    queue = app.amqp.queues["default"]
    with app.producer_or_acquire() as producer:
        producer.publish(
            message.body, headers=message.headers, serializer="json", exchange=queue.exchange, routing_key="default",
            declare=[queue], confirm_timeout=5, **message.properties,
        )  # fmt: skip
    began = time.monotonic()
    with bridge.worker(pool="solo"):
        wait_until(lambda: place.ran, 20, what="the delayed task")
    assert place.ran == ["later"]
    assert time.monotonic() - began > 2.5


def test_a_forged_result_is_an_error_at_the_caller(pair: Place) -> None:
    """Made up, or that of another task; the true one is read where it can be told apart."""
    bridge, stranger = pair.bridge(), pair.bridge({})
    sent = bridge.tasks["echo"].delay("true")
    forger: Any = stranger.celery.backend
    request = type(
        "Request", (), {"id": sent.id, "reply_to": bridge.celery.thread_oid, "correlation_id": sent.id, "children": []}
    )
    forger.store_result(sent.id, "forged", "SUCCESS", request=request())
    with pytest.raises(PayloadError, match=r"not signed|signature"):
        sent.get(timeout=20)


def test_the_result_of_another_task_is_an_error_at_the_caller(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Copied on Redis from its key to another one, with its own id in it or with the other."""
    for place in place_on(request, tmp_path, "redis", "redis"):
        bridge = place.bridge({"signing_keys": [SIGN]})
        backend: Any = bridge.celery.backend
        with bridge.worker():
            first = bridge.tasks["echo"].delay("first")
            assert first.get(timeout=20) == "first"
            payload = backend.client.get(backend.get_key_for_task(first.id))
            for task_id, copied in (("a", payload), ("b", payload.replace(first.id.encode(), b"b"))):
                backend.client.set(backend.get_key_for_task(task_id), copied)
                with pytest.raises(PayloadError, match=r"another task|does not fit"):
                    bridge.result(task_id).get(timeout=5)
                with pytest.raises(PayloadError):
                    bridge.celery.AsyncResult(task_id).get(timeout=5)


def test_a_forged_success_does_not_keep_the_true_result_away(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Celery stores nothing over a success, whoever has stored that."""
    for place in place_on(request, tmp_path, "redis", "redis"):
        bridge, stranger = place.bridge(), place.bridge({})
        sent = bridge.tasks["echo"].delay("true")
        stranger.celery.backend.store_result(sent.id, "forged", "SUCCESS")
        with bridge.worker():
            wait_until(place.ran.copy, 20, what="the task")
        assert sent.get(timeout=20) == "true"


def test_commands_of_strangers_are_not_obeyed(place: Place) -> None:
    """Shutdown, revoke, more processes: remote control is code that the worker runs for whoever may write."""
    bridge, stranger = place.bridge(), place.bridge({})
    with bridge.worker() as worker:
        stranger.celery.control.broadcast("shutdown")
        theirs, ours = str(uuid.uuid4()), str(uuid.uuid4())  # what is revoked stays so for every worker of the process
        stranger.celery.control.revoke(theirs)
        assert not stranger.celery.control.ping(timeout=0.5)
        assert bridge.celery.control.ping(timeout=5, limit=1)  # on the same mailbox, behind them
        bridge.celery.control.revoke(ours)
        wait_until(lambda: ours in worker.state.revoked, 10, what="the revoke")
        assert theirs not in worker.state.revoked
        assert bridge.tasks["echo"].delay("after").get(timeout=20) == "after"


def test_an_old_command_is_not_obeyed(file: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may read the broker may keep a signed shutdown for another day."""
    bridge = file.bridge()
    with bridge.worker() as worker:
        monkeypatch.setattr("qbridge.serialization.lock.time", SimpleNamespace(time=lambda: time.time() - 400))
        old, new = str(uuid.uuid4()), str(uuid.uuid4())
        bridge.celery.control.revoke(old)
        monkeypatch.undo()
        bridge.celery.control.revoke(new)
        wait_until(lambda: new in worker.state.revoked, 10, what="the revoke")
        assert old not in worker.state.revoked


def test_keys_are_rolled_out_and_rotated_without_a_loss(file: Place) -> None:
    """Old and new side by side in each step: no keys, keys that are not demanded, demanded, two keys, the new one."""
    old, new = new_key("old"), new_key("new")
    steps: list[dict[str, Any]] = [
        {},
        {"signing_keys": [old], "require_signatures": False},
        {"signing_keys": [old]},
        {"signing_keys": [old, new]},
        {"signing_keys": [new, old]},
        {"signing_keys": [new]},
    ]
    bridges = [file.bridge(step) for step in steps]
    for before, after in itertools.pairwise(bridges):
        for worker_of in (before, after):
            with worker_of.worker():
                for sender in (before, after):
                    assert sender.tasks["echo"].delay("x").get(timeout=20) == "x"
    with bridges[-1].celery.connection_for_read() as connection:
        queue = Queue("default.dead", Exchange(""), "default.dead")(connection.default_channel)
        queue.declare()
        assert queue.get() is None


def test_chords_are_refused(file: Place) -> None:
    """Celery keeps the parts of a chord where nothing is signed."""
    bridge = file.bridge()
    plain = bridge.celery.tasks["plain"]
    with pytest.raises(UnsupportedFeature, match="chords"):
        chord([plain.s(1), plain.s(2)], plain.s()).apply_async()


def test_a_small_message_that_claims_a_gigabyte_costs_nothing(place: Place) -> None:
    """Compressed zeros, nested lists, many headers, and what is simply large: dead letters, and the worker goes on."""
    bridge = place.bridge({"max_payload_bytes": 100_000})
    bridge.tasks["echo"].delay("good")
    (good,) = take(bridge, "default", 1)
    zeros = b"\0" * 20_000_000
    big = [(zlib.compress(zeros), "gzip"), (bz2.compress(zeros), "bzip2"), (lzma.compress(zeros), "lzma")]
    for body, compression in big:
        good.body = body
        put(bridge, good, compression=compression)
    for body in (b'[["' + b"x" * 100_000 + b'"], {}, {}]', b"[" * 5_000 + b"]" * 5_000):
        good.body = body
        put(bridge, good)
    put(bridge, good, **{f"h{number}": 1 for number in range(300)})
    with bridge.worker(pool="solo"):
        assert bridge.tasks["echo"].delay("after").get(timeout=20) == "after"
    dead = take(bridge, "default.dead", 6)
    assert [json.loads(each.headers[HEADER_DEAD_LETTER])["reason"] for each in dead] == ["too_large"] * 6
    assert place.ran == ["after"]
