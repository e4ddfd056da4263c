"""Tasks as they are declared: names, options, plain calls, sets."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from qbridge import (
    AsyncTask,
    Bridge,
    BridgeConfig,
    ConfigurationError,
    DuplicateTaskError,
    PayloadError,
    Retry,
    Task,
    TaskContext,
    TaskSet,
    UnknownQueueError,
)
from qbridge.options import checked_send_options


@pytest.fixture
def bridge(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bridge that is never connected."""
    monkeypatch.chdir(tmp_path)
    with Bridge(BridgeConfig(broker="embedded:///nowhere/b.db", results="rpc://")) as made:
        yield made


def test_plain_call_needs_no_broker(bridge: Bridge) -> None:
    """A task is still its function."""

    @bridge.task
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    assert add(1, 2) == 3
    assert add.__name__ == "add"
    assert add.__doc__ == "Add."
    assert isinstance(add, Task)


def test_async_task_is_awaited(bridge: Bridge) -> None:
    """Called plainly, in the caller's loop."""

    @bridge.task
    async def fetch(url: str) -> bytes:
        return url.encode()

    assert isinstance(fetch, AsyncTask)
    assert asyncio.run(fetch("x")) == b"x"  # type: ignore[arg-type]


def test_plain_call_gets_a_detached_context(bridge: Bridge) -> None:
    """Nobody listens; the first attempt is the last."""

    @bridge.task(context=True)
    def crunch(ctx: TaskContext, n: int) -> tuple[int, bool]:
        ctx.progress(1, n)
        return ctx.attempt, ctx.is_last_attempt

    assert crunch(3) == (1, True)


def test_name_is_module_and_function_or_what_is_given(bridge: Bridge) -> None:
    """As Celery names tasks."""

    @bridge.task
    def one() -> None: ...

    @bridge.task(name="shop.two")
    def two() -> None: ...

    assert one.name == f"{__name__}.one"
    assert set(bridge.tasks) == {f"{__name__}.one", "shop.two"}


def test_unknown_option_is_a_type_error_with_a_suggestion(bridge: Bridge) -> None:
    """Celery would ignore it in silence."""
    with pytest.raises(TypeError, match="did you mean 'queue'"):
        bridge.task(quue="x")  # type: ignore[call-overload]

    @bridge.task
    def one() -> None: ...

    with pytest.raises(TypeError, match="did you mean 'countdown'"):
        one.using(countdwn=3)  # type: ignore[call-arg]


def test_name_used_twice_by_another_function_is_refused(bridge: Bridge) -> None:
    """Celery would keep the first and warn."""

    @bridge.task(name="x")
    def one() -> None: ...

    with pytest.raises(DuplicateTaskError, match="'x' is used twice"):

        @bridge.task(name="x")
        def two() -> None: ...


def test_same_function_may_be_declared_again(bridge: Bridge) -> None:
    """A module imported twice is no mistake."""

    def one() -> None: ...

    bridge.task(name="x")(one)
    bridge.task(name="x")(one)
    assert list(bridge.tasks) == ["x"]


def test_queue_of_a_task_is_declared_and_another_is_refused(bridge: Bridge) -> None:
    """A typo in a queue's name is an error before anything is sent."""

    @bridge.task(queue="reports")
    def one() -> None: ...

    assert one.queue == "reports"
    assert one.using(queue="default").queue == "default"
    with pytest.raises(UnknownQueueError, match="Did you mean 'reports'"):
        one.using(queue="report")


def test_using_returns_another_task_and_leaves_the_first(bridge: Bridge) -> None:
    """Options are values."""

    @bridge.task(queue="reports")
    def one() -> None: ...

    other = one.using(queue="default").using(countdown=3)
    assert (one.queue, other.queue) == ("reports", "default")


def test_remote_task_cannot_be_called_here(bridge: Bridge) -> None:
    """Its body is elsewhere."""

    @bridge.remote(name="billing.charge", queue="billing")
    def charge(cents: int) -> int: ...  # type: ignore[empty-body]

    with pytest.raises(ConfigurationError, match="another code base"):
        charge(3)


