"""What the TCP proxy does to connections."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from qbridge.testing.proxy import TcpProxy
from qbridge.testing.waiting import wait_until


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it gets, and closes when its client has ended."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with connection:
            while True:
                try:
                    data = connection.recv(65536)
                    if not data:
                        return
                    connection.sendall(data)
                except OSError:
                    return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threads.append(threading.Thread(target=serve, args=(connection,)))
            threads[-1].start()

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    yield listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for connection in connections:
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # ended already
    for thread in threads:
        thread.join(10)


@pytest.fixture
def proxy(echo: tuple[str, int]) -> Iterator[TcpProxy]:
    with TcpProxy(*echo) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: TcpProxy) -> Iterator[socket.socket]:
    with socket.create_connection((proxy.host, proxy.port), 5) as client:
        yield client


def exchange(client: socket.socket, data: bytes) -> bytes:
    """Send and read back as much."""
    client.sendall(data)
    return receive(client, len(data))


def receive(client: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        piece = client.recv(65536)
        if not piece:
            break
        received += piece
    return received


def connect_and_exchange(proxy: TcpProxy) -> None:
    """Connect, send and read; a reset may come in any of them."""
    with socket.create_connection((proxy.host, proxy.port), 5) as client:
        exchange(client, b"hello")


def test_it_forwards_both_ways(proxy: TcpProxy, client: socket.socket) -> None:
    """What the client sends arrives, and the answer comes back."""
    assert b"hello" == exchange(client, b"hello")
    assert 1 == proxy.connections
    assert 1 == proxy.total_connections


def test_it_forwards_more_than_buffers_hold(client: socket.socket) -> None:
    """A peer that reads slowly loses nothing."""
    data = bytes(range(256)) * 40_000
    sender = threading.Thread(target=client.sendall, args=(data,))
    sender.start()
    received = receive(client, len(data))
    sender.join(10)
    assert data == received


def test_an_orderly_end_passes_through(proxy: TcpProxy, client: socket.socket) -> None:
    """A half-closed connection still carries the answer, and is forgotten when both ends have closed."""
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    assert b"last words" == receive(client, 100)
    wait_until(lambda: proxy.connections == 0, what="the proxy to forget the connection")


def test_cut_resets_the_connection_and_takes_new_ones(proxy: TcpProxy, client: socket.socket) -> None:
    """A cut connection fails with a reset, not with an orderly end; the next one works."""
    exchange(client, b"hello")
    assert 1 == proxy.cut()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert 0 == proxy.connections
    with socket.create_connection((proxy.host, proxy.port), 5) as again:
        assert b"again" == exchange(again, b"again")
    assert 2 == proxy.total_connections


def test_stall_is_silent_until_resume(proxy: TcpProxy, client: socket.socket) -> None:
    """Nothing passes a stalled proxy, no end and no reset either; afterwards everything held back arrives."""
    exchange(client, b"before")
    proxy.stall()
    client.sendall(b"held back")
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.recv(1)
    client.settimeout(5)
    proxy.resume()
    assert b"held back" == receive(client, len(b"held back"))


def test_a_stalled_proxy_takes_connections(proxy: TcpProxy) -> None:
    """Connecting succeeds while stalled, as it does to a frozen server, and the answer comes after resume."""
    proxy.stall()
    with socket.create_connection((proxy.host, proxy.port), 5) as client:
        client.sendall(b"hello")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(5)
        proxy.resume()
        assert b"hello" == receive(client, 5)


def test_a_stalled_connection_can_be_cut(proxy: TcpProxy, client: socket.socket) -> None:
    """Stalling does not keep a test from cutting."""
    exchange(client, b"hello")
    proxy.stall()
    assert 1 == proxy.cut()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_lost_connection_is_never_heard_of_again(proxy: TcpProxy, client: socket.socket) -> None:
    """Neither a byte nor an end passes on it, while the next connection works: a cut without a reset."""
    exchange(client, b"hello")
    assert 1 == proxy.lose()
    client.sendall(b"into the void")
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.recv(1)
    with socket.create_connection((proxy.host, proxy.port), 5) as again:
        assert b"again" == exchange(again, b"again")
        # Within the block: the proxy forgets this one as soon as its end has passed.
        assert 1 == proxy.connections


def test_delay_holds_back_each_way(proxy: TcpProxy, client: socket.socket) -> None:
    """A round trip takes at least twice the delay, and none after it was taken away."""
    proxy.delay(0.1)
    begun = time.monotonic()
    assert b"slow" == exchange(client, b"slow")
    assert time.monotonic() - begun >= 0.2
    proxy.delay(0)
    assert b"fast" == exchange(client, b"fast")


def test_refuse_closes_new_connections_until_resume(proxy: TcpProxy) -> None:
    """While refusing, a connection is reset before it carries anything."""
    proxy.refuse()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        connect_and_exchange(proxy)
    proxy.resume()
    with socket.create_connection((proxy.host, proxy.port), 5) as client:
        assert b"hello" == exchange(client, b"hello")


def test_an_unreachable_server_is_a_reset() -> None:
    """Where nobody listens behind the proxy, the client's connection ends at once."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with TcpProxy("127.0.0.1", port) as proxy:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connect_and_exchange(proxy)
        assert 0 == proxy.total_connections


def test_urls_lead_through_the_proxy() -> None:
    """The URL keeps user, password, path and scheme."""
    with TcpProxy.to("amqp://guest:p%40ss@localhost//") as proxy:
        assert f"amqp://guest:p%40ss@127.0.0.1:{proxy.port}//" == proxy.url("amqp://guest:p%40ss@localhost//")
        assert f"redis://127.0.0.1:{proxy.port}/1" == proxy.url("redis://localhost:6379/1")


def test_close_ends_the_thread_and_the_connections(echo: tuple[str, int]) -> None:
    """After close nobody listens, and closing twice is fine."""
    proxy = TcpProxy(*echo)
    with socket.create_connection((proxy.host, proxy.port), 5) as client:
        exchange(client, b"hello")
        proxy.close()
        proxy.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((proxy.host, proxy.port), 5)
