"""How a message is published so that the broker is known to have it: confirms, returns, a window for bulk.

py-amqp's own ``confirm_publish`` waits for *any* acknowledgement of the channel, which is the wrong one as soon as an
event or a control message shares the channel, and it has no window: a round trip per message. Here confirmed messages
have a channel of their own, on which every delivery tag is accounted for.
Protocol: RabbitMQ's "Consumer Acknowledgements and Publisher Confirms" (tags count from 1 per channel; ``multiple``
settles all up to the tag; an unroutable ``mandatory`` message is returned before its acknowledgement).
"""

from __future__ import annotations

import _socket
import errno
import socket
import ssl
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

from kombu.exceptions import OperationalError
from kombu.transport import pyamqp

from qbridge.backends.deadline import bounded
from qbridge.serialization.limits import BoundedMessage

__all__ = ["BoundedAMQPTransport", "ConfirmChannel", "NotConfirmed"]


_LOOK = 8192  # octets: a message with its content, unless that is large
_CONTENT = (b"\x02", b"\x03")
"""Types of frames that belong to the method before them: header and body of its content."""
_FRAME_HEAD = 7
_SOON = 0.001  # seconds


class NotConfirmed(OperationalError):
    """The broker refused a message, could not route it, or did not confirm it in time."""

    def __init__(self, reason: str, may_have_arrived: bool, tags: frozenset[int] = frozenset()) -> None:
        super().__init__(reason)
        self.may_have_arrived = may_have_arrived
        self.tags = tags


class _Message(pyamqp.Message, BoundedMessage):
    """kombu's message, which is not decompressed to any size."""


class _Channel(pyamqp.Channel):
    Message = _Message


class _BoundedConnection(pyamqp.Connection):
    """py-amqp's connection; its reads and writes end with the call's deadline (see ``backends.deadline``).

    It takes a message from the socket in two system calls, and asks without switching the socket's mode: py-amqp reads
    the head, the payload and the last octet of each frame by themselves, and switches the mode around each frame,
    which makes about thirty for one task. Nothing is taken beyond the message that is read: an event loop, which
    reads one and then waits for the socket, sees by it that there is more.
    """

    Channel = _Channel
    #: Whether the socket takes flags: those of TLS, gevent and eventlet do not, and are read and written py-amqp's way.
    plain = False

    def connect(self, callback: Any = None) -> Any:
        connected = super().connect(callback)
        transport: Any = self.transport
        sock = transport.sock
        self.plain = isinstance(sock, _socket.socket) and not isinstance(sock, ssl.SSLSocket)
        if self.plain:
            transport._write = partial(_send, transport, sock)
        return connected

    def blocking_read(self, timeout: float | None = None) -> Any:
        if not self.plain:
            return super().blocking_read(bounded(timeout))
        transport: Any = self.transport
        if not _end_of_frame(transport._read_buffer):
            _receive(transport, bounded(timeout))
        handle: Any = self.on_inbound_frame
        return handle(transport.read_frame())


def _end_of_frame(octets: bytes, begin: int = 0) -> int:
    """Return where the frame ends that begins there; 0 if not all of it is there.

    Seven octets, the last four of them the size of the payload; the payload; one more.
    """
    head = begin + _FRAME_HEAD
    if len(octets) < head:
        return 0
    end = head + int.from_bytes(octets[head - 4 : head]) + 1
    return end if end <= len(octets) else 0


def _end_of_message(octets: bytes) -> int:
    """Return where the first frame ends, with what is there of its content: the next frames of its channel."""
    end = _end_of_frame(octets)
    while end and octets[end : end + 1] in _CONTENT and octets[end + 1 : end + 3] == octets[1:3]:
        following = _end_of_frame(octets, end)
        if not following:
            break
        end = following
    return end


def _receive(transport: Any, timeout: float | None) -> None:
    """Take the next frame from the socket, and what there is of its content; errors are those of py-amqp's reading.

    Args:
        transport: whose socket takes flags.
        timeout: seconds; 0: what is there already; None: no end.

    Raises:
        TimeoutError: if a whole frame did not come in time; its beginning is kept.
        OSError: if the connection is lost.
    """
    sock = transport.sock
    if sock is None:  # closed by a fork
        raise OSError(errno.EBADF, "the connection is closed")
    flags = socket.MSG_DONTWAIT if timeout == 0 else 0
    try:
        with nullcontext() if flags else transport.having_timeout(timeout):
            while not _end_of_frame(transport._read_buffer):
                received = _take(sock, transport._read_buffer, flags)
                if not received:
                    raise OSError("Server unexpectedly closed connection")
                transport._read_buffer += received
    except (BlockingIOError, TimeoutError):
        raise TimeoutError("no frame has come in time") from None
    except OSError:
        transport.connected = False
        raise


def _take(sock: Any, begun: bytes, flags: int) -> bytes:
    if len(begun) >= _FRAME_HEAD:
        size = int.from_bytes(begun[_FRAME_HEAD - 4 : _FRAME_HEAD])
        return bytes(sock.recv(_FRAME_HEAD + size + 1 - len(begun), flags))
    if begun:
        return bytes(sock.recv(_FRAME_HEAD - len(begun), flags))
    seen = sock.recv(_LOOK, flags | socket.MSG_PEEK)
    # of a frame that is not whole everything seen is its beginning
    return bytes(sock.recv(_end_of_message(seen) or len(seen), flags)) if seen else b""


