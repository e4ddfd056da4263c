"""What of a message is bound by its signature: everything that a worker acts on, and nothing a broker adds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbridge import PayloadError
from qbridge.options import CELERY_HEADERS
from qbridge.serialization.keys import new_key, read_key
from qbridge.serialization.lock import Lock
from qbridge.serialization.locked_messages import (
    BROKERS,
    ENCRYPTED,
    HEADER_ENCRYPTION,
    HEADER_SIGNATURE,
    NOT_SIGNED,
    Letter,
    lock_letter,
    unlock_letter,
)
from qbridge.serialization.refused import MessageRefused

SIGNING, CIPHER = read_key(new_key("sign")), read_key(new_key("hide"))
LOCKS = [Lock([SIGNING]), Lock([SIGNING], [CIPHER])]
HEADERS: dict[str, Any] = {
    "lang": "py", "task": "shop.pay", "id": "1", "shadow": None, "eta": "2027-01-01T00:00:00+00:00",
    "expires": "2027-01-02T00:00:00+00:00", "group": "g", "group_index": 3, "retries": 2, "timelimit": [10, None],
    "root_id": "r", "parent_id": None, "argsrepr": "(1 hidden)", "kwargsrepr": "{0 hidden}", "origin": "here",
    "ignore_result": False, "replaced_task_nesting": 0, "stamped_headers": ["by"], "stamps": {"by": ["me"]},
    "tenant": {"name": "ä", "limits": [1, 2.5, True, None]}, "qbridge_deadline": "2027-01-01T00:00:00+00:00",
    "qbridge_schema": "2:0123456789ab", "x-tenant": "shop",
}  # fmt: skip
LETTER = Letter(b'[[1], {}, {"callbacks": null}]', "application/json", "utf-8", HEADERS, "1", "reply-here")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def locked(lock: Lock, letter: Letter = LETTER) -> Letter:
    """As it goes on the wire, through JSON, as Redis and the embedded broker do it."""
    found = lock_letter(lock, "task", letter)
    return found._replace(headers=json.loads(json.dumps(found.headers)))


def reason(lock: Lock, letter: Letter) -> str:
    """Why a letter is not opened."""
    with pytest.raises(MessageRefused) as caught:
        unlock_letter(lock, "task", letter)
    return caught.value.reason


@pytest.mark.parametrize("lock", LOCKS)
def test_what_was_locked_is_opened_as_it_was(lock: Lock) -> None:
    """All of it, and none of our own headers is left."""
    opened, at = unlock_letter(lock, "task", locked(lock))
    assert opened == LETTER
    assert at is not None


def test_an_encrypted_message_shows_no_argument_and_no_type() -> None:
    """What the broker and who reads there sees is the name, the id and what else routing needs."""
    sent = locked(LOCKS[1], LETTER._replace(headers={**HEADERS, "compression": "application/x-gzip"}))
    assert sent.content_type == ENCRYPTED
    assert sent.content_encoding == "binary"
    assert "compression" not in sent.headers
    assert b"callbacks" not in sent.body
    assert unlock_letter(LOCKS[1], "task", sent)[0].headers["compression"] == "application/x-gzip"


def test_every_header_of_the_protocol_is_in_the_example() -> None:
    """So that the next tests change each."""
    assert CELERY_HEADERS - {"compression"} <= HEADERS.keys()


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("name", [*HEADERS, HEADER_SIGNATURE])
def test_no_header_can_be_taken_away(lock: Lock, name: str) -> None:
    """Not one."""
    sent = locked(lock)
    del sent.headers[name]  # type: ignore[attr-defined]
    assert reason(lock, sent) in ("bad_signature", "unsigned")


@pytest.mark.parametrize("lock", LOCKS)
@given(name=st.sampled_from([*HEADERS, HEADER_ENCRYPTION]), value=json_values)
def test_no_header_can_be_changed(lock: Lock, name: str, value: Any) -> None:
    """To whatever: the name, the id, the ETA, the expiry, limits, stamps, a header of the user's."""
    sent = locked(lock)
    if json.dumps(sent.headers.get(name)) == json.dumps(value) and name in sent.headers:
        return
    changed = sent._replace(headers={**sent.headers, name: value})
    assert reason(lock, changed) == "bad_signature"


@given(name=st.text(min_size=1, max_size=20), value=json_values)
def test_no_header_can_be_added(name: str, value: Any) -> None:
    """But those that brokers add, and those with which workers put off what they cannot open."""
    sent = locked(LOCKS[0])
    if name in sent.headers or name in NOT_SIGNED or name.startswith(BROKERS):
        return
    assert reason(LOCKS[0], sent._replace(headers={**sent.headers, name: value})) == "bad_signature"


