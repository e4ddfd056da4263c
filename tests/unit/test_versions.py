"""By which signature was a message sent: fingerprints, versions, and what upcasters make of old calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, field_validator

from qbridge import ArgumentsError, Bridge, BridgeConfig, ConfigurationError, Item, TaskContext, TaskSet
from qbridge.task import Task
from qbridge.versions import HEADER_SCHEMA, Stamp, decode_received, newer, version_in


class Old(BaseModel):
    """One."""

    number: int = Field(0, description="of the invoice")


class New(BaseModel):
    """Another."""

    number: int = Field(5, title="Number")


@pytest.fixture
def bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bridge]:
    """A bridge that is never connected."""
    monkeypatch.chdir(tmp_path)
    with Bridge(BridgeConfig(broker="embedded:///nowhere/b.db", results="rpc://")) as made:
        yield made


def fingerprint_of(function: Any, **options: Any) -> str:
    return TaskSet().task(name="one", **options)(function).fingerprint


def test_a_fingerprint_changes_when_other_calls_fit_and_only_then() -> None:
    """Not with titles, defaults, docstrings, names of classes; with types, names, order, what may be left out."""

    def one(invoice: Old, dpi: int = 1) -> None: ...
    def same(invoice: New, dpi: int = 2) -> str:
        """Say something."""
        return ""

    def with_context(ctx: TaskContext, invoice: Old, dpi: int = 1) -> None: ...
    def other_order(dpi: int, invoice: Old) -> None: ...
    def required(invoice: Old, dpi: int) -> None: ...
    def by_name(invoice: Old, *, dpi: int = 1) -> None: ...
    def other_type(invoice: Old, dpi: float = 1) -> None: ...

    mine = fingerprint_of(one)
    assert len(mine) == 12
    assert int(mine, 16) >= 0
    assert mine == fingerprint_of(same) == fingerprint_of(with_context, context=True) == fingerprint_of(one, version=7)
    others = [fingerprint_of(each) for each in (other_order, required, by_name, other_type)]
    others.append(fingerprint_of(one, strict=False))
    assert len({mine, *others}) == 6


def test_a_fingerprint_knows_what_json_schema_has_no_word_for() -> None:
    """A validator, the type of a mapping's keys, whether infinities pass."""

    class Free(BaseModel):
        number: int

    class Checked(BaseModel):
        number: int

        @field_validator("number")
        @classmethod
        def positive(cls, value: int) -> int:
            return value

    @dataclass
    class Limited:
        number: int

        def __post_init__(self) -> None: ...

    annotations: list[Any] = [
        Free, Checked, Limited, dict[str, int], dict[int, int], float, Annotated[float, Field(allow_inf_nan=False)],
        Literal["a", "b"], Literal["a"], Any, "tuple[int, ...]", set[int],
    ]  # fmt: skip
    found = set()
    for annotation in annotations:

        def one(value: Any) -> None: ...

        one.__annotations__["value"] = annotation
        found.add(fingerprint_of(one))
    assert len(annotations) == len(found)

    def first(value: Literal["a", "b"]) -> None: ...
    def second(value: Literal["b", "a"]) -> None: ...

    assert fingerprint_of(first) == fingerprint_of(second)


def test_parameters_may_be_called_as_json_schema_calls_its_keywords() -> None:
    """``title``, ``enum``, ``required``: names like others."""

    def one(title: str, enum: int, required: list[int], properties: int = 1, const: int = 2) -> None: ...
    def other(titel: str, enum: int, required: list[int], properties: int = 1, const: int = 2) -> None: ...

    assert fingerprint_of(one) != fingerprint_of(other)


@pytest.mark.parametrize("wrong", [0, -1, True, "2", 1.0, None, 10**9])
def test_a_version_is_a_whole_number_from_1(bridge: Bridge, wrong: Any) -> None:
    """Whatever else is refused where the task is declared; so is a misspelt option, with the right one."""
    with pytest.raises(ConfigurationError, match="version"):
        bridge.task(version=wrong)(lambda: None)
    with pytest.raises(TypeError, match="did you mean 'version'"):
        bridge.task(versoin=2)  # type: ignore[call-overload]


@pytest.mark.parametrize("said", [None, 5, "", "1", "0:0123456789ab", "2:xyz", "x:0123456789ab", b"1:0123456789ab", {}])
def test_a_header_of_somebody_else_says_no_version(said: Any) -> None:
    """It is taken as no header."""
    assert Stamp.of({HEADER_SCHEMA: said}) is None
    assert version_in({HEADER_SCHEMA: said}) == version_in(said) == version_in(None) == 0
    assert Stamp.of({HEADER_SCHEMA: "12:0123456789ab"}) == Stamp(12, "0123456789ab")


def painter(bridge: Bridge) -> Task[..., str]:
    @bridge.task(name="shop.paint", version=3)
    def paint(width: int, height: int, *, colour: str = "red") -> str:
        return f"{width}x{height} {colour}"

    @paint.upcast(2)
    def paint_square(side: int, colour: str) -> Item:
        return paint.item(side, side, colour=colour)

    return paint


