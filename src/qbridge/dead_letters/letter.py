"""What is a dead letter: a message as it was, and beside it a record of why, when and where it was given up.

The message lies in ``<queue>.dead``: its body byte for byte, its headers as they were, and one more header with the
record, as JSON text. Nothing is encoded a second time, so what nobody could read stays exactly that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, Literal, TypeGuard, get_args
from uuid import uuid4

from qbridge.backends.base import HEADER_NOT_BEFORE, HEADER_UNREADABLE
from qbridge.backends.kept import Kept
from qbridge.due_by import HEADER_DEADLINE, deadline_of, instant, passed
from qbridge.versions import Stamp

__all__ = [
    "HEADERS_OF_ONE_MESSAGE", "HEADER_DEAD_LETTER", "HEADER_LOSSES", "HEADER_REPLAYS", "HEADER_UNKNOWN_SINCE",
    "HEADER_UNSTORED_SINCE", "LONGEST_RECORD", "REASONS", "DeadLetter", "Reason", "fresh_headers", "is_record",
    "name_of", "read", "record_of",
]  # fmt: skip

HEADER_DEAD_LETTER = "qbridge_dead_letter"
"""Message header with the record of a dead letter, as JSON."""

HEADER_REPLAYS = "qbridge_replays"
"""Message header with the number of times that the message was replayed."""

HEADER_LOSSES = "qbridge_losses"
"""Message header with the number of workers or processes that were lost with the message, before it was sent again."""

HEADER_UNKNOWN_SINCE = "qbridge_unknown_since"
"""Message header with the time since when no worker has known the message's task, in seconds since 1970."""

HEADER_UNSTORED_SINCE = "qbridge_unstored_since"
"""Message header with the time since when no outcome of the message's task could be stored, in seconds since 1970."""

HEADERS_OF_ONE_MESSAGE = (HEADER_LOSSES, HEADER_UNKNOWN_SINCE, HEADER_UNSTORED_SINCE, HEADER_NOT_BEFORE)
"""Headers that the next attempt of a task begins without: it is another message."""

Reason = Literal[
    "undecodable", "malformed", "unknown_task", "invalid", "exhausted", "timed_out", "expired", "crashed", "unsigned",
    "bad_signature", "too_large", "foreign",
]  # fmt: skip
"""Why a message became a dead letter; ``foreign``: somebody else has put it there."""

REASONS: tuple[Reason, ...] = get_args(Reason)

# Characters of a text, and what they may take in JSON: a server refuses headers above its frame size, and what is no
# ASCII has six octets there, or twelve.
_TEXT = (2_000, 12_000)
_TRACEBACK = (8_000, 24_000)
_NAME = 1_600
"""Octets in JSON of a name, more than AMQP has for one."""
_LONGEST_TIME = 64
_PRIORITIES = 1_000
LONGEST_RECORD = 45_000
"""Octets of a record: its text, its traceback, five names, and what stands between them."""

# What brokers have written into a message, and what counted its past: a replay begins anew.
_OF_ITS_PAST = (
    HEADER_DEAD_LETTER, HEADER_LOSSES, HEADER_UNKNOWN_SINCE, HEADER_UNSTORED_SINCE, HEADER_NOT_BEFORE,
    HEADER_UNREADABLE, "qbridge_first_attempt", "qbridge_retry", "qbridge_again", "redelivered", "x-death",
    "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count",
)  # fmt: skip
ADDRESSES = ("CC", "BCC")
"""Headers with the names of queues to which RabbitMQ also gives a message: a copy of it goes to its own place only."""


@dataclass(frozen=True, kw_only=True)
class DeadLetter:
    """A message that was given up, and why.

    Args:
        id: of the dead letter; not the task's.
        queue: that the message came from.
        reason: why it was given up.
        task: name of its task, if it says so.
        task_id: id of its task, likewise.
        version: of its task, as the sender had it, if it says so.
        fingerprint: of the arguments' schema, likewise.
        error_type: name of the error's class; empty if there was none.
        error_text: what the error said.
        traceback: of a task that failed, the end of it; else empty.
        attempts: runs that its ``Retry`` counts; 0: it was never run.
        crashes: workers, or processes of a pool, that were lost with it, as far as the broker counts them.
        first_at: when its first attempt began, if there was more than one.
        at: when it was given up.
        worker: name of the worker that did.
        content_type: of the body.
        content_encoding: of the body.
        headers: as the message had them; not in ``repr``, as plain producers write arguments there.
        properties: ``correlation_id``, ``reply_to``, ``priority`` … as far as it had them.
        body: as it was sent; not in ``repr``.
    """

    id: str
    queue: str
    reason: Reason
    task: str | None = None
    task_id: str | None = None
    version: int | None = None
    fingerprint: str | None = None
    error_type: str = ""
    error_text: str = ""
    traceback: str = field(default="", repr=False)
    attempts: int = 0
    crashes: int = 0
    first_at: datetime | None = None
    at: datetime
    worker: str = ""
    content_type: str | None = None
    content_encoding: str | None = None
    headers: Mapping[str, Any] = field(default_factory=dict, repr=False)
    properties: Mapping[str, Any] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)


def name_of(queue: str) -> str:
    """Return the name of the queue that keeps the dead letters of a queue."""
    return f"{queue}.dead"


