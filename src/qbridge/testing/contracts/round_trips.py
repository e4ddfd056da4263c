"""Does what a caller passes arrive, and what a task returns come back, as what they are?"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from qbridge import ArgumentsError, PayloadError, TaskFailed
from qbridge.testing.contract_app.tasks import OutOfStock
from qbridge.testing.contract_app.values import ANNOTATIONS, Ticket, same
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.waiting import wait_until

_ID = UUID("12345678-1234-5678-1234-567812345678")


@pytest.mark.parametrize("annotation", ANNOTATIONS)
def test_a_value_of_every_supported_annotation_comes_back(qbridge_contract: Contract, annotation: str) -> None:
    """The worker gets and returns the same value, of the same type, that the caller passed."""
    task = getattr(qbridge_contract.tasks, f"echo_{annotation}")
    values = ANNOTATIONS[annotation][1]
    results = [task.delay(value) for value in values]
    for value, result in zip(values, results, strict=True):
        got = result.get(timeout=20)
        assert same(value, got), f"{value!r} came back as {got!r}"


def test_a_parameter_of_every_kind_arrives(qbridge_contract: Contract) -> None:
    """Positional-only, plain, star, keyword-only, defaulted and double-star parameters arrive with their types."""
    task = qbridge_contract.tasks.everything
    full = task.delay(1, "two", 3.0, 4.0, flag=True, limit=7, owner=_ID)
    short = task.delay(1, second="two")
    assert full.get(timeout=20) == {
        "first": 1,
        "second": "two",
        "rest": ["float", "float"],
        "flag": True,
        "limit": 7,
        "others": {"owner": f"UUID {_ID}"},
    }
    assert short.get(timeout=20) == {
        "first": 1, "second": "two", "rest": [], "flag": False, "limit": 5, "others": {},
    }  # fmt: skip


def test_containers_of_models_arrive_as_models(qbridge_contract: Contract) -> None:
    """Models in a list and in a dict are models in the task."""
    ticket = Ticket(id=_ID, price=Decimal("19.90"))
    result = qbridge_contract.tasks.total.delay([ticket, ticket], extra={"a": ticket})
    assert result.get(timeout=20) == "59.70"


def test_a_plain_call_needs_no_broker(qbridge_contract: Contract) -> None:
    """Calling a task calls its function here."""
    assert qbridge_contract.tasks.add(1, 2) == 3
    assert qbridge_contract.tasks.add(1) == 11
    with pytest.raises(OutOfStock):
        qbridge_contract.tasks.fail("own")


@pytest.mark.parametrize(
    ("task", "args", "kwargs", "named"),
    [
        ("add", ("1",), {}, "a"),
        ("add", (1, 2.5), {}, "b"),
        ("add", (), {}, "a"),
        ("add", (1, 2, 3), {}, "too many"),
        ("add", (1,), {"c": 3}, "c"),
        ("everything", (1, "x"), {"limit": 0}, "limit"),
        ("everything", (1, "x", "no float"), {}, "rest"),
        ("total", ([{"id": "no uuid"}],), {}, "tickets"),
        ("echo_list_of_models", ([1],), {}, "value"),
        ("echo_uuid", ("12345678-1234-5678-1234-567812345678",), {}, "value"),
        ("echo_annotated", (0,), {}, "value"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(
    qbridge_contract: Contract, task: str, args: tuple[Any, ...], kwargs: dict[str, Any], named: str
) -> None:
    """A wrong call raises ArgumentsError in the caller, names the field, and leaves nothing on the queue."""
    contract = qbridge_contract
    if contract.depth_or_none("idle") != 1:
        contract.purge("idle")
        contract.tasks.add.using(queue="idle").delay(1)  # a good one shows that the queue is looked at
        wait_until(lambda: contract.depth("idle") == 1, what="the good message")
    with pytest.raises(ArgumentsError) as caught:
        getattr(contract.tasks, task).using(queue="idle").delay(*args, **kwargs)
    assert named in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert contract.depth("idle") == 1


def test_a_task_declared_leniently_takes_what_can_be_converted(qbridge_contract: Contract) -> None:
    """``strict=False`` lets a caller pass the text of a number; it arrives as a number."""
    assert qbridge_contract.tasks.lenient.delay("12").get(timeout=20) == 12


def test_a_dict_that_looks_like_a_typed_value_is_just_a_dict(qbridge_contract: Contract) -> None:
    """kombu would make objects of such dicts; a user's data stays data, as argument and as result."""
    data = {"__type__": "datetime", "__value__": "not a date", "inner": {"__type__": "x", "__value__": [1]}}
    result = qbridge_contract.tasks.typed_values.delay(data)
    assert result.get(timeout=20) == {"__type__": "uuid", "__value__": "not one", "got": data}


