"""When does a worker's acknowledgement reach RabbitMQ? With others, a few milliseconds after the task's end at most.

Each one that is sent by itself wakes the broker, which costs more time than a short task takes. So those of a worker
that runs its tasks in its loop wait for company: until there are several, until nothing is left to read, or for ten
milliseconds; whatever else is written to the connection takes them along. The messages of a worker that is killed
meanwhile are delivered again, as after an acknowledgement that was lost on its way. One that
belongs before its task (``at_most_once``) waits for nobody.

A long task may begin right after a short one, in the thread that reads and writes. So a thread of this module sends
what has waited; it never blocks. It needs the interpreter for that, like every thread: a task that does not let go of
it keeps acknowledgements waiting too.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
import weakref
from typing import Any

from qbridge.backends.forking import begin_anew_after_fork

__all__ = ["HeldAcks"]

_AT_MOST = 16
_WAIT = 0.005
"""Seconds for which the thread leaves what it finds to others; it looks as often, so nothing waits twice as long."""
_LOST = 5.0
"""Seconds after which the thread notices that nobody has its connection any more."""
_NO_ROOM = (errno.ENOBUFS, errno.ENOMEM)
"""Errors of a write that say nothing about the connection."""
_LOCKED = 0.1
"""Seconds for which giving up a connection waits for who writes to it: who is stuck there must not keep it open."""


class HeldAcks:
    """The acknowledgements of one connection that wait to be sent, as frames.

    Whatever is written to the connection's socket is written under ``lock``, and begins with what ``take()`` returns.

    Args:
        connection: py-amqp's.
    """

    def __init__(self, connection: Any) -> None:
        self.lock = threading.Lock()
        self._frames = bytearray()  # of the first one a part may have been sent
        self._count = 0
        self._limit = 0
        self._since = 0.0
        self._stirred = threading.Event()
        self._thread: threading.Thread | None = None
        self._connection = weakref.ref(connection)
        begin_anew_after_fork(self)

    def begin(self, prefetch: int) -> None:
        """Hold acknowledgements back from now on.

        Args:
            prefetch: how many messages the broker sends without an acknowledgement; 0: any number. While none or one
                is under way there is no time to wait for another.
        """
        self._limit = min(_AT_MOST, prefetch // 2) if prefetch else _AT_MOST

    def end(self) -> None:
        """Forget what is held, and hold nothing back any more: the connection is lost, or given up."""
        # the number of its socket may soon be another's: nobody must be about to write to it
        locked = self.lock.acquire(timeout=_LOCKED)
        try:
            self._forget()
        finally:
            if locked:
                self.lock.release()

    def after_fork(self) -> None:
        """In a forked child: the connection is the parent's."""
        self.lock, self._stirred, self._thread = threading.Lock(), threading.Event(), None
        self._forget()

    def add(self, frame: bytes) -> bool:
        """Hold a frame back; False if it is to be sent now, which takes the others along.

        Args:
            frame: a whole one.
        """
        if self._limit < 2 or (self._thread is None and not self._has_begun()):
            return False
        with self.lock:
            if self._count + 1 >= self._limit:
                return False
            self._frames += frame
            self._count += 1
            if self._count > 1:
                return True
            self._since = time.monotonic()
        self._stirred.set()
        return True

    def __bool__(self) -> bool:
        return bool(self._frames)

    def take(self) -> bytes:
        """Return what is to be written before anything else, and hold it no more; to be called under the lock."""
        frames, self._frames, self._count = bytes(self._frames), bytearray(), 0
        return frames

    def _forget(self) -> None:
        self._limit = self._count = 0
        self._frames = bytearray()
        self._stirred.set()

    def _has_begun(self) -> bool:
        thread = threading.Thread(target=self._watch, name="qbridge-acks", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads are to be had
            return False
        self._thread = thread
        return True

    def _watch(self) -> None:
        while self._limit and self._connection() is not None:
            if not self._stirred.wait(_LOST):
                continue
            self._stirred.clear()
            time.sleep(_WAIT)
            if self.lock.acquire(blocking=False):
                try:
                    self._send_what_has_waited()
                finally:
                    self.lock.release()
            elif self._frames:  # who writes takes them along; who adds to them does not
                self._stirred.set()
        self._thread = None

    def _send_what_has_waited(self) -> None:
        connection: Any = self._connection()
        if not self._frames or connection is None or time.monotonic() - self._since < _WAIT:
            return  # what is younger has stirred the thread again
        try:
            # not `transport`, which would connect anew
            sent = connection._transport.sock.send(self._frames, socket.MSG_DONTWAIT)
        except (BlockingIOError, TimeoutError):
            sent = 0
        except (OSError, AttributeError) as error:
            if getattr(error, "errno", None) not in _NO_ROOM:  # lost, or closed: the loop learns of it when it reads
                self._forget()
                return
            sent = 0
        if sent:
            connection.bytes_sent += 1  # what py-amqp's heartbeats go by
        del self._frames[:sent]
        self._count = 0
        if self._frames:
            self._stirred.set()