def record_of(
    *,
    queue: str,
    reason: Reason,
    error: BaseException | None,
    traceback: str,
    worker: str,
    attempts: int,
    crashes: int,
    first_at: str | None,
    content_type: str | None,
    content_encoding: str | None,
    priority: int | None,
) -> str:
    """Return the record of a message that is given up now, as it goes into its header.

    Args:
        queue: that the message came from.
        reason: why it is given up.
        error: what handling it raised.
        traceback: of the error, if it may be kept.
        worker: name of the worker.
        attempts: runs that count.
        crashes: losses that count.
        first_at: when its first attempt began, ISO 8601.
        content_type: of the body.
        content_encoding: of the body.
        priority: of the message; in its new queue it has none, so that the order is that of time.
    """
    told = {
        "id": uuid4().hex,
        "queue": _whole(queue),
        "reason": reason,
        "error": _beginning(type(error).__qualname__, _NAME) if error is not None else "",
        "text": _beginning(_text_of(error)[: _TEXT[0]], _TEXT[1]),
        "traceback": _beginning(traceback[: -_TRACEBACK[0] - 1 : -1], _TRACEBACK[1])[::-1],
        "attempts": attempts,
        "crashes": crashes,
        "first_at": first_at if isinstance(first_at, str) and len(first_at) <= _LONGEST_TIME else None,
        "at": datetime.now(UTC).isoformat(),
        "worker": _beginning(worker, _NAME),
        "content_type": _whole(content_type),
        "content_encoding": _whole(content_encoding),
        "priority": priority if isinstance(priority, int | float) and abs(priority) < _PRIORITIES else None,
    }
    return json.dumps({name: value for name, value in told.items() if value not in (None, "")})


def is_record(value: Any) -> TypeGuard[str]:
    """Tell whether a worker of ours may have written what stands in the place of a record."""
    return isinstance(value, str) and len(value) <= LONGEST_RECORD and value.isascii()


def _beginning(text: str, octets: int) -> str:
    """Return as much of a text as takes so many octets in JSON."""
    text = text[:octets]
    if len(json.dumps(text)) <= octets:
        return text
    taken = accumulate(len(json.dumps(sign)) - 2 for sign in text)
    return text[: sum(size <= octets for size in taken)]


def _whole(name: Any) -> str:
    """Return a name; none at all where it is too long: then what says the same beside the record holds."""
    return name if isinstance(name, str) and len(json.dumps(name)) <= _NAME else ""


def read(kept: Kept, queue: str) -> DeadLetter:
    """Return the dead letter that a kept message is.

    Args:
        kept: as it lies in the queue of dead letters.
        queue: whose dead letters those are.
    """
    told = _record_in(kept.headers)
    headers = {name: value for name, value in kept.headers.items() if name != HEADER_DEAD_LETTER}
    properties = {name: value for name, value in kept.properties.items() if not name.startswith("content_")}
    if told.get("priority") is not None:
        properties["priority"] = told["priority"]
    reason, stamp = told.get("reason"), Stamp.of(headers)
    return DeadLetter(
        id=_text(told.get("id")) or _digest(kept),
        queue=_text(told.get("queue")) or queue,
        reason=reason if reason in REASONS else "foreign",
        task=_text(headers.get("task")) or None,
        task_id=_text(headers.get("id")) or None,
        version=None if stamp is None else stamp.version,
        fingerprint=None if stamp is None else stamp.fingerprint,
        error_type=_text(told.get("error")),
        error_text=_text(told.get("text")),
        traceback=_text(told.get("traceback")),
        attempts=_count(told.get("attempts")),
        crashes=_count(told.get("crashes")),
        first_at=_moment(told.get("first_at")),
        at=_moment(told.get("at")) or datetime.fromtimestamp(0, UTC),
        worker=_text(told.get("worker")),
        content_type=told["content_type"] if "content_type" in told else kept.properties.get("content_type"),
        content_encoding=(
            told["content_encoding"] if "content_encoding" in told else kept.properties.get("content_encoding")
        ),
        headers=headers,
        properties=properties,
        body=kept.body,
    )


def fresh_headers(letter: DeadLetter) -> dict[str, Any]:
    """Return the headers with which a dead letter is sent again: attempts and losses are counted anew.

    When it was to run by is left out if that is over: who has it run again wants it to run.
    """
    headers = {
        name: value
        for name, value in letter.headers.items()
        if not str(name).startswith(_OF_ITS_PAST) and name not in ADDRESSES
    }
    if passed(deadline_of(headers)):
        del headers[HEADER_DEADLINE]
    if passed(instant(headers.get("expires"))):
        headers["expires"] = None
    if "task" in headers:
        headers |= {"retries": 0, "eta": None}
    return {**headers, HEADER_REPLAYS: _count(headers.get(HEADER_REPLAYS)) + 1}


def _record_in(headers: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        told = json.loads(headers.get(HEADER_DEAD_LETTER) or "{}")
    except (TypeError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, Mapping) else {}


def _digest(kept: Kept) -> str:
    """Return the id of a message that has none: the same each time it is looked at."""
    try:
        said = json.dumps([sorted(map(str, kept.headers.items())), sorted(map(str, kept.properties.items()))])
    except RecursionError:
        said = json.dumps(sorted(map(str, kept.headers)))
    return hashlib.sha256(said.encode() + kept.body).hexdigest()[:32]


def _text_of(error: BaseException | None) -> str:
    try:
        return "" if error is None else str(error)
    except Exception as broken:  # noqa: BLE001 - a user's __str__ may do anything
        return f"<its text cannot be made: {type(broken).__name__}>"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _moment(value: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
