"""Signatures: what callers pass is what the function gets, and nothing that cannot cross gets sent."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, Unpack
from uuid import UUID

import pytest
from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, Field, SecretStr, computed_field

from qbridge.context import TaskContext
from qbridge.exceptions import ArgumentsError, ConfigurationError, PayloadError
from qbridge.serialization.signature import Signature, result_decoder

ID = UUID("9ffb1828-5cf3-4522-98b2-4e718a5c6f65")
NOW = datetime(2026, 11, 21, 3, 4, 5, 678901, tzinfo=UTC)


class Colour(Enum):
    """Values of two types."""

    RED = "red"
    TWO = 2


class Level(IntEnum):
    """Numbers."""

    LOW = 1


class Inner(BaseModel):
    """A model with bytes, which pydantic alone sends as UTF-8."""

    data: bytes


class Outer(BaseModel):
    """A strict model with an alias, a computed field and a nested model."""

    model_config = ConfigDict(extra="forbid")

    number: int = Field(alias="No")
    inner: Inner | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def double(self) -> int:
        """Twice the number."""
        return self.number * 2


@dataclass
class Point:
    """A dataclass."""

    x: int
    wait: timedelta = timedelta(0)


class Pair(NamedTuple):
    """A named tuple."""

    first: int
    second: date


class Options(TypedDict, total=False):
    """A typed dict."""

    owner: UUID
    raw: bytes


def over_the_wire(value: Any) -> Any:
    """What JSON makes of it."""
    return json.loads(json.dumps(value))


def round_trip(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    signature = Signature(function, "t")
    sent = signature.encode_call(args, kwargs)
    return signature.decode_call(*over_the_wire(sent))


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, 10**30), (float, 1.5), (float, float("inf")), (bool, True), (str, "ü\x00"), (type(None), None),
        (bytes, b"\xff\x00"), (UUID, ID), (Decimal, Decimal("1.10")), (datetime, NOW), (date, date(2026, 1, 2)),
        (time, time(1, 2, 3, 4)), (timedelta, timedelta(days=-2, microseconds=3)), (Path, Path("/a/b")),
        (Colour, Colour.TWO), (Level, Level.LOW), (Literal["a", 1], 1), (complex, 1 + 2j),
        (list[int], [1, 2]), (set[UUID], {ID}), (frozenset[str], frozenset({"a"})), (tuple[int, str], (1, "a")),
        (tuple[int, ...], (1, 2, 3)), (dict[str, list[Decimal]], {"a": [Decimal("0.1")]}),
        (dict[UUID, int], {ID: 1}), (dict[date, int], {date(2026, 1, 2): 1}), (dict[int, str], {1: "a"}),
        (dict[bytes, int], {b"\xff": 1}), (Outer, Outer(No=1, inner=Inner(data=b"\xff"))), (list[Outer], [Outer(No=2)]),
        (dict[str, Outer | None], {"a": Outer(No=3), "b": None}), (Point, Point(1, timedelta(hours=1))),
        (Pair, Pair(1, date(2026, 1, 2))), (Options, {"owner": ID, "raw": b"\xff"}), (Point | Outer, Outer(No=1)),
        (int | str, "1"), (int | str, 1), (int | None, None), (list[int | None] | None, [1, None]),
        (Annotated[int, Ge(3)], 3), (dict[str, Any], {"__type__": "datetime", "__value__": "x"}), (object, [1, "a"]),
    ],
)  # fmt: skip
def test_value_arrives_equal_and_of_the_same_type_as_argument_and_as_result(annotation: Any, value: Any) -> None:
    """Each supported annotation carries its values both ways unchanged."""

    def task(value: Any) -> Any: ...

    task.__annotations__ = {"value": annotation, "return": annotation}
    signature = Signature(task, "t")

    args, kwargs = signature.decode_call(*over_the_wire(signature.encode_call((value,), {})))
    assert (args, kwargs) == ([value], {})
    assert type(args[0]) is type(value)
    assert signature.decode_result(over_the_wire(signature.encode_result(value))) == value


def test_every_kind_of_parameter_is_bound_as_python_binds_it() -> None:
    """Positional-only, defaults, star, keyword-only and double star keep their form."""

    def task(a: int, /, b: str = "b", *more: UUID, flag: bool = False, when: date, **rest: bytes) -> None: ...

    assert round_trip(task, 1, "x", ID, when=date(2026, 1, 2), z=b"\xff") == (
        [1, "x", ID], {"when": date(2026, 1, 2), "z": b"\xff"},
    )  # fmt: skip
    assert round_trip(task, 1, when=date(2026, 1, 2), flag=True) == ([1], {"when": date(2026, 1, 2), "flag": True})


def test_absent_defaults_stay_absent_on_the_wire() -> None:
    """A default belongs to the code that runs the task, which may be newer."""

    def task(a: int, b: int = 5) -> None: ...

    assert Signature(task, "t").encode_call((1,), {}) == ([1], {})


def test_unpacked_typed_dict_types_the_keywords() -> None:
    """``**options: Unpack[TD]`` is validated key by key."""

    def task(**options: Unpack[Options]) -> None: ...

    assert round_trip(task, owner=ID) == ([], {"owner": ID})
    with pytest.raises(ArgumentsError, match="owner"):
        Signature(task, "t").encode_call((), {"owner": "x"})


@pytest.mark.parametrize(
    ("args", "kwargs", "field", "words"),
    [
        (("1", 2), {}, ["a"], "valid integer"),
        ((1, 2.5), {}, ["b"], "valid integer"),
        ((True, 2), {}, ["a"], "valid integer"),
        ((1,), {}, [], "missing a required argument: 'b'"),
        ((1, 2, 3), {}, [], "too many positional"),
        ((1,), {"b": 2, "c": 3}, [], "unexpected keyword argument 'c'"),
    ],
)
def test_wrong_arguments_are_named_in_the_caller(args: Any, kwargs: Any, field: list[str], words: str) -> None:
    """ArgumentsError names task and field, and never shows the value."""

    def task(a: int, b: int) -> int: ...  # type: ignore[empty-body]

    with pytest.raises(ArgumentsError, match=r"shop\.add") as caught:
        Signature(task, "shop.add").encode_call(args, kwargs)
    assert words in str(caught.value)
    assert caught.value.errors[0]["loc"] == field
    assert "2.5" not in str(caught.value)


def test_values_do_not_appear_in_the_errors_of_nested_models() -> None:
    """A refused value may be a secret."""

    def task(point: Point) -> None: ...

    with pytest.raises(ArgumentsError) as caught:
        Signature(task, "t").encode_call(({"x": "hunter2"},), {})
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(caught.value)


def test_constraints_are_checked_in_the_caller() -> None:
    """``Annotated`` constraints count."""

    def task(age: Annotated[int, Ge(18)]) -> None: ...

    with pytest.raises(ArgumentsError, match=r"age: Input should be greater than or equal to 18"):
        Signature(task, "t").encode_call((3,), {})


def test_strict_false_coerces_what_callers_pass() -> None:
    """The looser mode takes "1" for an int."""

    def task(a: int) -> None: ...

    assert Signature(task, "t", strict=False).encode_call(("1",), {}) == ([1], {})


def test_ambiguous_union_is_refused_where_its_value_would_arrive_as_another_type() -> None:
    """``str | UUID`` reads text that looks like a UUID as one: said in the caller, not found at night."""

    def task(key: str | UUID) -> None: ...

    signature = Signature(task, "t")
    assert signature.encode_call(("x",), {}) == (["x"], {})
    assert signature.encode_call((ID,), {}) == ([str(ID)], {})
    with pytest.raises(ArgumentsError, match="would arrive as UUID instead of str"):
        signature.encode_call((str(ID),), {})


def test_wrong_return_value_is_an_error_before_anything_is_stored() -> None:
    """A result is what the task declares."""

    def task() -> list[int]: ...  # type: ignore[empty-body]

    with pytest.raises(PayloadError, match="returned a dict that is not what it declares"):
        Signature(task, "t").encode_result({"a": 1})


def test_a_stored_result_of_very_many_levels_is_refused_by_its_name() -> None:
    """pydantic ends in an error of its own there."""

    def task() -> list[Any]: ...  # type: ignore[empty-body]

    deep: Any = []
    for _ in range(900):
        deep = [deep]
    with pytest.raises(PayloadError, match=r"stored result of task .* is not JSON"):
        Signature(task, "t").decode_result(deep)


def test_foreign_stored_result_is_refused_when_read() -> None:
    """Results are validated at both ends."""

    def task() -> int: ...  # type: ignore[empty-body]

    with pytest.raises(PayloadError, match="stored result of task t"):
        Signature(task, "t").decode_result("x")


def test_kombu_typed_values_of_plain_producers_are_taken_where_the_annotation_expects_them() -> None:
    """A plain Celery producer sends datetimes as ``{"__type__": …}``."""

    def task(when: datetime, ids: list[UUID]) -> None: ...

    when = {"__type__": "datetime", "__value__": NOW.isoformat()}
    key = {"__type__": "uuid", "__value__": {"hex": ID.hex, "version": 4}}
    args, _ = Signature(task, "t").decode_call([when, [key]], {})
    assert args == [NOW, [ID]]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Callable[[], int], "'value'"),
        (Iterable[int], "consumed while it is read"),
        (Iterator[int], "'value'"),
        (Generator[int, None, None], "consumed"),
        (dict[tuple[int, int], int], "text keys"),
        (dict[Colour, int], "text keys"),
        (dict[int | None, int], "text keys"),
        (SecretStr, "asterisks"),
        (type[int], "class has no JSON form"),
        (Signature, "Signature"),
        (bytearray, "bytearray"),
    ],
)
def test_annotation_that_cannot_cross_is_refused_at_definition(annotation: Any, words: str) -> None:
    """The error names task and parameter."""

    def task(value: Any) -> None: ...

    task.__annotations__ = {"value": annotation}
    with pytest.raises(ConfigurationError, match=r"task shop\.t: parameter 'value'") as caught:
        Signature(task, "shop.t")
    assert words in str(caught.value)


def test_field_that_would_be_lost_is_refused_at_definition() -> None:
    """``exclude=True`` drops data on the way."""

    class Lossy(BaseModel):
        kept: int
        lost: str = Field(exclude=True)

    def task(value: Any) -> None: ...

    task.__annotations__ = {"value": list[Lossy]}
    with pytest.raises(ConfigurationError, match="would be lost"):
        Signature(task, "t")


def test_common_abstract_containers_are_accepted() -> None:
    """Sequence and Mapping are what well-typed code asks for."""

    def task(items: Sequence[int], table: Mapping[str, UUID]) -> None: ...

    assert round_trip(task, [1, 2], {"a": ID}) == ([[1, 2], {"a": ID}], {})


def test_unresolvable_annotation_is_named_with_the_way_out() -> None:
    """A name under TYPE_CHECKING cannot be validated."""

    def task(value: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(ConfigurationError, match=r"'Nowhere' cannot be resolved. Define or import"):
        Signature(task, "t")


def test_context_parameter_without_context_option_is_explained() -> None:
    """The likely mistake gets its own message."""

    def task(ctx: TaskContext) -> None: ...

    with pytest.raises(ConfigurationError, match=r"context=True"):
        Signature(task, "t")


def test_context_is_not_part_of_the_callers_signature() -> None:
    """Callers do not pass it."""

    def task(ctx: TaskContext, n: int) -> int: ...  # type: ignore[empty-body]

    signature = Signature(task, "t", context=True)
    assert str(signature).startswith("(n:")
    assert signature.encode_call((1,), {}) == ([1], {})


def test_parameters_may_have_names_that_pydantic_uses() -> None:
    """A user's parameter names are no model fields."""

    def task(schema: int, model_config: int, _hidden: int, json: int, copy: int) -> None: ...

    assert round_trip(task, 1, 2, 3, 4, 5) == ([1, 2, 3, 4, 5], {})


