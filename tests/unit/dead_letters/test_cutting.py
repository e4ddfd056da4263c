"""Which headers are kept with a dead letter?"""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime
from decimal import Decimal
from struct import pack
from typing import Any

import amqp
import pytest
from amqp.serialization import dumps
from hypothesis import given
from hypothesis import strategies as st

from qbridge.backends.kept import Kept
from qbridge.dead_letters import DeadLetter
from qbridge.dead_letters.cutting import HEADER_CUT, KEPT_OCTETS, with_record
from qbridge.dead_letters.letter import (
    HEADER_DEAD_LETTER,
    HEADER_LOSSES,
    LONGEST_RECORD,
    fresh_headers,
    is_record,
    read,
    record_of,
)
from qbridge.serialization.header_limits import field_octets

SMALL = {"task": "a", "id": "1", "retries": 0, "eta": None}


def nested(levels: int) -> Any:
    """Lists within lists."""
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


def kept_of(headers: dict[str, Any]) -> dict[str, Any]:
    """What is kept beside the record."""
    kept = with_record(headers, "{}")
    assert "{}" == kept.pop(HEADER_DEAD_LETTER)
    return kept


@pytest.mark.parametrize("headers", [{}, SMALL, {**SMALL, "list": nested(200), "long": "x" * 70_000}])
def test_what_can_be_written_is_kept_as_it_was(headers: dict[str, Any]) -> None:
    """Nearly all are: more than any worker takes."""
    assert headers == kept_of(headers)


@pytest.mark.parametrize(
    "more", [{"deep": nested(20_000)}, {"long": "x" * 100_000}, {"numbers": [1] * 10_000, "deep": {"a": nested(500)}}]
)
def test_what_cannot_be_written_is_named(more: dict[str, Any]) -> None:
    """All others are kept."""
    assert {**SMALL, HEADER_CUT: ", ".join(more)} == kept_of({**SMALL, **more})


def test_of_many_some_are_kept() -> None:
    """Until half of what may be is full; the list of the others has an end."""
    kept = kept_of({f"a{number}": "x" * 50 for number in range(5_000)} | {"task": "a" * 1_000})
    assert "task" in kept  # what the message is goes first
    assert 400 < len(kept) < 700
    assert len(kept[HEADER_CUT]) == 1_000


TEXTS = st.text(st.characters(codec=None), max_size=40)
EPOCH = datetime.fromtimestamp(0, UTC).replace(tzinfo=None)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.decimals(-1000, 1000, places=3)
    | st.datetimes(EPOCH)
    | st.binary(max_size=40)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=20,
)


@given(TEXTS, VALUES)
def test_a_header_weighs_no_less_than_it_has_octets(name: str, value: Any) -> None:
    """As py-amqp writes it."""
    assert field_octets(name, value) >= len(dumps("F", [{name: value}])) - 4


TEXTS_OF_ERRORS = ["x", "\n", "é", "漢", "\ud800", "\U0001f600", "\x00", '"']


def worst(sign: str, rest: str = "") -> str:
    """A record of everything that is as long as anybody can make it."""
    named = "x" if sign in "\ud800\x00" else sign  # a class has to have a name
    error = type(named * 300, (Exception,), {})(rest + sign * 100_000)
    # a name of AMQP has 255 octets at most
    name = (sign * 255).encode("utf-8", "surrogatepass")[:255].decode("utf-8", "ignore")
    return record_of(
        queue=name, reason="exhausted", error=error, traceback=sign * 100_000 + rest, worker=sign * 100_000,
        attempts=2**63, crashes=2**63, first_at=sign * 100_000, content_type=name, content_encoding=name, priority=255,
    )  # fmt: skip


@pytest.mark.parametrize("sign", TEXTS_OF_ERRORS)
def test_a_record_has_an_end_in_octets(sign: str) -> None:
    """A character may have twelve of them in JSON; the beginning of the text and the end of the traceback stay."""
    record = worst(sign, "here")
    assert len(record) <= LONGEST_RECORD
    assert is_record(record)
    told = json.loads(record)
    assert told["text"].startswith(f"here{sign}" if sign != "\ud800" else "here")
    assert told["traceback"].endswith("here")
    assert len(told["text"]) >= 1_000
    assert len(told["traceback"]) >= 2_000


