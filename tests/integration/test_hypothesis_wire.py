"""Does whatever hypothesis thinks of cross the wire unchanged, and can no message kill a worker?"""

# long because: generated values and generated garbage share the workers that they go through.

from __future__ import annotations

import base64
import json
import pickle
import string
import uuid
from collections.abc import Iterator
from datetime import timedelta, timezone
from pathlib import Path
from typing import Any

import kombu
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qbridge.testing.contract_app.values import (
    ANNOTATIONS,
    Cat,
    Colour,
    Dog,
    Kind,
    Order,
    Point,
    Size,
    Span,
    Ticket,
    Tree,
    same,
)
from qbridge.testing.contracts.kit import Contract

# Each example is a batch of values or messages, so few of them are many.
quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# -- values

# pydantic writes offsets in whole minutes.
whole_minutes = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
zones = st.none() | whole_minutes
datetimes = st.datetimes(timezones=zones)
decimals = st.decimals(allow_nan=False, allow_infinity=False)
timedeltas = st.timedeltas()
spans = st.builds(Span, datetimes, timedeltas, st.frozensets(st.text()))
tickets = st.builds(Ticket, id=st.uuids(), price=decimals, seal=st.binary(), holder=st.none() | st.text())
floats = st.floats()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)

STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    "none": st.none(),
    "bool": st.booleans(),
    "int": st.integers(),
    "float": floats,
    "str": st.text(),
    "bytes": st.binary(),
    "decimal": decimals,
    "uuid": st.uuids(),
    "datetime": datetimes,
    "date": st.dates(),
    "time": st.times(timezones=zones),
    "timedelta": timedeltas,
    "enum": st.sampled_from(Colour),
    "int_enum": st.sampled_from(Size),
    "str_enum": st.sampled_from(Kind),
    "literal": st.sampled_from(["on", "off", 3]),
    "optional": st.none() | st.integers(),
    "union": st.integers() | st.text(),
    "list": st.lists(st.integers()),
    "set": st.sets(st.integers()),
    "frozenset": st.frozensets(st.uuids()),
    "tuple": st.tuples(st.integers(), st.text(), st.none()),
    "long_tuple": st.lists(st.integers()).map(tuple),
    "dict": st.dictionaries(st.text(), st.lists(floats, max_size=3)),
    "dict_int_keys": st.dictionaries(st.integers(), st.text()),
    "dict_uuid_keys": st.dictionaries(st.uuids(), st.dates()),
    "dict_enum_keys": st.dictionaries(st.sampled_from(Kind), st.integers()),
    "any": json_values,
    "model": tickets,
    "list_of_models": st.lists(tickets, max_size=4),
    "dict_of_models": st.dictionaries(st.text(), tickets, max_size=4),
    "nested_models": st.builds(
        Order,
        number=st.integers(),
        tickets=st.lists(tickets, max_size=3),
        colour=st.sampled_from(Colour),
        spans=st.dictionaries(st.text(), spans, max_size=3),
    ),
    "union_of_models": st.builds(Cat, lives=st.integers()) | st.builds(Dog, barks=st.booleans()),
    "optional_model": st.none() | tickets,
    "dataclass": spans,
    "list_of_dataclasses": st.lists(spans, max_size=4),
    "recursive_dataclass": st.recursive(
        st.builds(Tree, st.text()), lambda inner: st.builds(Tree, st.text(), st.lists(inner, max_size=3)), max_leaves=6
    ),
    "typed_dict": st.fixed_dictionaries(
        {"name": st.text(), "at": st.tuples(floats, floats)}, optional={"note": st.text()}
    ),
    "named_tuple": st.builds(Point, floats, floats, st.text()),
    "annotated": st.integers(min_value=1),
    "annotated_list": st.lists(st.text(min_size=1, max_size=3), max_size=2),
}


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    """A worker process on the embedded broker."""
    folder = tmp_path_factory.mktemp("echo")
    contract = Contract(f"embedded://{folder / 'bridge.db'}", f"sqlite:///{folder / 'results.db'}", folder)
    yield contract
    contract.close()


def test_every_supported_annotation_has_a_strategy() -> None:
    """None is left out."""
    assert set(ANNOTATIONS) == set(STRATEGIES)


@pytest.mark.parametrize("annotation", STRATEGIES)
def test_generated_values_come_back_unchanged(echo: Contract, annotation: str) -> None:
    """A worker process gets and returns what was sent, of the same type."""
    task = getattr(echo.tasks, f"echo_{annotation}")
    assert echo.worker.name

    @quick
    @given(st.lists(STRATEGIES[annotation], min_size=1, max_size=25))
    def comes_back(values: list[Any]) -> None:
        for value, result in zip(values, task.send_many([(value,) for value in values]), strict=True):
            got = result.get(timeout=30)
            assert same(value, got), f"{value!r} came back as {got!r}"

    comes_back()


