"""How a message is published so that the broker is known to have it: confirms, returns, a window for bulk.

py-amqp's own ``confirm_publish`` waits for *any* acknowledgement of the channel, which is the wrong one as soon as an
event or a control message shares the channel, and it has no window: a round trip per message. Here confirmed messages
have a channel of their own, on which every delivery tag is accounted for.
Protocol: RabbitMQ's "Consumer Acknowledgements and Publisher Confirms" (tags count from 1 per channel; ``multiple``
settles all up to the tag; an unroutable ``mandatory`` message is returned before its acknowledgement).
"""

from __future__ import annotations

import _socket
import socket
import ssl
import time
from functools import partial
from typing import Any

from kombu.exceptions import OperationalError
from kombu.transport import pyamqp

from qbridge.backends.deadline import bounded
from qbridge.serialization.limits import BoundedMessage

__all__ = ["BoundedAMQPTransport", "ConfirmChannel", "NotConfirmed"]


_READ_AHEAD = 8192  # octets: some ten small tasks; what is left over is copied at each read
_FRAME_HEAD = 7


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

    It also takes what has come from the socket at once, and asks without switching the socket's mode. py-amqp reads
    each frame's head, payload and last octet by themselves, and switches the mode before and after: about thirty
    system calls for one task.
    """

    Channel = _Channel
    #: Whether an event loop watches the socket. What was read ahead is no longer in the socket, so the loop would not
    #: wake for it: then only reads without waiting may, since who asks so reads on until nothing is left.
    polled = False
    #: Whether the socket takes flags: those of TLS, gevent and eventlet do not.
    plain = False
    _ahead = True

    def connect(self, callback: Any = None) -> Any:
        connected = super().connect(callback)
        transport: Any = self.transport
        sock = transport.sock
        self.plain = isinstance(sock, _socket.socket) and not isinstance(sock, ssl.SSLSocket)
        receive = transport._quick_recv
        # py-amqp keeps what was received and not yet asked for
        transport._quick_recv = lambda size: receive(max(size, _READ_AHEAD) if self._ahead else size)
        if self.plain:
            transport._write = partial(_send, transport)
        return connected

    def blocking_read(self, timeout: float | None = None) -> Any:
        transport: Any = self.transport
        if not _holds_frame(transport._read_buffer):
            timeout = bounded(timeout)
            self._ahead = timeout == 0 or not self.polled
            if timeout != 0 or not self.plain:
                return super().blocking_read(timeout)
            _receive(transport)
        handle: Any = self.on_inbound_frame
        return handle(transport.read_frame())


def _holds_frame(received: bytes) -> bool:
    """Tell whether a whole frame was received: 7 octets, the last four of them its size, the payload, one more."""
    return len(received) > _FRAME_HEAD and len(received) > _FRAME_HEAD + int.from_bytes(received[3:_FRAME_HEAD])


def _receive(transport: Any) -> None:
    """Take what has come until there is a whole frame; errors are those of py-amqp's own reading.

    Raises:
        TimeoutError: if there is none yet.
        OSError: if the connection is lost.
    """
    while not _holds_frame(transport._read_buffer):
        try:
            received = transport.sock.recv(_READ_AHEAD, socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise TimeoutError from None
        except OSError:
            transport.connected = False
            raise
        if not received:
            transport.connected = False
            raise OSError("Server unexpectedly closed connection")
        transport._read_buffer += received


def _send(transport: Any, frame: Any) -> None:
    """Write what the socket takes at once, which is nearly always all; wait with the rest."""
    sock = transport.sock
    try:
        sent = sock.send(frame, socket.MSG_DONTWAIT)
    except BlockingIOError:
        sent = 0
    if sent < len(frame):
        with transport.having_timeout(bounded(None)):
            sock.sendall(frame[sent:])


class BoundedAMQPTransport(pyamqp.Transport):
    """kombu's pyamqp transport with bounded waits; a connection knows that an event loop watches it."""

    Connection = _BoundedConnection

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        connection.polled = True
        super().register_with_event_loop(connection, loop)


class BoundedAMQPSSLTransport(BoundedAMQPTransport, pyamqp.SSLTransport):
    """The same over TLS."""


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
