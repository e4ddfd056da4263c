"""How does a test cut, stall and delay the connections between a client and a server?"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

__all__ = ["TcpProxy"]

_DEFAULT_PORTS = {"amqp": 5672, "amqps": 5671, "redis": 6379, "rediss": 6379, "postgresql": 5432, "mysql": 3306}
_CHUNK = 65536


class _Pipe:
    """One direction of one connection: what was read here and is still to be written there."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.waiting: deque[tuple[float, bytes]] = deque()  # (when it may go on, what)
        self.ended = False  # the source has said that nothing more comes
        self.said_so = False  # and the target was told


class TcpProxy:
    """A TCP proxy on a free loopback port, for faults that a server itself cannot show.

    It runs in a thread of its own. Use it in a ``with`` block, or call ``close``.

    Args:
        host: where connections are forwarded to.
        port: port of it.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._lock = threading.Lock()
        self._pipes: dict[socket.socket, _Pipe] = {}
        self._lost: list[socket.socket] = []
        self._stalled = False
        self._refusing = False
        self._delay = 0.0
        self._total = 0
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.host: str = "127.0.0.1"
        self.port: int = self._listener.getsockname()[1]
        # A byte on this pair wakes the thread out of its wait.
        self._wake_up, self._woken = socket.socketpair()
        self._wake_up.setblocking(False)
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="qbridge-tcp-proxy", daemon=True)
        self._thread.start()

    @classmethod
    def to(cls, url: str) -> Self:
        """A proxy in front of the server that a URL names; ``url`` then gives the URL that leads through it."""
        parts = urlsplit(url)
        scheme = parts.scheme.partition("+")[0]
        return cls(parts.hostname or "localhost", parts.port or _DEFAULT_PORTS[scheme])

    def url(self, url: str) -> str:
        """``url`` with this proxy in the place of its host and port."""
        parts = urlsplit(url)
        login, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{login}{at}{self.host}:{self.port}"))

    # What tests do.

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        with self._lock:
            return len(self._pipes) // 2

    @property
    def total_connections(self) -> int:
        """Connections that were ever forwarded."""
        with self._lock:
            return self._total

    def cut(self) -> int:
        """Close every connection with a reset, at both ends; new ones are forwarded as before.

        Returns:
            How many were cut.
        """
        with self._lock:
            cut = len(self._pipes) // 2
            for end in self._pipes:
                self._reset(end)
            self._pipes.clear()
        self._wake()
        return cut

    def refuse(self) -> None:
        """Cut every connection, and close new ones at once, until ``resume``."""
        with self._lock:
            self._refusing = True
        self.cut()

    def stall(self) -> None:
        """Forward nothing from now on: sockets stay open, new connections are taken, no byte, FIN or RST passes."""
        with self._lock:
            self._stalled = True
        self._wake()

    def lose(self) -> int:
        """Forget every connection without a word: no byte, FIN or RST passes on it any more; new ones are forwarded.

        It is what a firewall or a lost machine does: each end goes on believing in the other.

        Returns:
            How many were lost.
        """
        with self._lock:
            lost = len(self._pipes) // 2
            self._lost += self._pipes
            self._pipes.clear()
        self._wake()
        return lost

    def delay(self, seconds: float) -> None:
        """Hold back each piece of data for so many seconds, in both directions, until ``delay(0)``."""
        with self._lock:
            self._delay = seconds
        self._wake()

    def resume(self) -> None:
        """End ``stall`` and ``refuse``: what was held back goes on."""
        with self._lock:
            self._stalled = self._refusing = False
        self._wake()

    def close(self) -> None:
        """Cut every connection and stop listening."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._wake()
        self._thread.join(10)
        self.cut()
        for end in (*self._lost, self._listener, self._wake_up, self._woken):
            end.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The thread. Sockets and pipes are touched under the lock only; it is not held while waiting.

    def _wake(self) -> None:
        with suppress(OSError):  # full: it wakes anyhow; closed: nobody is there to wake
            self._wake_up.send(b"w")

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                watched, timeout = self._what_to_wait_for()
            with selectors.DefaultSelector() as selector:
                try:
                    for end, events in watched.items():
                        selector.register(end, events)
                except (ValueError, OSError):
                    continue  # cut() closed one of them meanwhile: look again
                ready = selector.select(timeout)
            with self._lock:
                if not self._closed:
                    self._work({key.fileobj: events for key, events in ready})

    def _what_to_wait_for(self) -> tuple[dict[socket.socket, int], float | None]:
        watched = {self._woken: selectors.EVENT_READ, self._listener: selectors.EVENT_READ}
        if self._stalled:
            return watched, None
        timeout: float | None = None
        now = time.monotonic()
        for pipe in self._pipes.values():
            if not pipe.ended:
                watched[pipe.source] = watched.get(pipe.source, 0) | selectors.EVENT_READ
            if pipe.waiting:
                due = pipe.waiting[0][0] - now
                if due <= 0:
                    watched[pipe.target] = watched.get(pipe.target, 0) | selectors.EVENT_WRITE
                else:
                    timeout = due if timeout is None else min(timeout, due)
        return watched, timeout

    def _work(self, ready: dict[object, int]) -> None:
        if self._woken in ready:
            with suppress(BlockingIOError):
                self._woken.recv(_CHUNK)
        if self._listener in ready:
            self._accept()
        if self._stalled:
            return
        for pipe in list(self._pipes.values()):
            # One end may have failed and taken the other with it a moment ago.
            if pipe.source in self._pipes and ready.get(pipe.source, 0) & selectors.EVENT_READ:
                self._read(pipe)
            if pipe.source in self._pipes:
                self._write(pipe)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        if self._refusing:
            self._reset(client)
            return
        try:
            server = socket.create_connection(self._target, 5)
        except OSError:
            # As a client would see it without the proxy, but for the refusal becoming a reset.
            self._reset(client)
            return
        for end in (client, server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pipes[client] = _Pipe(client, server)
        self._pipes[server] = _Pipe(server, client)
        self._total += 1

    def _read(self, pipe: _Pipe) -> None:
        try:
            data = pipe.source.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self._drop(pipe)
            return
        if data:
            pipe.waiting.append((time.monotonic() + self._delay, data))
        else:
            pipe.ended = True

    def _write(self, pipe: _Pipe) -> None:
        try:
            while pipe.waiting and pipe.waiting[0][0] <= time.monotonic():
                when, data = pipe.waiting.popleft()
                try:
                    sent = pipe.target.send(data)
                except BlockingIOError:
                    sent = 0
                if sent < len(data):
                    pipe.waiting.appendleft((when, data[sent:]))
                    return
            if pipe.ended and not pipe.waiting and not pipe.said_so:
                pipe.said_so = True
                pipe.target.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(pipe)
            return
        if pipe.said_so and self._pipes[pipe.target].said_so:
            self._forget(pipe)

    def _forget(self, pipe: _Pipe) -> None:
        for end in (pipe.source, pipe.target):
            self._pipes.pop(end, None)
            end.close()

    def _drop(self, pipe: _Pipe) -> None:
        """One end failed: the other one is told by a reset."""
        for end in (pipe.source, pipe.target):
            self._pipes.pop(end, None)
            self._reset(end)

    @staticmethod
    def _reset(end: socket.socket) -> None:
        with suppress(OSError):
            # Lingering for zero seconds turns close into a reset.
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.close()
