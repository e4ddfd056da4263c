"""A ``typing.TypedDict`` crosses the wire on every Python, wherever it stands in an annotation."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal, NotRequired, Required, TypedDict
from uuid import UUID

import pytest
import typing_extensions
from pydantic import ConfigDict, Field

from qbridge import ArgumentsError, PayloadError
from qbridge.serialization.signature import Signature
from qbridge.serialization.typed_dicts import readable


class Base(TypedDict):
    """What every place has."""

    name: str
    note: NotRequired[str]


class Place(Base, total=False):
    at: tuple[float, float]
    owner: Required[UUID]


class Tour(TypedDict):
    stops: list[Place]
    by_name: dict[str, Base]


ID = UUID("12345678-1234-5678-1234-567812345678")
PLACE: Place = {"name": "a", "owner": ID, "at": (1.0, 2.0)}


def visit(
    one: Place,
    many: list[Place],
    maybe: Place | None = None,
    either: typing.Optional[Base] = None,  # noqa: UP045 - typing's own generics too
    noted: Annotated[Base | None, Field(description="x")] = None,
    old: typing.List[Base] = [],  # noqa: B006, UP006
) -> Tour:
    return {"stops": many, "by_name": {"x": one}}


def test_calls_and_results_arrive_as_they_were_sent() -> None:
    """Values of typed dicts, nested ones too, keep their types."""
    signature = Signature(visit, "visit")
    args, kwargs = signature.encode_call(
        (PLACE, [PLACE]), {"maybe": PLACE, "either": {"name": "b"}, "noted": {"name": "c"}, "old": [{"name": "d"}]}
    )
    given, named = signature.decode_call(args, kwargs)
    assert given == [PLACE, [PLACE]]
    assert named == {"maybe": PLACE, "either": {"name": "b"}, "noted": {"name": "c"}, "old": [{"name": "d"}]}
    tour = {"stops": [PLACE], "by_name": {"x": {"name": "b", "note": "n"}}}
    assert signature.decode_result(signature.encode_result(tour)) == tour


@pytest.mark.parametrize(
    ("place", "fault"),
    [
        ({"name": "a"}, "owner"),
        ({"owner": ID}, "name"),
        ({"name": 1, "owner": ID}, "name"),
        ({"name": "a", "owner": ID, "at": "x"}, "at"),
        ({"name": "a", "owner": ID, "note": 5}, "note"),
    ],
)
def test_wrong_ones_are_refused(place: Any, fault: str) -> None:
    """Missing, wrong and marked keys are what the class says, inherited ones too."""
    signature = Signature(visit, "visit")
    with pytest.raises(ArgumentsError, match=fault):
        signature.encode_call((place, []), {})
    with pytest.raises(PayloadError):
        signature.encode_result({"stops": [place], "by_name": {}})


def test_other_annotations_stay_the_same_objects() -> None:
    """Nothing is rebuilt without need."""

    class Modern(typing_extensions.TypedDict):
        a: int

    for annotation in (int, list[int], dict[str, list[int]], int | None, Literal["a"], Annotated[int, 1], Modern, Any):
        assert readable(annotation) is annotation


def test_its_configuration_and_words_are_kept() -> None:
    """``__pydantic_config__``, name and docstring are those of the class."""

    class Strict(TypedDict):
        """Words."""

        __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]  # pydantic's way
        a: int

    made = readable(list[Strict]).__args__[0]
    assert (made.__name__, made.__doc__, made.__module__) == ("Strict", "Words.", __name__)
    assert made.__pydantic_config__ == {"extra": "forbid"}