@pytest.mark.parametrize(
    "added",
    [
        {"x-delivery-count": 3},
        {"x-death": [{"count": 1, "queue": "q"}], "x-first-death-queue": "q", "x-last-death-reason": "expired"},
        {"x-acquired-count": 2, "redelivered": True},
        {"x-received-from": [{"uri": "amqp://a"}], "x-shovelled": [{"x": 1}]},
    ],
)
def test_what_a_broker_adds_does_no_harm(added: Mapping[str, Any]) -> None:
    """Deliveries that were counted, delays, a shovel, a federation."""
    sent = locked(LOCKS[0])
    opened, _ = unlock_letter(LOCKS[0], "task", sent._replace(headers={**sent.headers, **added}))
    assert opened.headers == {**HEADERS, **added}


@pytest.mark.parametrize("lock", LOCKS)
@given(data=st.data())
def test_neither_body_nor_properties_can_be_changed(lock: Lock, data: st.DataObject) -> None:
    """Callbacks and the rest of the canvas are in the body; the address of the reply is a property."""
    sent = locked(lock)
    field = data.draw(st.sampled_from(["body", "content_type", "content_encoding", "correlation_id", "reply_to"]))
    old = getattr(sent, field)
    new = data.draw(st.binary(max_size=40) if field == "body" else st.text(max_size=10))
    if new != old:
        assert reason(lock, sent._replace(**{field: new})) == "bad_signature"


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_bit_of_an_encrypted_body_can_be_turned(position: int, bit: int) -> None:
    """What is encrypted is signed."""
    sent = locked(LOCKS[1])
    body = bytearray(sent.body)
    body[position % len(body)] ^= 1 << bit
    assert reason(LOCKS[1], sent._replace(body=bytes(body))) == "bad_signature"


def test_a_signed_task_is_no_command_and_a_command_no_task() -> None:
    """A signature is for one purpose."""
    lock = LOCKS[0]
    command = lock_letter(lock, "control", Letter(b"{}", "application/json", "utf-8", {"clock": 1}))
    assert unlock_letter(lock, "control", command)[0].headers == {"clock": 1}
    assert reason(lock, command) == "bad_signature"
    with pytest.raises(MessageRefused):
        unlock_letter(lock, "control", locked(lock))


def test_unsigned_messages_are_taken_only_while_keys_are_rolled_out() -> None:
    """And a wrong signature not even then, nor one that was cut off what is encrypted."""
    lenient = Lock([SIGNING], [CIPHER], required=False)
    assert unlock_letter(lenient, "task", LETTER) == (LETTER, None)
    assert reason(LOCKS[0], LETTER) == "unsigned"
    assert reason(LOCKS[0], LETTER._replace(headers=None)) == "unsigned"  # type: ignore[arg-type]
    assert reason(lenient, LETTER._replace(headers={**HEADERS, HEADER_SIGNATURE: "1:sign:1:AAAA"})) == "bad_signature"
    cut = locked(LOCKS[1])
    del cut.headers[HEADER_SIGNATURE]  # type: ignore[attr-defined]
    assert reason(lenient, cut) == "unsigned"


def test_what_is_signed_is_read_where_encryption_was_added_since() -> None:
    """Workers with encryption keys go on with what was sent before there were any, and during the roll-out."""
    assert unlock_letter(LOCKS[1], "task", locked(LOCKS[0]))[0] == LETTER
    assert reason(LOCKS[0], locked(LOCKS[1])) == "bad_signature"  # without the key it cannot be read


@pytest.mark.parametrize(
    "value",
    [
        datetime.now(UTC),
        b"bytes",
        {1, 2},
        object(),
        {"__type__": "x", "__value__": 1},
        [{"__type__": 1, "__value__": 2}],
    ],
)
def test_headers_that_would_arrive_as_something_else_are_refused_when_sent(value: Any) -> None:
    """The signature would not fit any more, and the message would be lost to the dead letters."""
    with pytest.raises(PayloadError, match="header"):
        lock_letter(LOCKS[0], "task", LETTER._replace(headers={**HEADERS, "mine": value}))


def test_what_has_a_signature_is_not_signed_again() -> None:
    """Whoever sends a message on must open it first, or a stranger's would get a signature."""
    for sent in (locked(LOCKS[0]), LETTER._replace(headers={**HEADERS, HEADER_ENCRYPTION: "1:hide:::"})):
        with pytest.raises(PayloadError, match="Open it first"):
            lock_letter(LOCKS[0], "task", sent)