def test_queue_of_a_remote_task_is_left_to_others(bridge: Bridge) -> None:
    """A worker here would not know the task."""

    @bridge.remote(name="billing.charge", queue="billing")
    def charge(cents: int) -> int: ...  # type: ignore[empty-body]

    assert "billing" in bridge.celery.amqp.queues
    assert "billing" not in bridge.celery.amqp.queues.consume_from


def test_set_without_a_bridge_says_what_to_do() -> None:
    """Tasks may exist before any bridge."""
    tasks = TaskSet()

    @tasks.task
    def one(a: int) -> int:
        return a

    assert one(1) == 1
    with pytest.raises(ConfigurationError, match=r"bridge\.include"):
        one.delay(1)


def test_included_set_belongs_to_one_bridge(bridge: Bridge) -> None:
    """Including it twice elsewhere is refused."""
    tasks = TaskSet()

    @tasks.task(name="one")
    def one(a: int) -> int:
        return a

    bridge.include(tasks)
    assert bridge.tasks["one"] is one
    with (
        Bridge(BridgeConfig(broker="embedded:///nowhere/c.db")) as other,
        pytest.raises(ConfigurationError, match="another bridge"),
    ):
        other.include(tasks)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"time_limit": 0}, "time_limit"),
        ({"time_limit": 1, "soft_time_limit": 2}, "longer than"),
        ({"priority": 9}, "priority"),
        ({"queue": ""}, "queue"),
    ],
)
def test_options_that_cannot_work_are_refused_at_definition(bridge: Bridge, options: Any, words: str) -> None:
    """Not in a worker at night."""
    with pytest.raises(ConfigurationError, match=words):

        @bridge.task(**options)
        def one() -> None: ...


def test_generator_function_is_refused(bridge: Bridge) -> None:
    """A result is one value."""
    with pytest.raises(ConfigurationError, match="generator"):

        @bridge.task
        def one() -> Any:
            yield 1


def test_options_of_the_declaration_reach_celerys_task(bridge: Bridge) -> None:
    """Delivery is an attribute of the typed task, not of the app."""

    @bridge.task(delivery="at_most_once", time_limit=30, soft_time_limit=20, rate_limit="10/s", results=False)
    def one() -> None: ...

    @bridge.task(retry=Retry(on=OSError))
    def two() -> None: ...

    first, second = bridge.celery.tasks[one.name], bridge.celery.tasks[two.name]
    assert (first.acks_late, first.time_limit, first.soft_time_limit, first.ignore_result) == (False, 30, 20, True)
    assert second.acks_late is True
    assert bridge.celery.conf.task_acks_late is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"countdown": 1, "eta": datetime.now(UTC)}, "both"),
        ({"countdown": -1}, "past"),
        ({"countdown": "5"}, "not a time"),
        ({"eta": 5}, "not a datetime"),
        ({"task_id": ""}, "task_id"),
        ({"task_id": "x" * 156}, "task_id"),
        ({"task_id": "a\x00b"}, "task_id"),
        ({"task_id": "a\n"}, "task_id"),
        ({"task_id": "a "}, "task_id"),
        ({"task_id": "caf\udce9"}, "task_id"),
        ({"task_id": 5}, "task_id"),
        ({"countdown": 1e12}, "countdown=1000000000000.0"),
        ({"countdown": timedelta.max}, "countdown"),
        ({"expires": 1e300}, "expires"),
        ({"expires": timedelta.max}, "expires"),
        ({"priority": 5}, "priority"),
        ({"expires": True}, "not a time"),
        ({"deadline": 5}, "deadline=5 is not a time"),
        ({"headers": {"qbridge_retry": "x"}}, "qbridge's own"),
        ({"headers": {"x-opt-tenant": "x"}}, "one that brokers write"),
        ({"headers": {"timestamp_in_ms": 5}}, "one that brokers write"),
    ],
)
def test_send_options_without_sense_are_refused(options: Any, words: str) -> None:
    """In the caller."""
    with pytest.raises(ConfigurationError, match=words):
        checked_send_options(options)


def test_ids_of_155_characters_are_taken() -> None:
    """With blanks inside, and of any script."""
    for task_id in ("x" * 155, "an order, of März", "\U0001f600"):
        assert checked_send_options({"task_id": task_id}) == {"task_id": task_id}


