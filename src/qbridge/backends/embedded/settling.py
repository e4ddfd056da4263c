"""When does the embedded broker learn what has become of a message? At once, with the next claim, or when it can."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from qbridge.backends.embedded.errors import FileReplaced, FileUnavailable
from qbridge.backends.embedded.store import Claim, Store, say_missing

if TYPE_CHECKING:
    from qbridge.backends.embedded.presence import Presence

__all__ = ["SETTLE_PATIENCE", "Settling"]

logger: logging.Logger = logging.getLogger(__name__)

SETTLE_PATIENCE = 1.0
"""Seconds that an acknowledgement waits for a busy file before it is put off to the next sweep."""


class Settling:
    """Part of the transport: claiming messages, acknowledging them, and giving them back."""

    store: Store
    _presence: Presence | None
    _loop: Any

    if TYPE_CHECKING:

        def party(self) -> str: ...
        def nudge(self) -> bool: ...

    def settle_nothing(self) -> None:
        """Begin with nothing that waits: at first, and in a forked child, where it is the parent's."""
        self._put_off: list[tuple[list[tuple[int, int]], bool]] = []
        self._holds_acks = False
        self._settled: list[tuple[int, int]] = []
        self._settling = threading.Lock()

    def claim(self, queue: str, *, keep: bool, timeout: float) -> Claim | None:
        """Claim the next message for this party; acknowledgements that wait for it go in the same transaction.

        Args:
            queue: its name.
            keep: False to delete it at once.
            timeout: seconds to wait for the file.

        Raises:
            FileUnavailable: if the file is not had in time; nothing is forgotten.
        """
        if not self.store.has_ready(queue):
            return None
        settled = self._take_settled()
        try:
            return self.store.claim(queue, self.party(), keep=keep, timeout=timeout, settled=settled)
        except BaseException:
            with self._settling:
                self._settled[:0] = settled
            raise

    def hold_acks(self, prefetch: int) -> None:
        """Let acknowledgements wait for the next claim from now on; whoever runs a task in between settles them first.

        Args:
            prefetch: how many messages a consumer may hold; whatever it is, the next claim is at hand.
        """
        self._holds_acks = True

    def settle_waiting(self) -> None:
        """Settle what waits for the next claim."""
        if self._settled:
            self._settle_now(self._take_settled(), requeue=False)

    def _take_settled(self) -> list[tuple[int, int]]:
        with self._settling:
            settled, self._settled = self._settled, []
        return settled

    def settle(self, claims: list[tuple[int, int]], *, requeue: bool) -> None:
        """Acknowledge messages, or give them back; on a file that stays busy this is done later, not forgotten."""
        if self._presence is None:
            return
        if self._holds_acks and self._loop is not None and not requeue:
            with self._settling:
                self._settled.extend(claims)
            if self.nudge():
                return  # the next turn's claim takes them along, or that turn finds nothing and settles them
            claims = self._take_settled()
        self._settle_now(claims, requeue)
        self.nudge()

    def _settle_now(self, claims: list[tuple[int, int]], requeue: bool) -> None:
        if self._presence is None or not claims:
            return
        try:
            self._settle(self._presence, claims, requeue)
        except FileReplaced:
            raise
        except FileUnavailable as error:
            logger.warning("Cannot settle %d message(s) now, trying again: %s", len(claims), error)
            self._put_off.append((claims, requeue))

    def _settle(self, presence: Presence, claims: list[tuple[int, int]], requeue: bool) -> None:
        step = self.store.give_back if requeue else self.store.acknowledge
        say_missing(len(claims) - step(presence.id, claims, timeout=SETTLE_PATIENCE))

    def settle_put_off(self, presence: Presence) -> None:
        """Settle what waits, for the next claim or for a file that was busy.

        Args:
            presence: whose claims they are.

        Raises:
            FileUnavailable: if the file is busy still.
        """
        settled = self._take_settled()
        if settled:
            self._put_off.append((settled, False))
        while self._put_off:
            self._settle(presence, *self._put_off[0])
            del self._put_off[0]
