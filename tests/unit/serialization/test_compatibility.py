"""Does every JSON value that fits one schema fit another: tables of changes, and random pairs of annotations."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict, Union
from uuid import UUID

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from qbridge.serialization.compatibility import differences
from qbridge.serialization.schema import Fields


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class MoreColours(enum.Enum):
    RED = "red"
    BLUE = "blue"
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Small(BaseModel):
    number: int


class Large(BaseModel):
    number: int
    note: str = ""


class Wide(BaseModel):
    number: int | str


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int


class Demanding(BaseModel):
    number: int
    note: str


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    number: int


class Tree(BaseModel):
    value: int
    below: list[Tree] = []


class WideTree(BaseModel):
    value: int | None
    below: list[WideTree] = []
    note: str = ""


class NarrowTree(BaseModel):
    value: int
    below: list[NarrowTree] = Field(default=[], max_length=1)


@dataclass
class Point:
    x: int
    y: int = 0


class Corner(TypedDict):
    x: int
    y: NotRequired[int]


class Pair(NamedTuple):
    x: int
    y: str = "a"


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    tail: bool


class NamedCat(Cat):
    kind: Literal["cat"]


class Bird(BaseModel):
    kind: Literal["bird"] = "bird"


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]
Zoo = Annotated[Cat | Dog | Bird, Field(discriminator="kind")]


def even(value: int) -> int:
    return value


Even = Annotated[int, AfterValidator(even)]

ANNOTATIONS: list[Any] = [
    int, str, bool, float, bytes, type(None), Decimal, datetime, date, timedelta, UUID, Colour, MoreColours,
    Level, Small, Large, Wide, Strict, Demanding, Open, Tree, WideTree, NarrowTree, Point, Corner, Pair, Cat, Dog, Pet,
    Even, Literal["red"], Literal[1, 2], Literal[1, "red", True],
    Annotated[int, Field(ge=0)], Annotated[int, Field(gt=-1, lt=100)], Annotated[int, Field(multiple_of=2)],
    Annotated[float, Field(allow_inf_nan=False)], Annotated[float, Field(le=10)],
    Annotated[str, Field(min_length=1)], Annotated[str, Field(max_length=2)], Annotated[str, Field(pattern="^a*$")],
    Annotated[Decimal, Field(max_digits=3, decimal_places=1)], Annotated[date, Field(gt=date(2000, 1, 1))],
    list, dict, tuple[int, str], tuple[int, ...], tuple[int, int],
]  # fmt: skip


def combined(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Annotations made of others."""
    return st.one_of(
        inner.map(lambda one: list[one]),
        inner.map(lambda one: Annotated[list[one], Field(min_length=1, max_length=3)]),
        inner.map(lambda one: dict[str, one]),
        inner.map(lambda one: dict[int, one]),
        inner.map(lambda one: Union[one, None]),  # noqa: UP007 - of a value, not of types that are known here
        st.tuples(inner, inner).map(lambda two: tuple[two]),
        st.tuples(inner, inner).map(lambda two: Union[two]),  # noqa: UP007
        st.sampled_from([set[int], frozenset[str], set[UUID], set[int | str]]),
    )


annotations = st.recursive(st.sampled_from(ANNOTATIONS), combined, max_leaves=3)


def fields(annotation: Any) -> Fields:
    return Fields("task one", {"value": annotation})


def schema_of(annotation: Any) -> Any:
    made = fields(annotation).wire_schema()
    return {**made["properties"]["value"], "$defs": made.get("$defs", {})}


def changes(old: Any, new: Any) -> list[str]:
    return [f"{path}: {what}" if path else what for path, what, _ in differences(schema_of(old), schema_of(new))]


@st.composite
def changed_pairs(draw: st.DrawFn) -> tuple[Any, Any]:
    """An old annotation and a new one, which often is near to it."""
    old = draw(annotations)
    new = draw(
        st.one_of(
            annotations,
            annotations.map(lambda other: Union[old, other]),  # noqa: UP007
            annotations.map(lambda other: Union[other, old]),  # noqa: UP007
            st.sampled_from([Any, Union[old, None]]),  # noqa: UP007
        )
    )
    return old, new


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(pair=changed_pairs(), data=st.data())
def test_what_is_called_compatible_takes_every_value(pair: tuple[Any, Any], data: st.DataObject) -> None:
    """For pairs of annotations: where there is no difference, each value that the old code sends can be read."""
    old, new = pair
    assume(not differences(schema_of(old), schema_of(new)))
    event("compatible")
    sender, reader = fields(old), fields(new)
    try:
        value = data.draw(st.from_type(old))
        _, sent = sender.encode({"value": value}, strict=True)
        sender.read(sent, strict=True)
    except (ValidationError, ValueError):
        assume(False)
    reader.read(sent, strict=True)


