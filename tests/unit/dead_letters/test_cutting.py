"""Which headers are kept with a dead letter?"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from qbridge.backends.kept import Kept
from qbridge.dead_letters import DeadLetter
from qbridge.dead_letters.cutting import HEADER_CUT, keepable
from qbridge.dead_letters.letter import fresh_headers, read

SMALL = {"task": "a", "id": "1", "retries": 0, "eta": None}


def nested(levels: int) -> Any:
    """Lists within lists."""
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


@pytest.mark.parametrize("headers", [{}, SMALL, {**SMALL, "list": nested(200), "long": "x" * 50_000}])
def test_what_can_be_written_is_kept_as_it_was(headers: dict[str, Any]) -> None:
    """It is the same object: nearly all are."""
    assert keepable(headers) is headers


@pytest.mark.parametrize(
    "more", [{"deep": nested(20_000)}, {"long": "x" * 100_000}, {"numbers": [1] * 10_000, "deep": {"a": nested(500)}}]
)
def test_what_cannot_be_written_is_named(more: dict[str, Any]) -> None:
    """All others are kept."""
    assert {**SMALL, HEADER_CUT: ", ".join(more)} == keepable({**SMALL, **more})


def test_of_many_some_are_kept() -> None:
    """Until half of what may be is full; the list of the others has an end."""
    kept = keepable({f"a{number}": "x" * 50 for number in range(5_000)})
    assert 400 < len(kept) < 700
    assert len(kept[HEADER_CUT]) == 1_000


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