# -- messages

EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
ADD = "qbridge.testing.contract_app.tasks.add"


def body(args: Any = (1, 2), kwargs: Any = None, **embed: Any) -> bytes:
    return json.dumps([args, {} if kwargs is None else kwargs, {**EMBED, **embed}]).encode()


def headers(**changes: Any) -> dict[str, Any]:
    found = {"lang": "py", "task": ADD, "id": str(uuid.uuid4()), "root_id": "r", "argsrepr": "", "kwargsrepr": ""}
    return {name: value for name, value in {**found, **changes}.items() if value is not Ellipsis}


def typed(content_type: str | None, content_encoding: str | None) -> dict[str, Any]:
    return {"content_type": content_type, "content_encoding": content_encoding}


JSON = typed("application/json", "utf-8")

Message = tuple[bytes, dict[str, Any], dict[str, Any]]
"""Body, headers, properties."""

BAD: dict[str, Message] = {
    "a task without an id": (body(), headers(id=...), JSON),
    "an unknown task without an id": (body(), headers(id=..., task="no.such"), JSON),
    "a body that is an object": (b'{"a": 1}', headers(), JSON),
    "a body that is a number": (b"5", headers(), JSON),
    "an unknown task": (body(), headers(task="no.such"), JSON),
    "no headers": (body(), {}, JSON),
    "protocol 1": (json.dumps({"task": ADD, "id": "p1", "args": [1], "kwargs": {}}).encode(), {}, JSON),
    "protocol 1 without an id": (json.dumps({"task": ADD}).encode(), {}, JSON),
    "an empty body": (b"", headers(), JSON),
    "no JSON": (b'{"a": ', headers(), JSON),
    "bytes that are no text": (b"\xff\xfe\x00", headers(), JSON),
    "JSON that is too deep": (b"[" * 100_000 + b"]" * 100_000, headers(), JSON),
    "a pickle": (pickle.dumps([(1,), {}, EMBED]), headers(), typed("application/x-python-serialize", "binary")),
    "YAML": (b"- 1\n- 2\n", headers(), typed("application/x-yaml", "utf-8")),
    "an unknown content type": (body(), headers(), typed("application/x-nobody", "utf-8")),
    "no content type": (body(), headers(), typed(None, None)),
    "an unknown encoding": (body(), headers(), typed("application/json", "x-nobody")),
    "an unknown compression": (body(), headers(compression="application/x-nobody"), JSON),
    "compressed garbage": (body(), headers(compression="application/x-gzip"), JSON),
    "a body of two parts": (b"[[1, 2], {}]", headers(), JSON),
    "arguments that are a number": (b"[1, {}, {}]", headers(), JSON),
    "named arguments that are a list": (b"[[1], [], {}]", headers(), JSON),
    "a third part that is a number": (b"[[1], {}, 1]", headers(), JSON),
    "an id that is a number": (body(), headers(id=5), JSON),
    "an id that is a mapping": (body(), headers(id={"a": 1}), JSON),
    "an id that is null": (body(), headers(id=None), JSON),
    "an id that is very long": (body(), headers(id="x" * 3000), JSON),
    "a task that is a number": (body(), headers(task=7), JSON),
    "a task that is a list": (body(), headers(task=["a"]), JSON),
    "an eta that is no time": (body(), headers(eta="tomorrow"), JSON),
    "an eta that is a number": (body(), headers(eta=5), JSON),
    "an expiry that is no time": (body(), headers(expires="never"), JSON),
    "an expiry that is a number": (body(), headers(expires=10**12), JSON),
    "an expiry that is a list": (body(), headers(expires=[1]), JSON),
    "retries that are text": (body(), headers(retries="many"), JSON),
    "retries that are negative": (body(), headers(retries=-5), JSON),
    "limits that are a number": (body(), headers(timelimit=5), JSON),
    "limits that are text": (body(), headers(timelimit=["a", "b"]), JSON),
    "limits that are negative": (body(), headers(timelimit=[-1, -1]), JSON),
    "a group that is a mapping": (body(), headers(group={"a": 1}), JSON),
    "stamps that are a number": (body(), headers(stamped_headers=5, stamps=6), JSON),
    "stamps that name nothing": (body(), headers(stamped_headers=["a"], stamps={}), JSON),
    "callbacks that are numbers": (body(callbacks=[5]), headers(), JSON),
    "errbacks that are numbers": (body(args=["x"], errbacks=[5]), headers(), JSON),
    "a chain of numbers": (body(chain=[5]), headers(), JSON),
    "a chain of nothing": (body(chain=[{"no": 1}]), headers(), JSON),
    "a chord that is a number": (body(chord=7), headers(group="g"), JSON),
    "a reply address that nobody has": (body(), headers(), {**JSON, "reply_to": "nobody", "correlation_id": "c"}),
    "huge headers": (body(), headers(**{f"h{number}": "x" * 500 for number in range(150)}), JSON),
    "a header of every kind": (body(), headers(a=[1, {"b": None}], c=True, d=1.5, e={"f": {"g": []}}), JSON),
    "our own headers": (body(), headers(qbridge_first_attempt="never", qbridge_x=[1]), JSON),
    "arguments that do not fit": (body(["x"]), headers(), JSON),
    "too many arguments": (body(list(range(50))), headers(), JSON),
    "a priority and an expiration": (body(), headers(), {**JSON, "priority": 9, "expiration": 0.001}),
}  # fmt: skip

