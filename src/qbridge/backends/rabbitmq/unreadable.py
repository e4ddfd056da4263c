"""What becomes of a message whose properties py-amqp cannot read? It comes without them, and is refused as others are.

RabbitMQ passes properties and header tables on as they are: bytes that are no UTF-8 in a content type, a timestamp
beyond the year 9999, a table nested ten thousand deep. py-amqp reads them while it takes the frame from the socket, and
what it raises there ends the connection, or the worker; the message goes to the next one, and ends that too.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from typing import Any

from amqp import spec
from amqp.method_framing import frame_handler
from amqp.serialization import dumps, loads

from qbridge.backends.base import HEADER_UNREADABLE

__all__ = ["ReadsMethods", "reads_all"]

_HEADER = 2
"""Type of the frame with a content's header: class, weight, size of the body (12 octets), and the properties."""
_PROPERTIES = 12
_HEADERS_ONLY = 0x2000
"""Flags of properties of which only the table of headers is there."""
_SIZES = {"b": 1, "B": 2, "l": 4, "L": 8}
_CUT = 40_000
"""Octets of the properties that are kept: in base64 they are to be no larger than headers may be."""


def reads_all(connection: Any, callback: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return py-amqp's handler of frames, which also reads a header that cannot be read.

    Args:
        connection: py-amqp's.
        callback: called with each method, and the content that it came with.
    """
    passed_on = False

    def pass_on(*method: Any) -> None:
        nonlocal passed_on
        passed_on = True
        callback(*method)

    handle = frame_handler(connection, pass_on)

    def on_frame(frame: Any) -> Any:
        nonlocal passed_on
        passed_on = False
        try:
            return handle(frame)
        except Exception:
            kind, channel, payload = frame
            if kind != _HEADER or passed_on:
                raise  # it is not the frame's fault
        return handle((kind, channel, _without_properties(payload)))

    return on_frame


def _without_properties(payload: bytes) -> bytes:
    raw = bytes(payload[_PROPERTIES:][:_CUT])
    headers = {HEADER_UNREADABLE: b64encode(raw).decode()}
    return bytes(payload[:_PROPERTIES]) + _HEADERS_ONLY.to_bytes(2) + bytes(dumps("F", [headers]))


class ReadsMethods:
    """Mixin for py-amqp's channels: reads methods whose names are no UTF-8, with question marks in their place.

    A routing key is what its sender likes, where a topic or fanout exchange takes it.
    """

    def dispatch_method(self: Any, method_sig: Any, payload: Any, content: Any) -> Any:
        """Handle a method."""
        if method_sig == spec.Basic.GetOk:
            # who waits for it is taken from the list before it is read
            payload = self._readable(method_sig, payload)
        dispatch = super().dispatch_method  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # py-amqp's
        try:
            return dispatch(method_sig, payload, content)
        except UnicodeDecodeError:
            readable = self._readable(method_sig, payload)
            if readable is payload:
                raise  # it is not the frame's fault
        return dispatch(method_sig, readable, content)

    def _readable(self: Any, method_sig: Any, payload: Any) -> Any:
        shape = self._METHODS[method_sig].args
        try:
            loads(shape, payload, 4)
        except UnicodeDecodeError:
            return _repaired(shape, payload)
        return payload


def _repaired(shape: str, payload: bytes) -> bytes:
    repaired, at = bytearray(payload[:4]), 4
    for kind in shape:
        if kind == "s":
            end = at + 1 + payload[at]
            text = payload[at + 1 : end].decode(errors="replace").replace("\ufffd", "?").encode()
            repaired += bytes([len(text)]) + text
        else:
            end = at + _SIZES[kind]
            repaired += payload[at:end]
        at = end
    return bytes(repaired)
