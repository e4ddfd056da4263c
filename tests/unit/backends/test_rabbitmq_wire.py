"""How frames are read ahead and written without switching the socket's mode: on real sockets, without a server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from struct import pack
from types import SimpleNamespace
from typing import Any

import pytest

from qbridge.backends.deadline import deadline
from qbridge.backends.rabbitmq import publisher


class Transport(SimpleNamespace):
    """What py-amqp's transport has of a socket."""

    @contextmanager
    def having_timeout(self, timeout: float | None) -> Iterator[Any]:
        before = self.sock.gettimeout()
        self.sock.settimeout(timeout)
        try:
            yield self.sock
        finally:
            self.sock.settimeout(before)


@pytest.fixture
def ends() -> Iterator[tuple[Transport, socket.socket]]:
    """A transport and the other end of its line."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Transport(sock=ours, _read_buffer=b"", connected=True), theirs


def frame(payload: bytes) -> bytes:
    """A frame of AMQP 0-9-1: type, channel, size, payload, 0xCE."""
    return pack(">BHI", 1, 5, len(payload)) + payload + b"\xce"


def test_a_frame_in_pieces_is_kept_until_it_is_whole(ends: tuple[Transport, socket.socket]) -> None:
    """However it is cut, nothing is taken for a frame before its last octet, and nothing is lost."""
    transport, other = ends
    whole = frame(b"payload")
    for octet in whole[:-1]:
        other.sendall(bytes([octet]))
        with pytest.raises(TimeoutError):
            publisher._receive(transport)
    other.sendall(whole[-1:] + frame(b"next")[:3])
    publisher._receive(transport)
    assert transport._read_buffer == whole + frame(b"next")[:3]


def test_many_frames_are_taken_at_once(ends: tuple[Transport, socket.socket]) -> None:
    """One look at the socket for all that has come."""
    transport, other = ends
    other.sendall(frame(b"a") * 100)
    publisher._receive(transport)
    assert transport._read_buffer == frame(b"a") * 100


def test_a_large_frame_is_read_to_its_end(ends: tuple[Transport, socket.socket]) -> None:
    """One that is larger than what is read at a time."""
    transport, other = ends
    large = frame(b"x" * 300_000)
    writer = threading.Thread(target=other.sendall, args=(large,), daemon=True)
    writer.start()
    while True:
        try:
            publisher._receive(transport)
        except TimeoutError:
            continue  # it is on its way
        break
    writer.join(5)
    assert transport._read_buffer == large


def test_a_closed_line_is_an_error_of_the_connection(ends: tuple[Transport, socket.socket]) -> None:
    """As py-amqp says it, and the transport knows."""
    transport, other = ends
    other.close()
    with pytest.raises(OSError, match="closed connection"):
        publisher._receive(transport)
    assert not transport.connected


@pytest.mark.parametrize("make", [bytes, memoryview])
def test_what_the_socket_does_not_take_at_once_is_written_after_it(
    ends: tuple[Transport, socket.socket], make: Any
) -> None:
    """Two megabytes through a small buffer, in order."""
    transport, other = ends
    data = bytes(range(256)) * 8192
    received = bytearray()

    def read() -> None:
        while len(received) < len(data):
            received.extend(other.recv(65536))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    publisher._send(transport, make(data))
    reader.join(10)
    assert bytes(received) == data


def test_a_write_ends_with_the_deadline(ends: tuple[Transport, socket.socket]) -> None:
    """Nobody reads at the other end; the socket is in its own mode again afterwards."""
    transport, _ = ends
    with deadline(0.2), pytest.raises(TimeoutError):
        publisher._send(transport, b"x" * 8_000_000)
    assert transport.sock.gettimeout() is None
