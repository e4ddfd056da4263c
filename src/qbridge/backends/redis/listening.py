"""Does anybody still answer the connection on which a consumer waits? A peer that went without a word is noticed.

A wait has an end that Redis keeps, so an answer is due. If the network has lost the connection, none comes, and the
event loop, which reads what has come, hears of nothing; kombu looks after half a minute to a minute, when the lease may
have ended long ago. So the keeper's thread looks, and hangs up: that the loop hears, and it connects again.
"""

from __future__ import annotations

import logging
import select
import socket
from contextlib import suppress
from time import monotonic
from typing import Any

__all__ = ["Listening"]

logger: logging.Logger = logging.getLogger(__name__)

LATE = 1.0
"""Seconds by which an answer may be late."""
PATIENCE = 0.5
"""Seconds more that it gets once the server answers others: after a freeze it takes its connections in turn."""

_WAITS = 0.1  # a wait on the server ends by itself after this, see LOOK of claiming.py


class Listening:
    """Part of our channel: what its keeper looks at."""

    #: What is late, and since when the server is known to answer others.
    _late: tuple[Any, float] | None = None

    def look_after_the_wait(self: Any) -> None:
        """Hang up on a connection that does not answer, while the server answers on another: it has, just now.

        A server that answers nobody is not left: it would not take a new connection either, and tasks of processes
        would be ended for nothing.
        """
        waiting = self._late_one()
        if waiting is None:
            self._late = None
        elif self._late is None or self._late[0] != waiting:
            self._late = waiting, monotonic()
        elif monotonic() - self._late[1] >= PATIENCE:
            self._late = None
            self._hang_up(*waiting)

    def _late_one(self: Any) -> tuple[Any, float] | None:
        connection, since = self._in_poll, self._brpop_sent_at
        sock = getattr(connection, "_sock", None)
        if not connection or sock is None or since is None or monotonic() - since < _WAITS + LATE:
            return None
        with suppress(OSError, ValueError):  # closed meanwhile
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            if not poll.poll(0):  # else it has come, and the loop is busy
                return connection, since
        return None

    def _hang_up(self: Any, connection: Any, since: float) -> None:
        sock = getattr(connection, "_sock", None)
        if sock is None or self._in_poll is not connection or self._brpop_sent_at != since:
            return
        logger.warning("Redis has not answered this worker's wait for %.1f s: connecting again", monotonic() - since)
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not the TLS layer's: its state is the loop's
