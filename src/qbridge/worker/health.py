"""Who is told how a worker is? A file, an HTTP port and systemd, each at every look of the watchdog.

All three tell what the watchdog's thread saw last, so an answer costs no question to the worker's loop, which may be
what stands still. An answer that is too old says so itself: the thread has ended, or the whole process was stopped.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from celery.utils.log import get_logger

from qbridge.exceptions import ConfigurationError
from qbridge.worker.watchdog import Condition

__all__ = ["Health", "HealthFile", "HealthPort", "SystemdNotifier"]

logger = get_logger(__name__)

_FRESH = 15.0
"""Seconds that an answer counts: looks are two seconds apart at most."""
_REQUEST = 2.0
"""Seconds that a client of the port gets to say what it wants."""

Teller = Callable[[Condition], None]


class Health:
    """Tells a worker's condition to all who want to know.

    Args:
        tellers: called one after the other; one that fails is logged once, and does not keep the others from it.
    """

    def __init__(self, tellers: Iterable[Teller]) -> None:
        self._tellers = tuple(tellers)
        self._failed: set[int] = set()

    def __call__(self, condition: Condition) -> None:
        """Tell it."""
        for number, tell in enumerate(self._tellers):
            try:
                tell(condition)
                self._failed.discard(number)
            except OSError as error:
                if number not in self._failed:
                    self._failed.add(number)
                    logger.warning("Cannot tell this worker's health to %s: %s", tell, error)


class HealthFile:
    """A small JSON file, replaced whole at every look; ``python -m qbridge.probe FILE`` reads it.

    Args:
        path: of the file; its folder must exist.

    Raises:
        ConfigurationError: if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._next = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            self(Condition(live=True, ready=False, reason="it is starting"))
        except OSError as error:
            raise ConfigurationError(
                f"the health file {path} cannot be written: {error.strerror}",
                "Name a file in a folder that exists and that this user may write to.",
            ) from error

    def __call__(self, condition: Condition) -> None:
        """Write it: a reader sees the old one or the new one."""
        told = {"live": condition.live, "ready": condition.ready, "reason": condition.reason}
        self._next.write_text(json.dumps({**told, "pid": os.getpid(), "at": time.time()}) + "\n")
        self._next.replace(self._path)

    def __str__(self) -> str:
        return f"the file {self._path}"


class HealthPort:
    """``GET /live`` and ``GET /ready``: 200 or 503, with the condition as JSON.

    Args:
        host: address to listen on.
        port: 0 for a free one.

    Raises:
        ConfigurationError: if it cannot listen there.
    """

    def __init__(self, host: str, port: int) -> None:
        self._told = Condition(live=True, ready=False, reason="it is starting")
        self._at = time.monotonic()
        try:
            self._server = _Server((host, port), self.answer)
        except OSError as error:
            raise ConfigurationError(
                f"the health port {host}:{port} cannot be opened: {error.strerror}",
                "Choose another one; workers on one host need one each.",
            ) from error
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, name="qbridge-health", daemon=True).start()
        logger.info("Health is told on http://%s:%d/live and /ready", host, self.port)

    def __call__(self, condition: Condition) -> None:
        """Keep it for the next question."""
        self._told, self._at = condition, time.monotonic()

    def answer(self, path: str) -> tuple[int, dict[str, Any]]:
        """Return status and body for a path.

        Args:
            path: ``/live`` or ``/ready``.
        """
        told = self._told
        if time.monotonic() - self._at > _FRESH:
            told = Condition(live=False, ready=False, reason="its watchdog has stood still")
        kept = {"/live": told.live, "/ready": told.ready}
        if path not in kept:
            return 404, {"reason": "there are /live and /ready"}
        return (200 if kept[path] else 503), {"live": told.live, "ready": told.ready, "reason": told.reason}

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()

    def __str__(self) -> str:
        return f"port {self.port}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], answer: Callable[[str], tuple[int, dict[str, Any]]]) -> None:
        self.answer = answer
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""
        logger.debug("A question about this worker's health was not answered")


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST
    server: _Server

    def do_GET(self) -> None:
        """Answer one question."""
        status, body = self.server.answer(self.path.partition("?")[0])
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the standard library's name
        """Probes come every few seconds: not worth a line each."""

    def version_string(self) -> str:
        """Say nothing of what answers, and in which version."""
        return "qbridge"


class SystemdNotifier:
    """Tells systemd, for units of ``Type=notify``: ready, its status, and that it lives (``WatchdogSec=``).

    The protocol is that of sd_notify(3): datagrams to the socket that ``NOTIFY_SOCKET`` names.

    Args:
        address: of the socket; an ``@`` at its beginning stands for Linux' abstract names.
    """

    def __init__(self, address: str) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._was_ready = False

    def __call__(self, condition: Condition) -> None:
        """Tell it; that it lives only if it does."""
        words = [f"STATUS={condition.reason or 'takes tasks'}"]
        if condition.live:
            words.append("WATCHDOG=1")
        if condition.ready and not self._was_ready:
            self._was_ready = True
            words.append("READY=1")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto("\n".join(words).encode(), self._address)

    def __str__(self) -> str:
        return "systemd"