@pytest.mark.parametrize("value", ["x" * (LONGEST_RECORD + 1), "é", 5, None, ["{}"]])
def test_what_no_worker_writes_is_no_record(value: Any) -> None:
    """It would be passed on as it is, whatever room it takes."""
    assert not is_record(value)


def many(seed: int) -> dict[str, Any]:
    """Headers as anybody may write them, of up to a frame and more."""
    chance = random.Random(seed)
    signs = chance.choice(["abc", "漢字", "\U0001f600", "\ud800", "é"])
    wide = len(signs[0].encode("utf-8", "surrogatepass"))
    longest = 255 // wide

    def text(most: int) -> str:
        return "".join(chance.choices(signs, k=chance.randrange(1, most)))

    def value(levels: int) -> Any:
        kind = chance.randrange(10 if levels else 8)
        if kind == 9:
            return {text(longest): value(levels - 1) for _ in range(3)}
        if kind == 8:
            return [value(levels - 1) for _ in range(3)]
        scalars = [True, None, 1.5, 2**62, -1, Decimal("1.5"), text(10), text(chance.choice([50, 2_000]))]
        return scalars[kind]

    few = chance.choice([True, False])
    headers: dict[str, Any] = {}
    count = chance.choice([1, 200, 5_000, 15_500])
    for number in range(count):
        name = f"{number:x}" if few else (f"{number:x}" + text(longest - 6))[:longest]
        headers[name] = value(3) if count < 1_000 else chance.choice([True, None, 5])
    return headers


HOSTILE = {
    "many switches": {f"{number:03x}"[-3:]: True for number in range(4_096)} | {f"{n:04}": True for n in range(9_000)},
    "wide names": {chr(0x4E00 + number) * 85: True for number in range(507)},
    "a record": {HEADER_DEAD_LETTER: "x" * 130_980},
    "as much as is kept": {"a": "漢" * ((KEPT_OCTETS - 20) // 3)},
    "many numbers": {"a": [1] * 7_900, "b": [1.5] * 7_900},
    "names to cut": {chr(0x10000 + number) * 63: "x" * 3_000 for number in range(100)},
}


def frame_of(headers: dict[str, Any]) -> int:
    """Octets of the frame with the header of a message whose other properties are as long as they can be."""
    text = "x" * 255
    message = amqp.Message(
        "", content_type=text, content_encoding=text, correlation_id=text, reply_to=text, message_id=text, type=text,
        app_id=text, priority=9, delivery_mode=2, timestamp=1, application_headers=headers,
    )  # fmt: skip
    return 8 + len(pack(">HHQ", 60, 0, 2**40)) + len(message._serialize_properties())


@pytest.mark.parametrize("sign", ["\U0001f600", "\x00"])
@pytest.mark.parametrize("headers", [*HOSTILE.values(), *map(many, range(20))], ids=[*HOSTILE, *map(str, range(20))])
def test_a_dead_letter_fits_a_frame(headers: dict[str, Any], sign: str) -> None:
    """RabbitMQ closes the connection over which a larger one comes: such a message kept its place in a worker."""
    marked = {HEADER_LOSSES: 2**31, **with_record(headers, worst(sign))}
    assert frame_of(marked) <= 131_072


def test_a_replay_goes_to_its_queue_only() -> None:
    """RabbitMQ would give it to those that ``CC`` names too."""
    headers = {**SMALL, "CC": ["b"], "BCC": ["c"], "CCC": 1}
    letter = DeadLetter(id="1", queue="a", reason="malformed", at=datetime.now(UTC), headers=headers)
    assert {"CC", "BCC"}.isdisjoint(fresh_headers(letter))
    assert fresh_headers(letter)["CCC"] == 1


@pytest.mark.parametrize("record", ["[" * 20_000, "{", 5, '"text"', "[]", None])
def test_a_record_that_is_none_is_none(record: Any) -> None:
    """Somebody else has put it there; it is a foreign one, and the others are listed too."""
    kept = Kept(place=1, body=b"a", headers={"qbridge_dead_letter": record}, properties={})
    assert read(kept, "a").reason == "foreign"


def test_headers_of_any_depth_have_an_id() -> None:
    """The id of a letter without a record is made of what it has."""
    kept = Kept(place=1, body=b"a", headers={"deep": nested(20_000)}, properties={})
    assert read(kept, "a").id == read(kept, "a").id != ""
