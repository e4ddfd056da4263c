"""How one message is taken from the socket and nothing beyond it, and how frames are written: without a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any

import amqp
import pytest
from kombu.asynchronous import Hub
from tests.unit.backends.amqp_line import CHANNEL, Line, delivery, frame

from qbridge.amqp import BridgeConnection
from qbridge.backends.deadline import deadline
from qbridge.backends.rabbitmq import connection as wire
from qbridge.testing.servers import ThrowawayCA


def test_a_message_in_pieces_is_kept_until_it_is_whole(line: Line) -> None:
    """However it is cut, nothing is handled before its last octet, and nothing is lost."""
    whole = delivery(1, b"first") + delivery(2, b"second")
    for octet in whole:
        line.server.sendall(bytes([octet]))
        try:
            line.connection.drain_events(timeout=0)
        except TimeoutError:
            continue
    assert [message.body for message in line.got] == [b"first", b"second"]


@pytest.mark.parametrize("timeout", [0, 5, None])
def test_nothing_is_taken_beyond_the_message_that_is_read(line: Line, timeout: float | None) -> None:
    """What comes after it stays in the socket: who waits for that, with select or in an event loop, sees it there."""
    line.server.sendall(b"".join(delivery(tag) for tag in range(5)) + frame(8, b"", channel=0))
    for tag in range(5):
        line.connection.drain_events(timeout=timeout)
        assert line.tags() == list(range(tag + 1))
        assert line.connection.transport._read_buffer == b""
    left = line.connection.transport.sock.recv(100)
    assert left == frame(8, b"", channel=0)


def test_content_of_other_channels_is_not_taken_along(line: Line) -> None:
    """A body on another channel would complete a second message, which nobody would be woken for."""
    other = delivery(9).replace(pack(">BH", 3, CHANNEL), pack(">BH", 3, 7))
    octets = delivery(1) + other[other.index(pack(">BH", 3, 7)) :]
    assert wire._end_of_message(octets) == len(delivery(1))


@pytest.mark.parametrize("split", [100, 100_000, 2_000_000])
def test_a_large_message_is_read_to_its_end(line: Line, split: int) -> None:
    """In frames that are smaller and larger than what is looked at, while it is on its way."""
    body = bytes(range(97, 123)) * 40_000
    octets = delivery(1, body, split=split) + delivery(2)
    writer = threading.Thread(target=line.server.sendall, args=(octets,), daemon=True)
    writer.start()
    line.connection.drain_events(timeout=10)
    line.connection.drain_events(timeout=10)
    writer.join(5)
    assert [len(message.body) for message in line.got] == [len(body), 2]


def test_a_burst_wakes_the_event_loop_for_each_of_its_messages(line: Line) -> None:
    """kombu's loop handles one and waits for the socket: with what was read ahead it would wait a second for each."""
    hub = Hub()
    wire.BoundedAMQPTransport(None).register_with_event_loop(line.connection, hub)
    line.server.sendall(b"".join(delivery(tag) for tag in range(20)))
    began = time.monotonic()
    loop = hub.create_loop()
    while len(line.got) < 20 and time.monotonic() - began < 20:
        next(loop)
    assert line.tags() == list(range(20))
    assert time.monotonic() - began < 5  # it was ten seconds


def test_a_burst_in_one_record_of_tls_wakes_the_event_loop_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TLS takes the whole record from the socket, where the loop would wait for the rest of it."""
    line = Line(monkeypatch, ThrowawayCA(tmp_path))
    sock = line.connection.transport.sock
    with line.server, sock:
        hub = Hub()
        wire.BoundedAMQPSSLTransport(BridgeConnection("amqps://")).register_with_event_loop(line.connection, hub)
        line.server.sendall(b"".join(delivery(tag) for tag in range(12)))
        began = time.monotonic()
        loop = hub.create_loop()
        while len(line.got) < 12 and time.monotonic() - began < 15:
            next(loop)
        took = time.monotonic() - began
    assert line.tags() == list(range(12))
    assert took < 4  # it was eleven seconds


def test_a_publish_beside_deliveries_leaves_them_where_they_are_seen(line: Line) -> None:
    """py-amqp looks once for what the server says before it writes."""
    line.connection.client_properties["capabilities"] = {"connection.blocked": True}
    line.server.sendall(b"".join(delivery(tag) for tag in range(3)))
    line.channel._basic_publish(amqp.Message("x"), routing_key="queue")
    assert len(line.got) == 1
    assert line.connection.transport._read_buffer == b""


def test_a_closed_line_is_an_error_of_the_connection(line: Line) -> None:
    """As py-amqp says it, and the transport knows; what had come before is handled first."""
    line.server.sendall(delivery(1))
    line.server.close()
    line.connection.drain_events(timeout=0)
    assert line.tags() == [1]
    with pytest.raises(OSError, match="closed connection"):
        line.connection.drain_events(timeout=0)
    assert not line.connection.transport.connected


def test_nothing_comes(line: Line) -> None:
    """At once or after a while; the socket is in its own mode again."""
    for timeout in (0, 0.05):
        with pytest.raises(TimeoutError):
            line.connection.drain_events(timeout=timeout)
    with deadline(0.05), pytest.raises(TimeoutError):
        line.connection.drain_events()
    assert line.connection.transport.sock.gettimeout() is None
    assert line.connection.transport.connected


@pytest.mark.parametrize("make", [bytes, memoryview])
def test_what_the_socket_does_not_take_at_once_is_written_after_it(line: Line, make: Callable[[bytes], Any]) -> None:
    """Two megabytes through a small buffer, in order."""
    data = bytes(range(256)) * 8192
    received = bytearray()

    def read() -> None:
        while len(received) < len(data):
            received.extend(line.server.recv(65536))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    line.connection.transport.write(make(data))
    reader.join(10)
    assert bytes(received) == data


def test_a_write_ends_with_the_deadline(line: Line) -> None:
    """Nobody reads at the other end: what is written next would be taken for the rest, so the connection is over."""
    transport = line.connection.transport
    with deadline(0.2), pytest.raises(TimeoutError):
        transport.write(b"x" * 8_000_000)
    assert transport.sock.gettimeout() is None
    assert not transport.connected


def test_nothing_is_written_after_the_deadline(line: Line) -> None:
    """The connection is as good as before."""
    with deadline(0), pytest.raises(TimeoutError):
        line.connection.transport.write(b"x")
    line.server.setblocking(False)
    with pytest.raises(BlockingIOError):
        line.server.recv(1)
    assert line.connection.transport.connected


def test_a_closed_socket_is_an_error_of_the_connection(line: Line) -> None:
    """As after a fork, in the child: kombu knows what to do about an OSError."""
    transport = line.connection.transport
    transport.sock.close()
    with pytest.raises(OSError):
        transport.write(b"x")
    transport.sock = None
    with pytest.raises(OSError, match="closed"):
        line.connection.drain_events(timeout=0)