def test_times_are_seconds_or_timedelta() -> None:
    """Both mean the same."""
    assert checked_send_options({"countdown": timedelta(seconds=3)}) == checked_send_options({"countdown": 3})


def test_closed_bridge_sends_nothing(bridge: Bridge) -> None:
    """Closing is final."""

    @bridge.task
    def one() -> None: ...

    bridge.close()
    bridge.close()
    with pytest.raises(ConfigurationError, match="closed"):
        one.delay()


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"delivery": "at_least_onc"}, "Did you mean 'at_least_once'"),  # anything else meant at_most_once
        ({"serialization": "pickle"}, "'json' or 'msgpack'"),  # kombu would write it
        ({"priority": "hihg"}, "Did you mean 'high'"),
        ({"rate_limit": "10/x"}, "'10/s'"),
        ({"retry": 3}, "Give Retry"),
        ({"expires": -1}, "above 0"),
        ({"expires": "soon"}, "not a time"),
        ({"time_limit": "60"}, "not a time"),
        ({"time_limit": True}, "not a time"),
        ({"results": "no"}, "True or False"),
        ({"strict": "no"}, "True or False"),
        ({"name": ""}, "not empty"),
    ],
)
def test_values_of_options_that_make_no_sense_are_refused_at_definition(
    bridge: Bridge, wrong: dict[str, Any], hint: str
) -> None:
    """Celery would take each of them, and what it means would show in a worker at night."""
    with pytest.raises(ConfigurationError, match=hint):
        bridge.task(**wrong)(lambda: None)


def test_time_limits_and_expiry_may_be_timedeltas(bridge: Bridge) -> None:
    """Celery gets seconds."""

    @bridge.task(time_limit=timedelta(minutes=1), soft_time_limit=timedelta(seconds=50), expires=timedelta(hours=1))
    def one() -> None: ...

    behind = bridge.celery.tasks[one.name]
    assert (behind.time_limit, behind.soft_time_limit, behind.expires) == (60.0, 50.0, 3600.0)


NO_HEADERS = [
    3, {"id": "x"}, {"task": "x"}, {"eta": "x"}, {1: "x"}, {"x": object()}, {"x": b"a"}, {"x": "\ud800"},
    {"x": 2**63}, {"x": {1: 2}}, {"x": [object()]},
]  # fmt: skip


@pytest.mark.parametrize("wrong", NO_HEADERS)
def test_headers_that_are_none_or_not_the_senders_are_refused(bridge: Bridge, wrong: Any) -> None:
    """They would overwrite the protocol's own, the task's id among them."""

    @bridge.task
    def one() -> None: ...

    with pytest.raises(ConfigurationError, match="header"):
        one.using(headers=wrong)


@pytest.mark.parametrize("wrong", [{"x": "a" * 61_000}, {str(number): 1 for number in range(190)}])
def test_headers_that_a_worker_refuses_are_refused_where_they_are_given(bridge: Bridge, wrong: Any) -> None:
    """But under ``defaults="celery"``, where no worker refuses them."""

    def one() -> None: ...

    with pytest.raises(PayloadError, match="the limit is"):
        bridge.task(name="one")(one).using(headers=wrong)
    with Bridge(BridgeConfig(defaults="celery")) as plain:
        plain.task(name="one")(one).using(headers=wrong)


@pytest.mark.parametrize("endless", [float("nan"), float("inf")])
def test_times_without_an_end_are_refused(bridge: Bridge, endless: float) -> None:
    """Not by an OverflowError from within the send."""

    @bridge.task
    def one() -> None: ...

    with pytest.raises(ConfigurationError, match="countdown"):
        one.using(countdown=endless)


def test_a_task_without_a_name_cannot_be_sent(bridge: Bridge) -> None:
    """It went out under a name of ours."""
    for name in ("", None, 5):
        with pytest.raises(ConfigurationError, match="name"):
            bridge.send(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", ["", 5, ["a"]])
def test_what_is_no_name_of_a_queue_is_refused(bridge: Bridge, wrong: Any) -> None:
    """Where it is written, and not by a TypeError from within."""
    with pytest.raises(ConfigurationError, match="queue"):
        bridge.task(queue=wrong)(lambda: None)

    @bridge.task
    def one() -> None: ...

    with pytest.raises(ConfigurationError, match="queue"):
        one.using(queue=wrong)
