"""What of a message is signed, and what becomes of its body? All that a worker acts on, and nothing a broker adds.

Signed are the body as it is on the wire, the type and encoding of the content, ``correlation_id``, ``reply_to``, and
every header but those of ``BROKERS``. So nothing can be changed, added or taken away between sender and worker: not the
task's name, its id, its ETA, its expiry or its time limits, nor a header that a task looks at. The form is one line of
JSON (ASCII, keys sorted, no spaces) and the body behind it::

    ["qbridge", "1", KIND, KEY_ID, SECONDS, CONTENT_TYPE, CONTENT_ENCODING, CORRELATION_ID, REPLY_TO, {HEADERS}]

An encrypted body is signed as it is then; the header ``qbridge_encryption`` says ``1:KEY_ID`` and, after colons, what
the content type, the content encoding and the compression were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from qbridge.exceptions import PayloadError
from qbridge.serialization.lock import VERSION, Lock
from qbridge.serialization.refused import MessageRefused

__all__ = [
    "BROKERS", "ENCRYPTED", "HEADER_ENCRYPTION", "HEADER_SIGNATURE", "NOT_SIGNED", "Due", "Kind", "Letter",
    "lock_letter", "relock_letter", "unlock_letter",
]  # fmt: skip

HEADER_SIGNATURE = "qbridge_signature"
"""Message header: version, id of the key, seconds since 1970, and the signature, with colons between them."""

HEADER_ENCRYPTION = "qbridge_encryption"
"""Message header of a message whose body is encrypted."""

ENCRYPTED = "application/x-qbridge-encrypted"
"""The content type of an encrypted body."""

BROKERS = (
    "x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count", "x-received-from",
    "x-shovelled", "x-opt-",
)  # fmt: skip
"""What the names of headers begin with that brokers add on the way; they are not signed, and tell no secret."""

NOT_SIGNED = frozenset({
    HEADER_SIGNATURE, "redelivered", "timestamp_in_ms", "qbridge_losses", "qbridge_not_before",
})  # fmt: skip
"""Nor these: the signature itself, what kombu adds on Redis, and a plugin of RabbitMQ; and two with which workers put
off what they cannot open: who may write to a broker can hold messages back, and lie about what it counts, anyway."""

_CONTAINERS: frozenset[Any] = frozenset({dict, list, tuple})  # exact types: what comes from JSON and AMQP has no others

Kind = Literal["task", "control"]


class Due(str):
    """An ETA that a transport has taken off a message, because the time has come.

    It stands in the message's delivery info. One that came with the message would be a plain text.
    """

    __slots__ = ()


class Letter(NamedTuple):
    """The parts of a message that are locked.

    Args:
        body: as it is on the wire.
        content_type: of the body.
        content_encoding: of the body.
        headers: all of them.
        correlation_id: a property; None and "" are the same.
        reply_to: a property, likewise.
    """

    body: bytes
    content_type: str | None
    content_encoding: str | None
    headers: Mapping[str, Any]
    correlation_id: str | None = None
    reply_to: str | None = None


def lock_letter(lock: Lock, kind: Kind, letter: Letter) -> Letter:
    """Return a message with its body encrypted, if there is a key for that, and with a signature.

    Args:
        lock: the keys.
        kind: a signed task is no command to workers.
        letter: as it would be sent without.

    Raises:
        PayloadError: if a header has no JSON form, or carries a signature already.
    """
    headers = dict(letter.headers)
    if HEADER_SIGNATURE in headers or HEADER_ENCRYPTION in headers:
        # Signing it once more would vouch for whatever a stranger has sent.
        raise PayloadError(
            "a message that carries a signature is to be sent as if it were new",
            "Open it first, so that it is known to be from a holder of the keys.",
        )
    if lock.encrypts and kind == "task":
        name, body = lock.encrypt(letter.body)
        inside = (letter.content_type or "", letter.content_encoding or "", headers.pop("compression", None) or "")
        headers[HEADER_ENCRYPTION] = ":".join((VERSION, name, *inside))
        letter = letter._replace(body=body, content_type=ENCRYPTED, content_encoding="binary", headers=headers)
    try:
        headers[HEADER_SIGNATURE] = lock.sign(kind, _bound(letter), letter.body)
    except (TypeError, ValueError, RecursionError) as error:
        raise PayloadError(
            f"a header of the message has no JSON form, and cannot be signed: {error}",
            "Give headers text, numbers, booleans, lists and mappings of these.",
        ) from None
    return letter._replace(headers=headers)


def unlock_letter(lock: Lock, kind: Kind, letter: Letter) -> tuple[Letter, int | None]:
    """Return a message as it was before it was locked, and when that was.

    Args:
        lock: the keys.
        kind: what it has to be.
        letter: as it came.

    Returns:
        The message, and seconds since 1970; None: it is not signed, and need not be.

    Raises:
        MessageRefused: if it was not locked by a holder of the keys, or was changed since.
    """
    if not isinstance(letter.headers, Mapping):
        raise MessageRefused("unsigned", "it has no headers, and so no signature")
    headers = dict(letter.headers)
    signature, encryption = headers.pop(HEADER_SIGNATURE, None), headers.get(HEADER_ENCRYPTION)
    if signature is None:
        if lock.required or encryption is not None:
            raise MessageRefused("unsigned", "it has no signature, and this bridge has signing_keys")
        return letter, None
    try:
        bound = _bound(letter)
    except (TypeError, ValueError, RecursionError):
        raise MessageRefused("bad_signature", "its headers are none that could have been signed") from None
    at = lock.verify(signature, kind, bound, letter.body)
    letter = letter._replace(headers=headers)
    return (letter if encryption is None else _decrypted(lock, letter, headers)), at


def relock_letter(lock: Lock, letter: Letter, change: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Letter:
    """Return a task's message with other headers, signed anew; its body stays as it is, encrypted or not.

    Args:
        lock: the keys.
        letter: as it came.
        change: makes the new headers of the old ones.

    Raises:
        MessageRefused: if it was not locked by a holder of the keys, or was changed since.
    """
    _, at = unlock_letter(lock, "task", letter)
    headers = dict(change(letter.headers))
    headers.pop(HEADER_SIGNATURE, None)
    changed = letter._replace(headers=headers)
    if at is not None or lock.required:
        headers[HEADER_SIGNATURE] = lock.sign("task", _bound(changed), letter.body)
    return changed


def _bound(letter: Letter) -> list[Any]:
    headers = {
        name: value
        for name, value in letter.headers.items()
        if name not in NOT_SIGNED and not (name[:2] == "x-" and name.startswith(BROKERS))
    }
    if _holds_typed(headers):
        raise ValueError("a mapping with __type__ and __value__ would arrive as something else")
    return [
        letter.content_type or "", letter.content_encoding or "",
        letter.correlation_id or "", letter.reply_to or "", headers,
    ]  # fmt: skip


def _holds_typed(value: Any) -> bool:
    """Whether kombu would make an object of a mapping in it: it does of headers on Redis and in files."""
    if value.__class__ is dict:
        if value.keys() == {"__type__", "__value__"}:
            return True
        value = value.values()
    return any(part.__class__ in _CONTAINERS and _holds_typed(part) for part in value)


def _decrypted(lock: Lock, letter: Letter, headers: dict[str, Any]) -> Letter:
    parts = str(headers.pop(HEADER_ENCRYPTION)).split(":")
    if len(parts) != 5 or parts[0] != VERSION or letter.content_type != ENCRYPTED:
        raise MessageRefused("bad_signature", "how it is encrypted cannot be read")
    _, name, content_type, content_encoding, compression = parts
    body = lock.decrypt(name, letter.body)
    if compression:
        headers["compression"] = compression
    return letter._replace(
        body=body, content_type=content_type or None, content_encoding=content_encoding or None, headers=headers
    )