def _send(transport: Any, sock: Any, frame: Any) -> None:
    """Write what the socket takes at once, which is nearly always all; wait with the rest.

    Raises:
        TimeoutError: if the deadline has passed, or passes.
        OSError: if the connection is lost.
    """
    bounded(None)
    try:
        sent = sock.send(frame, socket.MSG_DONTWAIT)
    except BlockingIOError:
        sent = 0
    if sent < len(frame):
        try:
            with transport.having_timeout(bounded(None)):
                sock.sendall(frame[sent:])
        except BaseException:
            transport.connected = False  # what is written next would be read as the rest of this
            raise


class BoundedAMQPTransport(pyamqp.Transport):
    """kombu's pyamqp transport with bounded waits."""

    Connection = _BoundedConnection


class BoundedAMQPSSLTransport(pyamqp.SSLTransport):
    """The same over TLS, whose messages do not wait for the next ones.

    TLS takes several messages from the socket at once, and kombu's event loop, which handles one and then waits for
    the socket, would sleep up to a second for each of the others.
    """

    Connection = _BoundedConnection

    def on_readable(self, connection: Any, loop: Any) -> None:
        """Read one event, and see to it that the loop comes back soon for what TLS holds."""
        super().on_readable(connection, loop)
        if _is_held(connection):
            # the loop sleeps until its next timer at most
            loop.call_later(_SOON, self._read_held, connection, loop)

    def _read_held(self, connection: Any, loop: Any) -> None:
        if _is_held(connection):  # neither read nor given up meanwhile
            self.on_readable(connection, loop)


def _is_held(connection: Any) -> bool:
    sock = getattr(connection._transport, "sock", None)
    return isinstance(sock, ssl.SSLSocket) and connection.connected and sock.pending() > 0


class ConfirmChannel:
    """A channel in confirm mode and the state of every message sent on it.

    Args:
        connection: an open py-amqp connection.
    """

    def __init__(self, connection: Any) -> None:
        self.amqp = connection
        self.channel: Any = connection.channel()
        self.channel.confirm_select()
        self.channel.events["basic_ack"].add(self._on_ack)
        self.channel.events["basic_nack"].add(self._on_nack)
        self.channel.events["basic_return"].add(self._on_return)
        self.pending: set[int] = set()
        self.refused: set[int] = set()
        #: Tag to reason of messages that no queue took; acknowledged all the same.
        self.returned: dict[int, str] = {}
        self._tags: dict[str, int] = {}
        self.next_tag: int = 1

    @property
    def usable(self) -> bool:
        """False once the channel or its connection is closed."""
        return bool(self.channel.connection is not None and self.channel.is_open and self.amqp.connected)

    def publish(self, message: Any, **where: Any) -> int:
        """Send one message without waiting; return its delivery tag."""
        tag, self.next_tag = self.next_tag, self.next_tag + 1
        self.pending.add(tag)
        self._tags[_identity(message)] = tag
        try:
            # the name without underscore is replaced by py-amqp's own confirming version on some connections
            # a plain connection bounds each write by itself
            timeout = None if getattr(self.amqp, "plain", False) else bounded(None)
            self.channel._basic_publish(message, mandatory=True, timeout=timeout, **where)
        except BaseException:
            # A part of a frame may have been written: whatever follows on this connection would be read as its rest.
            self.amqp.collect()
            raise
        return tag

    def settle(self, at_most: int = 0, timeout: float | None = None) -> None:
        """Wait until no more than ``at_most`` messages are unconfirmed.

        Raises:
            NotConfirmed: if a message was refused or returned, or if time ran out.
        """
        end = None if timeout is None else time.monotonic() + timeout
        # a returned message is acknowledged right behind its return: read on, so that no tag is left for the next call
        while len(self.pending) > at_most:
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                self.amqp.drain_events(timeout=bounded(left))
            except TimeoutError:
                unconfirmed = frozenset(self.pending)
                # answers that come late would be taken for those to the next messages
                self.amqp.collect()
                raise NotConfirmed(f"{len(unconfirmed)} message(s) not confirmed in time", True, unconfirmed) from None
            except Exception as error:
                error.__dict__["may_have_arrived"] = True  # the connection broke, and the answer was lost with it
                raise
        if self.returned:
            returned, self.returned = self.returned, {}
            reason = next(iter(returned.values()))
            raise NotConfirmed(f"{len(returned)} message(s) could not be routed: {reason}", False, frozenset(returned))
        if self.refused:
            tags, self.refused = frozenset(self.refused), set()
            raise NotConfirmed(f"{len(tags)} message(s) refused by the broker (basic.nack)", False, tags)

    def _on_ack(self, delivery_tag: int, multiple: bool) -> None:
        self._settled(delivery_tag, multiple)

    def _on_nack(self, delivery_tag: int, multiple: bool) -> None:
        self.refused |= self._settled(delivery_tag, multiple)

    def _settled(self, delivery_tag: int, multiple: bool) -> set[int]:
        tags = {tag for tag in self.pending if tag <= delivery_tag} if multiple else {delivery_tag} & self.pending
        self.pending -= tags
        if not self.pending:
            self._tags.clear()
        return tags

    def _on_return(self, error: Exception, exchange: str, routing_key: str, message: Any) -> None:
        # It has no tag of its own, but comes before the acknowledgement that has.
        tag = self._tags.get(_identity(message), 0)
        self.returned[tag] = f"exchange {exchange!r}, routing key {routing_key!r}: {error}"


def _identity(message: Any) -> str:
    return str(message.properties.get("correlation_id") or message.properties.get("message_id"))