def test_a_wrong_return_value_fails_the_task_before_it_is_stored(qbridge_contract: Contract) -> None:
    """The caller gets PayloadError, and the task counts as failed."""
    result = qbridge_contract.tasks.wrong_result.delay("text")
    with pytest.raises(PayloadError, match="wrong_result"):
        result.get(timeout=20)
    assert result.failed()
    assert result.state == "FAILURE"


def test_an_argument_above_the_payload_limit_is_refused_by_the_caller(qbridge_contract: Contract) -> None:
    """A message that is too large raises PayloadError and is not sent; one below the limit is."""
    limit = qbridge_contract.bridge.config.serialization.max_payload_bytes
    task = qbridge_contract.tasks.size_of
    with pytest.raises(PayloadError, match="limit"):
        task.delay("x" * limit)
    assert task.delay("x" * (limit // 2)).get(timeout=20) == limit // 2


@pytest.mark.parametrize("headers", [{"x": "a" * 61_000}, {str(number): 1 for number in range(190)}])
def test_headers_that_a_worker_refuses_are_refused_by_the_caller(
    qbridge_contract: Contract, headers: dict[str, Any]
) -> None:
    """Nothing is sent, alone or with others; the caller would wait for a dead letter."""
    task = qbridge_contract.tasks.size_of
    with pytest.raises(PayloadError, match="limit"):
        task.using(headers=headers)
    celerys = qbridge_contract.bridge.celery.tasks[task.name]
    with pytest.raises(PayloadError, match="limit"):
        celerys.apply_async(("x",), headers=headers)
    with pytest.raises(PayloadError, match="limit"):
        qbridge_contract.bridge.send(task.name, ("x",), headers=headers)


def largest(send: Callable[[int], Any], low: int, high: int) -> Any:
    """What sending as much as can be sent returns."""
    result = None
    while low <= high:
        size = (low + high) // 2
        try:
            low, result = size + 1, send(size)
        except PayloadError:
            high = size - 1
    return result


def test_the_most_that_is_sent_in_headers_is_taken(qbridge_contract: Contract) -> None:
    """To the last octet, to the last header, and after a delay, in which brokers add headers of their own."""
    who = qbridge_contract.tasks.who
    many = largest(lambda size: who.using(headers={f"a{number}": 1 for number in range(size)}).delay(), 140, 180)
    assert 140 <= len(many.get(timeout=20)["headers"])
    long = largest(lambda size: who.using(headers={"x": "é" * size}).delay(), 21_000, 22_500)
    size = len(long.get(timeout=20)["headers"]["x"])
    assert size >= 21_000
    wide = {chr(0x4E00): "é" * (size - 30)}  # room for an eta
    assert wide == who.using(headers=wide, countdown=2.5).delay().get(timeout=20)["headers"]
    [sent] = who.using(headers=wide).send_many([()])
    assert wide == sent.get(timeout=20)["headers"]
    for wrong in ({"x": "é" * (size + 1)}, {"x": "é" * (size + 1), "y": []}):
        with pytest.raises(PayloadError, match="limit"):
            who.using(headers=wrong).send_many([()])


def test_an_argument_with_more_levels_than_a_worker_reads_is_refused_by_the_caller(qbridge_contract: Contract) -> None:
    """The last level that is sent is read."""

    def deep(levels: int) -> dict[str, Any]:
        value: Any = 1
        for _ in range(levels):
            value = [value]
        return {"deep": value}

    task = qbridge_contract.tasks.typed_values
    last = largest(lambda levels: (levels, task.delay(deep(levels))), 150, 250)
    assert last[1].get(timeout=20)["got"] == deep(last[0])
    with pytest.raises(PayloadError, match="levels"):
        task.delay(deep(last[0] + 1))


def test_a_result_above_the_payload_limit_fails_the_task(qbridge_contract: Contract) -> None:
    """A result that is too large is not stored: the task fails with PayloadError."""
    limit = qbridge_contract.bridge.config.serialization.max_payload_bytes
    result = qbridge_contract.tasks.long_text.delay(limit)
    with pytest.raises((PayloadError, TaskFailed), match="limit"):
        result.get(timeout=20)
    assert result.failed()
