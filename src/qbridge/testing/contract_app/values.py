"""Which annotations must cross the wire, and which values of each show that they do?"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict
from uuid import UUID

from annotated_types import Ge, Len
from pydantic import BaseModel, Field

__all__ = ["ANNOTATIONS", "Cat", "Colour", "Dog", "Order", "Place", "Point", "Size", "Span", "Ticket", "same"]


class Colour(Enum):
    """An enum of texts that are not its names."""

    RED = "rouge"
    BLUE = "bleu"


class Size(IntEnum):
    """An enum that is a number."""

    SMALL = 1
    LARGE = 40


class Kind(StrEnum):
    """An enum that is text."""

    NEW = "new"
    USED = "used"


@dataclass(frozen=True)
class Span:
    """A dataclass that holds what JSON has no type for."""

    start: datetime
    length: timedelta
    tags: frozenset[str] = frozenset()


class Point(NamedTuple):
    """A named tuple."""

    x: float
    y: float
    label: str = ""


class Place(TypedDict):
    """A typed dict with a key that may be missing."""

    name: str
    at: tuple[float, float]
    note: NotRequired[str]


class Ticket(BaseModel):
    """A model with bytes, money and an optional part."""

    id: UUID
    price: Decimal
    seal: bytes = b""
    holder: str | None = None


class Order(BaseModel):
    """A model of models."""

    number: int
    tickets: list[Ticket] = Field(default_factory=list)
    colour: Colour = Colour.RED
    spans: dict[str, Span] = Field(default_factory=dict)


class Cat(BaseModel):
    """One half of a discriminated union."""

    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    """The other half."""

    kind: Literal["dog"] = "dog"
    barks: bool = True


@dataclass
class Tree:
    """A dataclass that refers to itself."""

    name: str
    children: list[Tree] = field(default_factory=list)


_ID = UUID("12345678-1234-5678-1234-567812345678")
_TICKET = Ticket(id=_ID, price=Decimal("19.90"), seal=bytes(range(256)))
_NOON = datetime(2026, 2, 28, 12, 0, 0, 123456, tzinfo=UTC)
_SPAN = Span(_NOON, timedelta(days=-1, microseconds=7), frozenset({"a", "b"}))
_TEXTS = ["", "plain", "Größe – 大きさ – 🦆", string.printable, "\u2028", '{"__type__": "uuid"}']

#: Name of each annotation to the annotation and some of its values.
ANNOTATIONS: Mapping[str, tuple[Any, list[Any]]] = {
    "none": (None, [None]),
    "bool": (bool, [True, False]),
    "int": (int, [0, -1, 2**53 + 1, -(2**63), 2**70]),
    "float": (float, [0.1, -0.0, 1e300, 5e-324, math.inf, math.nan]),
    "str": (str, _TEXTS),
    "bytes": (bytes, [b"", b"\x00\xff", bytes(range(256))]),
    "decimal": (Decimal, [Decimal("0.1"), Decimal("-1E+400"), Decimal("1.10")]),
    "uuid": (UUID, [_ID]),
    "datetime": (datetime, [_NOON, datetime(2026, 1, 2, 3, 4, 5), _NOON.astimezone(timezone(timedelta(hours=-3)))]),  # noqa: DTZ001 - naive ones cross too
    "date": (date, [date(1, 1, 1), date(2026, 2, 28)]),
    "time": (time, [time(23, 59, 59, 999999), time(0, 0, tzinfo=UTC)]),
    "timedelta": (timedelta, [timedelta(0), timedelta(days=400, microseconds=1), timedelta(seconds=-0.5)]),
    "enum": (Colour, list(Colour)),
    "int_enum": (Size, list(Size)),
    "str_enum": (Kind, list(Kind)),
    "literal": (Literal["on", "off", 3], ["on", 3]),
    "optional": (int | None, [None, 7]),
    "union": (int | str, [1, "1"]),
    "list": (list[int], [[], [1, 2]]),
    "set": (set[int], [set(), {1, 2}]),
    "frozenset": (frozenset[UUID], [frozenset({_ID})]),
    "tuple": (tuple[int, str, None], [(1, "a", None)]),
    "long_tuple": (tuple[int, ...], [(), (1, 2, 3)]),
    "dict": (dict[str, list[float]], [{}, {"a": [1.5]}]),
    "dict_int_keys": (dict[int, str], [{1: "a", -2: "b"}]),
    "dict_uuid_keys": (dict[UUID, date], [{_ID: date(2026, 1, 1)}]),
    "dict_enum_keys": (dict[Kind, int], [{Kind.NEW: 1}]),
    "any": (Any, [None, [1, "a", {"b": [True, None, math.inf]}], math.nan]),
    "model": (Ticket, [_TICKET]),
    "list_of_models": (list[Ticket], [[], [_TICKET, Ticket(id=_ID, price=Decimal(0), holder="x")]]),
    "dict_of_models": (dict[str, Ticket], [{"a": _TICKET}]),
    "nested_models": (Order, [Order(number=1, tickets=[_TICKET], colour=Colour.BLUE, spans={"s": _SPAN})]),
    "union_of_models": (Annotated[Cat | Dog, Field(discriminator="kind")], [Cat(lives=3), Dog()]),
    "optional_model": (Ticket | None, [None, _TICKET]),
    "dataclass": (Span, [_SPAN]),
    "list_of_dataclasses": (list[Span], [[_SPAN, _SPAN]]),
    "recursive_dataclass": (Tree, [Tree("root", [Tree("leaf")])]),
    "typed_dict": (Place, [{"name": "a", "at": (1.0, 2.0)}, {"name": "b", "at": (0.0, 0.0), "note": "n"}]),
    "named_tuple": (Point, [Point(1.0, 2.0), Point(0.5, 0.25, "x")]),
    "annotated": (Annotated[int, Ge(1)], [1, 10]),
    "annotated_list": (Annotated[list[Annotated[str, Len(1, 3)]], Len(0, 2)], [[], ["a", "abc"]]),
}


def same(left: Any, right: Any) -> bool:
    """Return True if two values are equal and of the same type; NaN is itself, and -0.0 is not 0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        if math.isnan(left):
            return math.isnan(right)
        return left == right and math.copysign(1, left) == math.copysign(1, right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(one, other) for one, other in zip(left, right, strict=True))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    if isinstance(left, datetime | time):
        return bool(left == right) and left.utcoffset() == right.utcoffset()
    if isinstance(left, Decimal):
        return str(left) == str(right)
    return bool(left == right)