def test_lone_surrogate_is_refused_in_the_caller() -> None:
    """Text that is not Unicode would fail in the worker."""

    def task(text: str) -> None: ...

    with pytest.raises(PayloadError, match="no JSON form"):
        Signature(task, "t").encode_call(("\ud800",), {})


def test_json_schema_shows_arguments_under_their_own_names() -> None:
    """``Task.schema()`` is for catalogues and other languages."""

    def task(point: Point, n: int = 3) -> list[UUID]: ...  # type: ignore[empty-body]

    schema = Signature(task, "t").json_schema()
    assert set(schema["arguments"]["properties"]) == {"point", "n"}
    assert schema["arguments"]["required"] == ["point"]
    assert schema["result"]["items"] == {"format": "uuid", "type": "string"}


def test_result_decoder_reads_an_id_as_a_given_type() -> None:
    """For ids whose task is not at hand."""
    assert result_decoder(list[UUID])([str(ID)]) == [ID]
    with pytest.raises(PayloadError, match="does not fit"):
        result_decoder(int)("x")


def test_hints_of_wrapped_functions_are_found() -> None:
    """A decorator that uses functools.wraps does not hide the types."""
    import functools

    def plain(a: int) -> int: ...  # type: ignore[empty-body]

    @functools.wraps(plain)
    def wrapper(*args: Any, **kwargs: Any) -> Any: ...

    assert typing.get_type_hints(plain)
    with pytest.raises(ArgumentsError):
        Signature(wrapper, "t").encode_call(("x",), {})
