"""What becomes of something published that is no broadcast of kombu's? It is dropped, with an error in the log.

kombu drops what is no JSON. What is JSON of a hundred thousand levels, or names a number that there is not, ends its
event loop, and one PUBLISH ends every worker that listens.
"""

from __future__ import annotations

import logging
from queue import Empty
from typing import Any

from qbridge.backends.redis.messages import FAULTS

__all__ = ["Broadcasts"]

logger: logging.Logger = logging.getLogger(__name__)


class Broadcasts:
    """Part of our channel: what is published, commands to workers above all."""

    #: Something has come, and nobody knows yet what it says.
    _unread = False

    def _receive_one(self: Any, subscriber: Any) -> bool:
        """Read one answer of the subscription, and deliver it; False if there was nothing to deliver."""
        self._unread = False
        try:
            return bool(super()._receive_one(subscriber))  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's
        except Empty:  # kombu has dropped it, and would leave those unread that came in the same packet
            return False
        except FAULTS as error:
            if not self._unread:
                raise
            logger.error(  # noqa: TRY400 - where it was read says nothing
                "Dropped what was published for workers and is no broadcast of kombu's (%s). "
                "Only Celery and kombu may publish on its channels.",
                type(error).__name__,
            )
            return False

    def _handle_message(self: Any, client: Any, answer: Any) -> Any:
        self._unread = True
        return super()._handle_message(client, answer)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's

    def _deliver_fanout_message(self: Any, message: Any, exchange: str) -> Any:
        """Deliver what was read; what fails from here on is not the sender's fault, and not hidden."""
        queue = self._fanout_to_queue[exchange]
        self._unread = False
        self.connection._deliver(message, queue)
        return True