#: What only Redis can carry: whatever somebody pushed on the list.
ENVELOPE = {
    "body": base64.b64encode(body()).decode(),
    "headers": headers(),
    "content-type": "application/json",
    "content-encoding": "utf-8",
    "properties": {
        "body_encoding": "base64",
        "delivery_tag": "t",
        "delivery_info": {"exchange": "", "routing_key": "default"},
    },
}
RAW = {
    "garbage": b"\xff\xfe garbage",
    "text": b"garbage",
    "nothing": b"",
    "a number": b"5",
    "null": b"null",
    "a list": b"[1, 2]",
    "text in JSON": b'"x"',
    "an empty object": b"{}",
    "too deep": b"[" * 100_000,
    "no properties": json.dumps({**ENVELOPE, "properties": ...}, default=lambda _: None).encode(),
    "properties that are a list": json.dumps({**ENVELOPE, "properties": []}).encode(),
    "no delivery tag": json.dumps({**ENVELOPE, "properties": {"body_encoding": "base64"}}).encode(),
    "a delivery tag that is a list": json.dumps(
        {**ENVELOPE, "properties": {**ENVELOPE["properties"], "delivery_tag": [1]}}
    ).encode(),
    "no base64": json.dumps({**ENVELOPE, "body": "%%%"}).encode(),
    "an unknown body encoding": json.dumps(
        {**ENVELOPE, "properties": {**ENVELOPE["properties"], "body_encoding": "x"}}
    ).encode(),
    "a body that is an object": json.dumps({**ENVELOPE, "body": {"a": 1}}).encode(),
    "headers that are a list": json.dumps({**ENVELOPE, "headers": [1]}).encode(),
    "headers that are null": json.dumps({**ENVELOPE, "headers": None}).encode(),
    "no body": json.dumps({name: value for name, value in ENVELOPE.items() if name != "body"}).encode(),
    "delivery info that is a number": json.dumps(
        {**ENVELOPE, "properties": {**ENVELOPE["properties"], "delivery_info": 5}}
    ).encode(),
}


class Target:
    """A worker of one pool on one broker, and a plain connection that puts messages before it."""

    def __init__(self, contract: Contract, pid: int, log: Path) -> None:
        self.contract = contract
        self.pid = pid
        self.log = log
        contract.tasks.add.delay(1).get(timeout=30)
        self._queue = contract.bridge.celery.amqp.queues["default"]

    def put(self, messages: list[Message]) -> None:
        with self.contract.bridge.celery.connection_for_write() as connection:
            bound = self._queue.bind(connection.default_channel)
            producer = kombu.Producer(connection)
            for payload, head, properties in messages:
                producer.publish(
                    payload,
                    exchange=bound.exchange,
                    routing_key=bound.routing_key,
                    headers=head,
                    **{"content_type": None, "content_encoding": None, **properties},
                )

    def must_be_well(self, process: Any) -> None:
        good = self.contract.tasks.add.delay(20, 22)
        try:
            assert good.get(timeout=20) == 42
        except BaseException:
            print(process.process.tail(60))
            raise
        assert process.process.exit_code() is None
        assert process.pid == self.pid


