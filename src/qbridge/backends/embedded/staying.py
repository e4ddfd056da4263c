"""What becomes of a message whose task runs on in a thread when its consumer connects anew? It stays claimed.

The connection is closed, and everything else that it holds goes back. Its proof of life is not given up with it: the
party stands, with what is kept and nothing else, until the last of that is settled. So nobody else gets the message
before the run has ended; and if the process dies, the kernel says so as ever.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable

from qbridge.backends.embedded.errors import FileUnavailable
from qbridge.backends.embedded.presence import Presence
from qbridge.backends.embedded.store import Store

__all__ = ["Staying"]

logger: logging.Logger = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds that settling waits for a busy file: a worker's loop waits."""


class Staying:
    """What stays of a connection after it was closed.

    Args:
        presence: its proof of life, which is ours from now on.
        store: its broker's state; another connection to the same file is opened when something is settled.
        claims: what is kept, by id and deliveries.

    Raises:
        FileUnavailable: if the rest cannot be given back; nothing has changed then.
    """

    def __init__(self, presence: Presence, store: Store, claims: Iterable[tuple[int, int]]) -> None:
        self._claims = set(claims)
        self._put_off: list[tuple[list[tuple[int, int]], bool]] = []
        self._process = os.getpid()
        self._store = Store(store.database.path, store.database.timeout)
        store.stay(presence.id, self._claims)
        self._presence = presence
        weakref.finalize(self, presence.close)  # whoever had the messages is gone: others take them over
        logger.info("Running tasks keep %d messages claimed after their connection was closed", len(self._claims))

    def settle(self, claims: list[tuple[int, int]], *, requeue: bool) -> None:
        """Acknowledge messages, or give them back; with the last one the party leaves."""
        if self._process != os.getpid():
            return
        self._claims.difference_update(claims)
        self._put_off.append((claims, requeue))
        try:
            while self._put_off:
                some, back = self._put_off[0]
                step = self._store.give_back if back else self._store.acknowledge
                step(self._presence.id, some, timeout=PATIENCE)
                del self._put_off[0]
            if not self._claims:
                self._store.leave(self._presence.id)
        except FileUnavailable as error:
            # with the next one, or never: then they come again, and whoever gets them looks whether they have succeeded
            logger.warning("Cannot settle %d message(s) that were kept: %s", len(self._put_off), error)
        finally:
            if not self._claims:
                self._presence.close()
            self._store.database.close()
