"""How does a kombu message become a row of the file, and a row a message again?

The body is kept as it is, text or bytes. All else goes into one JSON text, written and read by kombu's own JSON, which
carries dates, bytes and UUIDs in headers as on kombu's other transports.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from kombu.utils import json as kombu_json

from qbridge.backends.base import HEADER_NOT_BEFORE
from qbridge.backends.embedded.store import Claim, Outgoing

__all__ = ["open_up", "seal"]

# kombu's messages are plain dictionaries: Any at this border.
Message = dict[str, Any]


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
    until = float(until) if isinstance(until, int | float) else None
    eta = headers.get("eta")
    if eta is None or "task" not in headers:
        return until
    try:
        moment = datetime.fromisoformat(eta)
    except (TypeError, ValueError):
        return until
    return until if moment.tzinfo is None else max(moment.timestamp(), until or 0.0)


def open_up(claim: Claim) -> Message:
    """The message that a claimed row holds, with what is known of its deliveries.

    A row that was not written by us is handed out as what nobody can decode: it then goes the way of all bad messages,
    and does not stop the worker.
    """
    try:
        message: Message = kombu_json.loads(claim.envelope)
        info: dict[str, Any] = message["properties"]["delivery_info"]
    except (ValueError, TypeError, KeyError):
        info = {"exchange": "", "routing_key": ""}
        message = {
            "content-type": "application/x-unreadable",
            "content-encoding": "binary",
            "headers": {},
            "properties": {"delivery_info": info},
        }
    message["properties"]["delivery_tag"] = f"{claim.id}.{claim.deliveries}"
    info.update(redelivered=claim.deliveries > 1, loss_count=claim.losses)
    if claim.deliveries > 1:
        info["delivery_count"] = claim.deliveries - 1
        message["headers"] = {**(message.get("headers") or {}), "x-delivery-count": claim.deliveries - 1}
    message["body"] = claim.body
    return message
