"""A connection to RabbitMQ whose other end is in the test's hands."""

from __future__ import annotations

import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from struct import pack
from typing import Any

import amqp
import pytest
from amqp import spec
from amqp.serialization import dumps
from amqp.transport import SSLTransport, TCPTransport

from qbridge.backends.rabbitmq import connection as wire
from qbridge.testing.servers import ThrowawayCA

CHANNEL = 1


def frame(kind: int, payload: bytes, channel: int = CHANNEL) -> bytes:
    """A frame of AMQP 0-9-1: type, channel, size, payload, 0xCE."""
    return pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def method(sig: tuple[int, int], form: str = "", *args: Any, channel: int = CHANNEL) -> bytes:
    """The frame of a method."""
    return frame(1, pack(">HH", *sig) + (dumps(form, args) if form else b""), channel)


def delivery(tag: int, body: bytes = b"{}", *, split: int = 100_000) -> bytes:
    """The frames of a delivered message."""
    deliver = method(spec.Basic.Deliver, "sLbss", "consumer", tag, False, "", "queue")
    head = frame(2, pack(">HHQ", 60, 0, len(body)) + pack(">H", 0))
    return deliver + head + b"".join(frame(3, body[at : at + split]) for at in range(0, len(body), split))


def over_tls(ca: ThrowawayCA) -> tuple[Any, Any]:
    """Both ends of a line that speaks TLS, past its handshake."""
    ours, theirs = socket.socketpair()
    at_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    at_server.load_cert_chain(*ca.issue("server"))
    at_client = ssl.create_default_context(cafile=ca.certificate)
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(at_server.wrap_socket, theirs, server_side=True)
        client = at_client.wrap_socket(ours, server_hostname="localhost")
        return client, answering.result(10)


class Line:
    """A connection of ours over a pair of sockets, past its handshake.

    Args:
        monkeypatch: pytest's.
        ca: that speaks for the server; None: no TLS.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ca: ThrowawayCA | None = None) -> None:
        ours, self.server = socket.socketpair() if ca is None else over_tls(ca)

        def shake_hands(connection: Any, callback: Any = None) -> None:
            transport: Any = TCPTransport("nowhere") if ca is None else SSLTransport("nowhere", ssl=True)
            transport.sock = ours
            if ca is None:
                transport._setup_transport()
            else:
                transport._quick_recv = ours.read  # the rest of it is the handshake
            transport.connected = True
            connection.transport = transport
            connection.on_inbound_frame = connection.frame_handler_cls(connection, connection.on_inbound_method)
            connection.frame_writer = connection.frame_writer_cls(connection, transport)
            connection._handshake_complete = True

        with monkeypatch.context() as patch:
            patch.setattr(amqp.Connection, "connect", shake_hands)
            self.connection: Any = wire._BoundedConnection("nowhere")
            self.connection.connect()
        self.server.sendall(method(spec.Channel.OpenOk, "S", b""))
        self.channel: Any = self.connection.channel()
        self.server.recv(65536)
        self.got: list[Any] = []
        self.channel.callbacks["consumer"] = self.got.append

    def tags(self) -> list[int]:
        """Delivery tags of what was handled."""
        return [message.delivery_info["delivery_tag"] for message in self.got]
