"""Is a message what a holder of the keys has sent? Asked before anything else looks at it.

What is taken apart here is changed in place, so that all that follows sees the message as if nobody had locked it; how
it came is kept beside it, for its dead letter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from celery.utils.log import get_logger
from celery.worker.consumer.control import Control as CeleryControl

from qbridge.serialization.limits import decompressed, refuse_excess
from qbridge.serialization.lock import Lock
from qbridge.serialization.locked_messages import Due, Kind, Letter, unlock_letter
from qbridge.serialization.refused import MessageRefused

__all__ = ["Control", "Received", "received", "unlock"]

logger = get_logger(__name__)

_FRESH = 300.0
"""Seconds for which a signed command holds, in both directions: clocks differ. After that it is somebody's copy."""


class Received(NamedTuple):
    """How a message came.

    Args:
        body: locked and compressed, if it was.
        headers: all of them.
        content_type: of the body.
        content_encoding: of the body.
    """

    body: Any
    headers: Any
    content_type: str | None
    content_encoding: str | None


def received(message: Any) -> Received:
    """Return a message as it came, whatever was done to it since."""
    kept = getattr(message, "received", None)
    if isinstance(kept, Received):
        return kept
    compressed = getattr(message, "compressed_body", None)
    body = message.body if compressed is None else compressed
    return Received(body, message.headers, message.content_type, message.content_encoding)


def unlock(message: Any, lock: Lock | None, max_bytes: int | None, kind: Kind = "task") -> int | None:
    """Refuse a message that no holder of the keys has sent, or that is larger than any; else take its lock off.

    Args:
        message: as it came, or when it is looked at again.
        lock: the keys; None: nothing is signed here.
        max_bytes: largest body; None: there is no limit.
        kind: what it has to be.

    Returns:
        When it was signed, in seconds since 1970, if that is looked at for the first time.

    Raises:
        MessageRefused: if it is not opened.
    """
    if isinstance(getattr(message, "received", None), Received):
        return None  # looked at before
    at = None
    came = received(message)
    if lock is not None:
        properties, due = message.properties or {}, message.delivery_info.get("due")
        headers = {**came.headers, "eta": str(due)} if isinstance(due, Due) else came.headers
        came = came._replace(headers=headers)
        letter = Letter(
            _bytes(came.body), came.content_type, came.content_encoding, headers,
            properties.get("correlation_id"), properties.get("reply_to"),
        )  # fmt: skip
        opened, at = unlock_letter(lock, kind, letter)
        if opened is not letter:
            _replace(message, opened, came, max_bytes)
            if isinstance(due, Due):
                message.headers["eta"] = None
    refuse_excess(message, max_bytes)
    if getattr(message, "compressed_body", None) is not None:
        # its body is not compressed any more, and may be sent again
        message.headers = {name: value for name, value in message.headers.items() if name != "compression"}
    message.received = came
    return at


def _replace(message: Any, opened: Letter, came: Received, max_bytes: int | None) -> None:
    headers = dict(opened.headers)
    if opened.content_type != came.content_type:  # it was encrypted
        compression = headers.pop("compression", None)
        try:
            message.body = opened.body if compression is None else decompressed(opened.body, compression, max_bytes)
        except MessageRefused:
            raise
        except Exception as error:  # noqa: BLE001 - each library has its own
            raise MessageRefused("too_large", f"it cannot be decompressed ({type(error).__name__})") from None
        message.content_type, message.content_encoding = opened.content_type, opened.content_encoding
    message.headers = headers


def _bytes(body: Any) -> bytes:
    if isinstance(body, str):
        return body.encode("utf-8", "surrogatepass")
    return b"" if body is None else bytes(body)


class Control(CeleryControl):
    """Celery's remote control; with keys, for their holders only."""

    def __init__(self, c: Any, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        if c.app.lock is not None:
            self.box.on_message = _for_holders_only(self.box.on_message, c.app)


def _for_holders_only(handle: Any, app: Any) -> Any:
    def on_message(body: Any, message: Any) -> None:
        try:
            at = unlock(message, app.lock, app.max_payload_bytes, "control")
            if at is not None and abs(time.time() - at) > _FRESH:
                raise MessageRefused("bad_signature", f"it was signed more than {_FRESH:g} s ago, or ahead of now")
            if not isinstance(body, Mapping):
                raise MessageRefused("bad_signature", "it is no command")
        except MessageRefused as error:
            logger.error("A command to this worker is not obeyed: %s", error)  # noqa: TRY400 - no traceback of ours
        else:
            handle(body, message)

    return on_message