@pytest.fixture(scope="module", params=["rabbitmq", "redis", "embedded"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    folder = tmp_path_factory.mktemp("messages")
    results = f"sqlite:///{folder / 'results.db'}"
    if request.param == "embedded":
        contract = Contract(f"embedded://{folder / 'bridge.db'}", results, folder)
        yield contract
        contract.close()
        return
    with request.getfixturevalue(f"qbridge_{request.param}").heal().fresh() as url:
        contract = Contract(url, results, folder)
        yield contract
        contract.close()


@pytest.fixture(scope="module", params=["process", "solo", "thread"])
def target(request: pytest.FixtureRequest, place: Contract) -> Iterator[tuple[Target, Any]]:
    with place.worker_of("default", pool=request.param) as process:
        yield Target(place, process.pid, process.log), process


def test_a_message_of_protocol_one_is_run(target: tuple[Target, Any]) -> None:
    """Celery's older protocol has everything in the body; such a task runs like any other."""
    found, _ = target
    task_id = str(uuid.uuid4())
    old = json.dumps({"task": ADD, "id": task_id, "args": [20], "kwargs": {"b": 3}, "retries": 0, "eta": None})
    found.put([(old.encode(), {}, JSON)])
    tasks = found.contract.tasks
    assert found.contract.bridge.result(task_id, tasks.add).get(timeout=20) == 23


@pytest.mark.parametrize("name", BAD)
def test_a_bad_message_does_not_kill_the_worker(target: tuple[Target, Any], name: str) -> None:
    """After each a good task runs, in the same process."""
    found, process = target
    found.put([BAD[name]])
    found.must_be_well(process)


# RabbitMQ closes the connection of a sender whose headers hold an infinity.
finite = st.floats(allow_nan=False, allow_infinity=False)
header_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | finite | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KNOWN = [
    "task", "id", "lang", "root_id", "parent_id", "group", "group_index", "retries", "timelimit", "eta", "expires",
    "shadow", "argsrepr", "kwargsrepr", "origin", "ignore_result", "stamped_headers", "stamps", "compression",
    "replaced_task_nesting",
]  # fmt: skip
some_headers = st.dictionaries(st.sampled_from(KNOWN) | st.text(string.ascii_letters, min_size=1), header_values)
bodies = st.binary(max_size=200) | header_values.map(lambda value: json.dumps(value).encode()) | st.just(body())
types = st.sampled_from(
    ["application/json", "application/x-python-serialize", "text/plain", "application/data", "", "x"]
)
encodings = st.sampled_from(["utf-8", "binary", "latin-1", "x-nobody", "base64"])
messages = st.tuples(
    bodies,
    some_headers.map(lambda some: {**headers(), **some}) | some_headers,
    st.fixed_dictionaries({"content_type": types, "content_encoding": encodings}),
)


def test_no_generated_message_kills_the_worker(target: tuple[Target, Any]) -> None:
    """Arbitrary bytes, headers and content types: after each batch a good task runs, in the same process."""
    found, process = target

    @quick
    @given(st.lists(messages, min_size=1, max_size=15))
    def survives(batch: list[Message]) -> None:
        found.put(batch)
        found.must_be_well(process)

    survives()


@pytest.fixture(scope="module")
def redis_place(qbridge_redis: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    folder = tmp_path_factory.mktemp("raw")
    with qbridge_redis.heal().fresh() as url:
        contract = Contract(url, f"sqlite:///{folder / 'results.db'}", folder)
        yield contract
        contract.close()


@pytest.fixture(scope="module", params=["process", "solo"])
def redis_target(request: pytest.FixtureRequest, redis_place: Contract) -> Iterator[tuple[Target, Any]]:
    with redis_place.worker_of("default", pool=request.param) as process:
        yield Target(redis_place, process.pid, process.log), process


@pytest.mark.parametrize("name", RAW)
def test_a_raw_list_item_does_not_kill_the_worker(redis_target: tuple[Target, Any], name: str) -> None:
    """Whatever LPUSH put on the list of a queue, a good task runs afterwards, in the same process."""
    found, process = redis_target
    with redis.Redis.from_url(found.contract.bridge.config.broker.celery_url()) as client:
        client.lpush("default", RAW[name])
    found.must_be_well(process)


def test_no_generated_list_item_kills_the_worker(redis_target: tuple[Target, Any]) -> None:
    """The same with arbitrary bytes, arbitrary JSON, and envelopes with arbitrary parts."""
    found, process = redis_target
    parts = st.sampled_from(["body", "headers", "content-type", "content-encoding", "properties"])
    envelopes = st.dictionaries(parts, header_values).map(lambda some: json.dumps({**ENVELOPE, **some}).encode())
    items = st.binary() | header_values.map(lambda value: json.dumps(value).encode()) | envelopes
    with redis.Redis.from_url(found.contract.bridge.config.broker.celery_url()) as client:

        @quick
        @given(st.lists(items, min_size=1, max_size=20))
        def survives(batch: list[bytes]) -> None:
            client.lpush("default", *batch)
            found.must_be_well(process)

        survives()
