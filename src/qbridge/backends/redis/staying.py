"""What becomes of a message whose task runs on in a thread when the connection breaks? It stays claimed.

The channel is closed, and everything else that it holds goes back. Its keeper goes on, with connections of its own:
it moves what is kept to a new holder, renews that one's lease, and has its acknowledgements sent. So nobody else gets
the message before the run has ended; and if the lease ends first, the acknowledgement changes nothing.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from typing import Any

import redis

from qbridge.backends.redis import scripts

__all__ = ["Staying"]

logger: logging.Logger = logging.getLogger(__name__)


class Staying:
    """Part of our channel: what stays of it after it was closed."""

    #: A client that outlives the channel; None: nothing stays.
    _client_of_its_own: Any = None
    _moved = False

    def keep(self: Any, delivery_tags: Iterable[str]) -> None:
        """Let messages stay claimed when the channel is closed.

        Args:
            delivery_tags: of messages whose tasks run on.
        """
        if self._keeper is None or self.closed or not self.qos.keep(delivery_tags):
            return
        self._client_of_its_own = redis.Redis(connection_pool=self._get_pool())

    @property
    def stays(self) -> bool:
        """Whether claims outlive the channel."""
        return self._client_of_its_own is not None

    def move(self: Any) -> bool:
        """Give what was kept a holder of its own, once; return whether anything is left to be held.

        What the closed channel had claimed and not read is then nobody's, and is taken over by the next sweep.
        """
        with self._settling:
            if not self._moved:
                holder = f"{uuid.uuid4().hex}:{int(self.lease * 1000)}"
                claims = self.qos.held()
                args = [self._holder, holder, int(self.lease * 1000), *(word for claim in claims for word in claim)]
                number = scripts.MOVE.run(self._ours, self._keys("qbridge.holders", "qbridge.claims"), args)
                self.qos.move(f"{holder}/0")
                self._holder, self._moved = holder, True
                logger.info("Running tasks keep %d messages claimed after their connection broke", number)
            return bool(self.qos.held())

    def leave(self: Any) -> None:
        """Say goodbye: nothing is held any more."""
        self._ours.zadd(self._keys("qbridge.holders")[0], {self._holder: 0}, xx=True)
        self._client_of_its_own.connection_pool.disconnect()