def received(paint: Task[..., str], version: int, *args: Any, **kwargs: Any) -> Any:
    headers = {HEADER_SCHEMA: f"{version}:0123456789ab"} if version else {}
    return decode_received(paint.definition, headers, args, kwargs)


def test_an_old_call_becomes_a_new_one(bridge: Bridge) -> None:
    """Through the upcaster of its version; calls of no version and of the current one are taken as they are."""
    paint = painter(bridge)
    assert received(paint, 2, 5, colour="blue") == ([5, 5], {"colour": "blue"})
    assert received(paint, 0, 5, 6) == received(paint, 3, 5, 6) == received(paint, 1, 5, 6) == ([5, 6], {})


def test_arguments_that_do_not_fit_say_by_which_version_they_were_sent(bridge: Bridge) -> None:
    """And what is to be done; those without a version say nothing of it."""
    paint = painter(bridge)

    def said(version: int, *args: Any) -> str:
        with pytest.raises(ArgumentsError) as caught:
            received(paint, version, *args)
        assert caught.value.task.startswith("shop.paint")
        return str(caught.value)

    assert "version" not in said(0, "a")
    mine = paint.fingerprint
    sent = "sent as version {} with schema 0123456789ab, this worker has version 3 with schema " + mine
    assert sent.format(1) in said(1, 5)
    assert "Write @paint.upcast(1)" in said(1, 5)
    assert sent.format(2) in said(2, "a", "blue")
    assert "paint (version 2) cannot be called" in said(2, "a", "blue")
    assert "Correct the upcaster test_versions.painter.<locals>.paint_square" in said(2, "a", "blue").replace(
        painter.__module__, "test_versions"
    )
    assert "raise version=" in said(3, 5)
    assert "Start workers that have version 4" in said(4, 5)
    assert "cannot run task shop.paint" in str(newer(paint.definition, {HEADER_SCHEMA: "4:0123456789ab"}))


def test_an_upcaster_returns_a_call_of_its_task(bridge: Bridge) -> None:
    """Anything else names it; what it raises itself is raised."""
    paint = painter(bridge)

    @bridge.task(name="shop.other")
    def other(number: int) -> int:
        return number

    answers: list[Any] = ["text", other.item(5)]

    @paint.upcast(1)
    def paint_nothing(number: int) -> Item:
        if answers:
            answer: Item = answers.pop()
            return answer
        raise LookupError("no such number")

    for what in ("a call of task shop.other", "a str"):
        with pytest.raises(ArgumentsError, match=rf"paint_nothing returned {what}.*Return paint\.item"):
            received(paint, 1, 5)
    with pytest.raises(LookupError):
        received(paint, 1, 5)


def test_an_upcaster_without_parentheses_is_refused_at_once(bridge: Bridge) -> None:
    """It was taken for the version, and nothing was declared."""

    @bridge.task(version=2)
    def paint(color: str) -> None: ...

    def from_one() -> Item:
        return paint.item("red")

    with pytest.raises(ConfigurationError, match=r"Write parentheses: @task\.upcast\(1\)"):
        paint.upcast(from_one)  # type: ignore[arg-type]


def test_an_upcaster_that_cannot_work_is_refused_where_it_is_declared(bridge: Bridge) -> None:
    """Of no version below the current one, the second of one version, async, for a task without a body here."""
    paint = painter(bridge)

    def one(number: int) -> Item:
        return paint.item(number, number)

    async def later(number: int) -> Item:
        return paint.item(number, number)

    def unsendable(number: Iterator[int]) -> Item:
        return paint.item(1, 1)

    for version in (0, 3, 4, True, "1"):
        with pytest.raises(ConfigurationError, match="a version below"):
            paint.upcast(version)(one)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"second one for version 2, after .*paint_square"):
        paint.upcast(2)(one)
    with pytest.raises(ConfigurationError, match="is async"):
        paint.upcast(1)(later)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"shop.paint \(version 1\): parameter 'number'"):
        paint.upcast(1)(unsendable)

    @bridge.remote(name="elsewhere", version=2)
    def elsewhere(number: int) -> int: ...  # type: ignore[empty-body]

    with pytest.raises(ConfigurationError, match="would never be called"):
        elsewhere.upcast(1)(one)


def test_every_way_to_send_says_the_version(bridge: Bridge) -> None:
    """Signatures too, which others may send later; a name that nobody has declared says nothing."""
    paint = painter(bridge)
    stamp = {HEADER_SCHEMA: f"3:{paint.fingerprint}"}
    celery_task: Any = bridge.celery.tasks["shop.paint"]
    assert celery_task.s(1, 2).options["headers"] == stamp
    assert celery_task.signature((1, 2), headers={"tenant": "a"}).options["headers"] == {**stamp, "tenant": "a"}
    old = celery_task.signature((1,), headers={HEADER_SCHEMA: "2:0123456789ab"})
    assert old.options["headers"] == {HEADER_SCHEMA: "2:0123456789ab"}
    assert paint.using(countdown=1).item(1, 2)[0].headers == stamp
    assert bridge._somebody_elses("nobody.knows").headers == {}
