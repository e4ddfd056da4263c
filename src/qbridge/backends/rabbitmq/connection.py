"""How do a worker and a producer speak AMQP? kombu's pyamqp, with bounded waits and few system calls."""

from __future__ import annotations

import _socket
import errno
import socket
import ssl
from contextlib import nullcontext
from functools import partial
from struct import Struct
from typing import Any

from kombu.transport import pyamqp

from qbridge.backends.deadline import bounded
from qbridge.backends.rabbitmq.acks import HeldAcks
from qbridge.backends.rabbitmq.unreadable import ReadsMethods, reads_all
from qbridge.serialization.limits import BoundedMessage

__all__ = ["BoundedAMQPSSLTransport", "BoundedAMQPTransport"]


_LOOK = 8192  # octets: a message with its content, unless that is large
_CONTENT = (b"\x02", b"\x03")
"""Types of frames that belong to the method before them: header and body of its content."""
_FRAME_HEAD = 7
_ACK = Struct(">BHIHHQBB")
"""The frame of basic.ack: a method (1), its channel, 13 octets: class 60, method 80, the delivery tag, not multiple."""
_SOON = 0.001  # seconds


class _Message(pyamqp.Message, BoundedMessage):
    """kombu's message, which is not decompressed to any size."""


class _Channel(ReadsMethods, pyamqp.Channel):
    Message = _Message

    def basic_ack(self, delivery_tag: int, multiple: bool = False) -> None:
        connection: Any = self.connection
        number: Any = self.channel_id  # None once it is closed, and then there is no connection
        if multiple or connection is None or not connection.acks.add(_ack(number, delivery_tag)):
            super().basic_ack(delivery_tag, multiple)

    def settle_now(self) -> None:
        """Send what has been acknowledged."""
        connection: Any = self.connection
        if connection is not None:
            connection.send_acks()


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.acks = HeldAcks(self)
        super().__init__(*args, frame_handler=reads_all, **kwargs)

    def hold_acks(self, prefetch: int) -> None:
        """Send acknowledgements together from now on, where the socket takes flags: see ``acks``.

        Args:
            prefetch: how many messages the broker sends without an acknowledgement; 0: any number.
        """
        if self.plain:
            self.acks.begin(prefetch)

    def send_acks(self) -> None:
        """Send what is held back.

        Raises:
            OSError: if the connection is lost, or the time of the call is up.
        """
        transport: Any = self._transport
        if self.acks and transport is not None:
            transport.write(b"")

    def collect(self) -> None:
        self.acks.end()
        super().collect()

    def connect(self, callback: Any = None) -> Any:
        connected = super().connect(callback)
        transport: Any = self.transport
        sock = transport.sock
        self.plain = isinstance(sock, _socket.socket) and not isinstance(sock, ssl.SSLSocket)
        if self.plain:
            transport._write = partial(_send, transport, sock, self.acks)
        return connected

    def blocking_read(self, timeout: float | None = None) -> Any:
        if not self.plain:
            return super().blocking_read(bounded(timeout))
        transport: Any = self.transport
        if not _end_of_frame(transport._read_buffer):
            if timeout != 0:
                self.send_acks()
            try:
                _receive(transport, bounded(timeout))
            except TimeoutError:
                if timeout == 0:  # nothing is left to read: the loop will wait
                    self.send_acks()
                raise
        handle: Any = self.on_inbound_frame
        return handle(transport.read_frame())


def _ack(channel: int, delivery_tag: int) -> bytes:
    return _ACK.pack(1, channel, 13, 60, 80, delivery_tag, 0, 0xCE)


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


def _send(transport: Any, sock: Any, acks: HeldAcks, frame: Any) -> None:
    """Write what the socket takes at once, which is nearly always all; wait with the rest.

    Raises:
        TimeoutError: if the deadline has passed, or passes.
        OSError: if the connection is lost.
    """
    bounded(None)
    with acks.lock:
        octets = acks.take() + frame if acks else frame
        try:
            sent = sock.send(octets, socket.MSG_DONTWAIT)
        except (BlockingIOError, TimeoutError):  # the other one where somebody else has given the socket a timeout
            sent = 0
        if sent < len(octets):
            try:
                with transport.having_timeout(bounded(None)):
                    sock.sendall(octets[sent:])
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
