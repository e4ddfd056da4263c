"""Who keeps a consumer's claims on Redis alive while its main thread is busy? One thread per consuming channel.

It renews the lease every third of it, takes over what dead consumers held, sends acknowledgements that have waited for
20 ms because the task after them runs long, and hangs up where the server's answer is overdue. An error is said once;
the next round tries again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

__all__ = ["Keeper"]

logger: logging.Logger = logging.getLogger(__name__)

PATIENCE = 0.02
"""Seconds that an acknowledgement may wait for others to go with it."""

_GOODBYE = 0.5
"""Seconds to wait for a round that is under way."""


class Keeper:
    """The thread, and its clock.

    Args:
        channel: of our transport, with ``renew``, ``sweep``, ``settle`` and ``look_after_the_wait``.
        lease: in seconds.
    """

    def __init__(self, channel: Any, lease: float) -> None:
        self._channel = channel
        self._lease = lease
        self._asked = threading.Event()
        self._stopped = False
        self._stays = False
        self._failing = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="qbridge-redis-lease", daemon=True)
        self._thread.start()

    def settle_soon(self) -> None:
        """Something is to be acknowledged."""
        self._asked.set()

    def stay(self) -> None:
        """The channel is closed, and the tasks of some of its messages run on: hold these until they are settled."""
        self._stays = True
        self._asked.set()

    def stop(self) -> None:
        """Ask the thread to end; a round against a server that does not answer ends by itself, in time."""
        self._stopped = True
        self._asked.set()
        if self._process == os.getpid() and self._thread is not threading.current_thread():
            self._thread.join(_GOODBYE)  # a renewal after the goodbye would take it back

    def _run(self) -> None:
        pause = min(1.0, self._lease / 8)
        renewed = swept = time.monotonic()
        while not self._stopped:
            asked = self._asked.wait(pause)
            if asked and not self._stopped:
                self._asked.clear()
                time.sleep(PATIENCE)
            if self._stopped:
                return
            try:
                if self._stays and not self._channel.move():
                    self._channel.leave()
                    return
                if asked:
                    self._channel.settle(waited=PATIENCE)
                now = time.monotonic()
                if now - renewed >= self._lease / 3:
                    self._channel.renew()
                    renewed = now
                if now - swept >= pause:
                    self._channel.sweep()
                    swept = now
                    if not self._stays:
                        self._channel.look_after_the_wait()
            except Exception as error:  # noqa: BLE001 - whatever a server and a network do: the next round tries again
                if not self._stopped:
                    self._says(error)
            else:
                self._failing = False

    def _says(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            logger.warning(
                "Cannot renew the lease on what this worker holds, trying again (%s: %s). If this takes longer than "
                "the lease (%g s), other workers take its tasks over.",
                type(error).__name__, error, self._lease,
            )  # fmt: skip
        time.sleep(min(0.5, self._lease / 8))
        self._asked.set()  # what was to be acknowledged still is