SAME: list[tuple[Any, Any]] = [
    (int, int | None), (int, float), (int, Any), (str, str | int), (Colour, MoreColours), (Colour, str), (UUID, str),
    (datetime, str), (Small, Large), (Strict, Small), (Small, Wide), (Tree, WideTree), (set[int], list[int]),
    (tuple[int, str], list[int | str]), (dict[int, int], dict[str, int]), (Literal["red"], Colour),
    (Annotated[int, Field(ge=1)], Annotated[int, Field(gt=0)]), (Small, dict[str, int]), (int, Decimal),
    (Annotated[int, Field(gt=0)], Annotated[int, Field(ge=0)]), (list[Small], list[Large] | None), (Even, int),
    (Annotated[str, Field(max_length=2)], Annotated[str, Field(max_length=3)]), (Level, int), (Point, Corner),
    (NamedCat, Pet), (Cat, Cat | Dog), (Pet, Zoo), (Pet, Cat | Dog), (list[Pet], list[Zoo | None]),
]  # fmt: skip

OTHER: list[tuple[Any, Any, str]] = [
    (int, str, "was integer, is string"),
    (int | None, int, "was null, is integer"),
    (float, int, "was number, is integer"),
    (float, Decimal, "checked by something else: finite"),
    (float, Annotated[float, Field(allow_inf_nan=False)], "checked by something else: finite"),
    (Any, int, "was any value, is integer"),
    (str, Colour, "takes only some values now"),
    (MoreColours, Colour, 'the value "green" is not taken any more'),
    (str, Path, "checked by something else"),
    (str, datetime, r"was string, is string \(date-time\)"),
    (bytes, str, "would be taken as it is"),
    (Large, Strict, "note: is not taken any more"),
    (Small, Demanding, "note: is required now"),
    (Wide, Small, "number: was string, is integer"),
    (Open, Small, "ignores members"),
    (Tree, NarrowTree, "maxItems is 1"),
    (list[int], set[int], "twice become one"),
    (list[int], tuple[int, int], "minItems is 2"),
    (list[Wide], list[Small], r"\[\].number: was string"),
    (dict[str, int], dict[int, int], "keys of another type"),
    (Pet, Cat, "kind: the value"),
    (Cat, Pet, "kind: decides between"),
    (Cat | Dog, Pet, "kind: decides between"),
    (list[Cat], list[Zoo | None], r"\[\].kind: decides between"),
    (int, Even, "checked by something else: even"),
    (int, Annotated[int, Field(multiple_of=2)], "multipleOf has changed"),
    (str, Annotated[str, Field(pattern="^a$")], "pattern has changed"),
    (Annotated[int, Field(ge=0)], Annotated[int, Field(gt=0)], "exclusiveMinimum is 0"),
    (Literal[1], Literal[True], "the value 1 is not taken"),
    (date, Annotated[date, Field(gt=date(2000, 1, 1))], "checked by something else: gt=2000-01-01"),
    (int | str, UUID | bool, "fits no member of the union"),
]


def _named(value: object) -> str:
    """A test's name is the same in every process: no address in it."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize(("old", "new"), SAME, ids=_named)
def test_what_is_wider_is_compatible(old: Any, new: Any) -> None:
    """And what was equal, of course, whatever it is."""
    assert changes(old, new) == changes(old, old) == changes(new, new) == []


@pytest.mark.parametrize(("old", "new", "said"), OTHER, ids=_named)
def test_what_is_narrower_says_where_and_how(old: Any, new: Any, said: str) -> None:
    """With the path to it."""
    found = changes(old, new)
    assert found
    assert re.search(said, "; ".join(found)), found


def test_what_decides_in_a_union_is_demanded_of_whoever_may_leave_it_out() -> None:
    """Pydantic finds the member by it, and knows no default then; in what a worker returns it is there."""
    fields(Cat).read({"value": {"lives": 2}}, strict=True)
    with pytest.raises(ValidationError):
        fields(Pet).read({"value": {"lives": 2}}, strict=True)
    [found] = differences(schema_of(Cat), schema_of(Pet))
    assert not found.certain
    assert differences(schema_of(Cat), schema_of(Pet), written_out=True) == []


@pytest.mark.parametrize("annotation", ANNOTATIONS, ids=_named)
def test_nothing_differs_from_itself(annotation: Any) -> None:
    """Nor is it narrower than a union with it."""
    assert changes(annotation, annotation) == []


def test_what_is_not_known_is_not_called_compatible() -> None:
    """A keyword of a later pydantic, a reference that leads nowhere, a form of another tool."""
    plain = {"type": "string"}
    for unknown in (
        {"type": "string", "contains": 1}, {"$ref": "#/$defs/Gone"}, {"not": {"type": "integer"}}, {"allOf": [plain]},
        {"type": ["string", "null"]}, False,
    ):  # fmt: skip
        assert differences(plain, unknown)
        assert not differences(unknown, unknown)
