"""How does a kombu message become a row of the file, and a row a message again?

The body is kept as it is, text or bytes. All else goes into one JSON text, written and read by kombu's own JSON, which
carries dates, bytes and UUIDs in headers as on kombu's other transports.

Whoever may write to the file can put anything there. What is no message is handed out as one that nobody can decode,
with what was there in a header: it goes the way of all bad messages, and does not stop the worker.
"""

from __future__ import annotations

from base64 import b64encode
from datetime import datetime
from typing import Any

from kombu.utils import json as kombu_json

from qbridge.backends.base import HEADER_NOT_BEFORE, HEADER_UNREADABLE, TAKEN_FROM, is_time
from qbridge.backends.embedded.store import Claim, Outgoing

__all__ = ["open_up", "read", "seal", "unread", "unreadable"]

# kombu's messages are plain dictionaries: Any at this border.
Message = dict[str, Any]

_CUT = 40_000
"""Bytes of an unreadable envelope that are kept: in base64 they are to be no larger than headers may be."""


def seal(message: Message, exchange: str, routing_key: str, priority: int) -> Outgoing:
    """The row that a message becomes.

    Args:
        message: as made by kombu's ``prepare_message``.
        exchange: empty for the default one.
        routing_key: with the default exchange, the name of the queue.
        priority: 0 to 9.
    """
    properties = message["properties"]
    properties["delivery_info"] = {
        **properties.get("delivery_info", {}),
        "exchange": exchange,
        "routing_key": routing_key,
        "priority": priority,
    }
    expiration = properties.get("expiration")
    return Outgoing(
        exchange,
        routing_key,
        kombu_json.dumps({key: value for key, value in message.items() if key != "body"}),
        message["body"],
        priority,
        durable=properties.get("delivery_mode", 2) == 2,
        ttl=None if expiration is None else float(expiration) / 1000,
        not_before=_not_before(message.get("headers") or {}),
    )


def _not_before(headers: dict[str, Any]) -> float | None:
    """When a message may be handed out, as UNIX time: a task by its header ``eta`` (task protocol 2).

    A time without a zone is the business of the app that reads it, one that cannot be read of the worker that says so.
    """
    until = headers.get(HEADER_NOT_BEFORE)  # of a message that a worker has put off, a task or not
    # only numbers that are times: others would keep a dead letter from being written
    until = float(until) if is_time(until) else None
    eta = headers.get("eta")
    if eta is None or "task" not in headers:
        return until
    try:
        moment = datetime.fromisoformat(eta)
        return until if moment.tzinfo is None else max(moment.timestamp(), until or 0.0)
    except (TypeError, ValueError, OverflowError):
        return until


def read(text: Any) -> Message | None:
    """The message without its body that an envelope holds; None if that is not what kombu makes.

    Args:
        text: as it is in the file.
    """
    try:
        message = kombu_json.loads(text)
    except Exception:  # noqa: BLE001 - RecursionError too, and whatever kombu's types for dates and the like raise
        return None
    if not isinstance(message, dict):
        return None
    mappings = message.get("headers"), message.get("properties")
    texts = message.get("content-type"), message.get("content-encoding")
    fits = all(isinstance(one, dict | None) for one in mappings) and all(isinstance(one, str | None) for one in texts)
    return message if fits else None


def unread(text: bytes) -> dict[str, str]:
    """The headers of a message whose envelope cannot be read: with what there is of it.

    Args:
        text: the envelope.
    """
    return {HEADER_UNREADABLE: b64encode(text[:_CUT]).decode()}


def open_up(claim: Claim, queue: str) -> Message:
    """The message that a claimed row holds, with what is known of its deliveries.

    Args:
        claim: the row.
        queue: that it was taken from.
    """
    message = read(claim.envelope)
    info = ((message or {}).get("properties") or {}).get("delivery_info")
    if message is None or not isinstance(info, dict):
        return unreadable(claim, queue)
    names = info.get("exchange"), info.get("routing_key")
    if not all(isinstance(one, str | None) for one in names):
        return unreadable(claim, queue)
    if names[1] is None:
        info["routing_key"] = queue  # tasks are told it as their queue, and retries go there
    return _delivered(message, claim, queue)


def unreadable(claim: Claim, queue: str) -> Message:
    """A message in place of one that cannot be read: of a type that nobody decodes, with the envelope in a header.

    Args:
        claim: the row.
        queue: that it was taken from: its dead letters are that queue's.
    """
    return _delivered(
        {
            "content-type": "application/x-unreadable",
            "content-encoding": "binary",
            "headers": unread(claim.envelope),
            "properties": {"delivery_info": {"exchange": "", "routing_key": queue}},
        },
        claim,
        queue,
    )


def _delivered(message: Message, claim: Claim, queue: str) -> Message:
    sent = message["properties"]["delivery_info"]
    # nothing else of what the sender wrote there: the worker believes what it reads in it
    info = {name: sent[name] for name in ("exchange", "routing_key", "priority") if name in sent}
    info.update({TAKEN_FROM: queue}, redelivered=claim.deliveries > 1, loss_count=claim.losses)
    if claim.deliveries > 1:
        info["delivery_count"] = claim.deliveries - 1
        message["headers"] = {**(message.get("headers") or {}), "x-delivery-count": claim.deliveries - 1}
    message["properties"] |= {"delivery_info": info, "delivery_tag": f"{claim.id}.{claim.deliveries}"}
    message["body"] = claim.body
    return message
